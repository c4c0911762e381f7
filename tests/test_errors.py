"""What the package raises."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

import kkt_buffer
from kkt_buffer import (
    AcknowledgedReceiptError,
    BufferBusyError,
    BufferDamagedError,
    BufferFullError,
    BufferMovedError,
    BufferStorageError,
    ClockDriftError,
    ConnectionLostError,
    DeliveryRejected,
    DeliveryUnavailable,
    DuplicateReceiptError,
    HybridTimestamp,
    InvalidConfigError,
    InvalidDocumentError,
    InvalidTransitionError,
    LeaseLostError,
    OutcomeUnknownError,
    ReceiptBufferError,
    ReceiptNotFoundError,
    ReceiptStatus,
    SchemaError,
    TransactionConflictError,
    errors,
)
from kkt_buffer.hlc import update_hlc_on_receive

UUID_TEXT = "123e4567-e89b-42d3-a456-426614174000"

# Each error once: what else it can be caught as, and the facts that it carries.
ERRORS = [
    (ReceiptBufferError("anything"), Exception, {}),
    (BufferFullError(198, 200, 3), ValueError, {"undelivered": 198, "capacity": 200, "wanted": 3}),
    (
        DuplicateReceiptError(UUID_TEXT, same_pos_id=True, same_document=False),
        ReceiptBufferError,
        {"receipt_id": UUID_TEXT, "same_pos_id": True, "same_document": False},
    ),
    (ReceiptNotFoundError(UUID_TEXT), LookupError, {"receipt_id": UUID_TEXT}),
    (
        InvalidTransitionError(UUID_TEXT, ReceiptStatus.SYNCED, "failed"),
        ValueError,
        {"receipt_id": UUID_TEXT, "status": "synced", "wanted": "failed"},
    ),
    (BufferMovedError("postgresql://hub"), ReceiptBufferError, {"target": "postgresql://hub"}),
    (AcknowledgedReceiptError(), ReceiptBufferError, {}),
    (
        LeaseLostError(UUID_TEXT, ReceiptStatus.PENDING),
        ReceiptBufferError,
        {"receipt_id": UUID_TEXT, "status": "pending"},
    ),
    (
        InvalidDocumentError(UUID_TEXT, "Expecting value"),
        ValueError,
        {"receipt_id": UUID_TEXT, "problem": "Expecting value"},
    ),
    (
        InvalidConfigError("lease_seconds", "soon", "a number"),
        ValueError,
        {"key": "lease_seconds", "value": "soon", "expected": "a number"},
    ),
    (ClockDriftError(7200, 3600), ValueError, {"ahead": 7200, "max_drift": 3600}),
    (SchemaError("the schema is old"), ReceiptBufferError, {}),
    (BufferStorageError("the disk is full"), ReceiptBufferError, {}),
    (BufferBusyError("locked"), BufferStorageError, {}),
    (ConnectionLostError("lost"), BufferStorageError, {}),
    (TransactionConflictError("deadlock"), BufferStorageError, {}),
    (
        OutcomeUnknownError("the buffer", [UUID_TEXT, UUID_TEXT], "the connection was lost"),
        BufferStorageError,
        {"receipt_ids": (UUID_TEXT,), "problem": "the connection was lost"},
    ),
    (BufferDamagedError("not a database"), BufferStorageError, {}),
    (DeliveryRejected("unknown tax rate"), ReceiptBufferError, {}),
    (DeliveryUnavailable("HTTP 429", retry_after=60), ReceiptBufferError, {"retry_after": 60}),
]

every_error = pytest.mark.parametrize(
    "error", [error for error, _, _ in ERRORS], ids=lambda error: type(error).__name__
)


def all_errors(module):
    return {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseException)}


class TestTree:
    def test_one_root(self):
        """Whoever catches `ReceiptBufferError` misses nothing that the package raises on its own account."""
        assert set() == {error for error in all_errors(errors) if not issubclass(error, ReceiptBufferError)}

    def test_exported(self):
        """Every error can be imported from the package itself."""
        exported = all_errors(kkt_buffer)
        assert all_errors(errors) == exported
        assert {error.__name__ for error in exported} <= set(kkt_buffer.__all__)

    def test_all_tested(self):
        """A new error gets a line in the table above."""
        assert all_errors(errors) == {type(error) for error, _, _ in ERRORS}

    @pytest.mark.parametrize(("error", "base", "facts"), ERRORS, ids=lambda value: type(value).__name__)
    def test_facts(self, error, base, facts):
        """An error is also what Python calls such a mistake, and its facts need not be read out of its message."""
        assert isinstance(error, base)
        assert facts == vars(error)

    @every_error
    def test_documented(self, error):
        assert type(error).__doc__


class TestMessages:
    def test_full(self):
        """Callers that know only `ValueError` look at how the message begins."""
        assert str(BufferFullError(200, 200)).startswith(
            "Buffer full: 200 of 200 receipts are waiting for delivery, so 1 more cannot be taken."
        )

    def test_full_batch(self):
        error = BufferFullError(150, 200, wanted=51)
        assert 51 == error.wanted
        assert "so 51 more cannot be taken" in str(error)

    def test_not_found(self):
        assert f"no receipt '{UUID_TEXT}' in this buffer" == str(ReceiptNotFoundError(UUID_TEXT))

    def test_transition(self):
        """A status is named as it is stored, whether it comes as text or as a member."""
        as_text = str(InvalidTransitionError(UUID_TEXT, "synced", "failed"))
        assert as_text.startswith(f"receipt {UUID_TEXT} is synced and cannot become failed; it was not changed.")
        assert as_text == str(InvalidTransitionError(UUID_TEXT, ReceiptStatus.SYNCED, ReceiptStatus.FAILED))

    @pytest.mark.parametrize("status", [ReceiptStatus.PENDING, "pending"])
    def test_lease(self, status):
        """The message says what not to do, and what to do if it was done already."""
        message = (
            "the lease on receipt r-1 is over, the receipt is pending now; nothing was changed. Another worker may "
            "have it: do not send it again. If it was sent, record that with mark_synced."
        )
        assert message == str(LeaseLostError("r-1", status))

    @pytest.mark.parametrize("error", [DeliveryRejected, DeliveryUnavailable])
    def test_sender(self, error):
        """What a sender raises says what the sender says, or nothing."""
        assert "unknown tax rate" == str(error("unknown tax rate"))
        assert "" == str(error())

    def test_retry_after(self):
        assert (60, None) == (
            DeliveryUnavailable("HTTP 429", retry_after=60).retry_after,
            DeliveryUnavailable().retry_after,
        )
        with pytest.raises(TypeError, match="retry_after: expected seconds as a number, got '60'"):
            DeliveryUnavailable("HTTP 429", retry_after="60")

    def test_document(self):
        message = "the fiscal_doc of receipt r-1 is not JSON (Expecting value); its text is kept unchanged"
        assert message == str(InvalidDocumentError("r-1", "Expecting value"))

    def test_config(self):
        """The message says how to put it right."""
        message = "config lease_seconds is 'soon', expected a number; correct it with set_config('lease_seconds', …)"
        assert message == str(InvalidConfigError("lease_seconds", "soon", "a number"))

    def test_drift(self):
        message = "the remote clock is 7200 s ahead of ours, more than the 3600 s allowed; our clock was not moved."
        assert str(ClockDriftError(7200, 3600)).startswith(message)

    @every_error
    def test_one_line(self, error):
        """A log and a command line show an error in one line."""
        assert [str(error)] == str(error).splitlines()


class TestDuplicateReceipt:
    @pytest.mark.parametrize(
        ("same_pos_id", "same_document", "difference"),
        [
            (True, True, "with the same pos_id and document, so this is a replay and nothing is missing"),
            (True, False, "but with another fiscal_doc; give a new receipt a new id"),
            (False, True, "but with another pos_id; give a new receipt a new id"),
            (False, False, "but with another pos_id and another fiscal_doc; give a new receipt a new id"),
        ],
    )
    def test_cases(self, same_pos_id, same_document, difference):
        """A replay and a collision need different answers, so the error says which of them it is."""
        error = DuplicateReceiptError(UUID_TEXT, same_pos_id=same_pos_id, same_document=same_document)
        assert (same_pos_id and same_document) is error.identical
        assert f"receipt {UUID_TEXT} is in this buffer already, {difference}" == str(error)


class TestPickle:
    @every_error
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_round_trip(self, error, protocol):
        """An error that crosses a process boundary keeps its type, its message and its facts."""
        arrived = pickle.loads(pickle.dumps(error, protocol))
        assert type(error) is type(arrived)
        assert (str(error), error.args, vars(error)) == (str(arrived), arrived.args, vars(arrived))

    @every_error
    def test_copy(self, error):
        copied = copy.copy(error)
        assert (type(error), str(error), vars(error)) == (type(copied), str(copied), vars(copied))

    def test_notes(self):
        """What was added on the way up goes along: `insert_receipts` says there which receipt of the batch it was."""
        error = ReceiptNotFoundError(UUID_TEXT)
        error.add_note("in receipt 3 of the batch")
        assert ["in receipt 3 of the batch"] == pickle.loads(pickle.dumps(error)).__notes__

    def test_from_a_worker(self):
        """An error of a worker process arrives whole."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            error = pool.submit(update_hlc_on_receive, HybridTimestamp(2**40, 0)).exception()
        assert isinstance(error, ClockDriftError)
        assert 3600 == error.max_drift
        assert f"the remote clock is {error.ahead} s ahead" in str(error)
