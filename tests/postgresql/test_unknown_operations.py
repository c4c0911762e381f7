"""Each operation that writes, cut off at its commit: it is done once, or its outcome is told as unknown."""

from collections import Counter

import pytest
from builders import Clock
from operations_table import OPERATIONS, prepared
from postgresql.proxy import Cut

from kkt_buffer import OutcomeUnknownError, ReceiptRepository

# Doing these twice is not doing them once, so that only the caller can decide what to do.
TOLD = {
    "increment_retry_count",
    "log_event",
    "prune",
    "record_failure",
    "release",
    "requeue",
    "requeue_all",
    "resolve",
    "discard_held",
    "transaction",
    "update_receipt_status",
}
ABOUT_NO_RECEIPT = {"log_event", "prune", "transaction"}


@pytest.fixture
def disturbed(open_engine, through_proxy):
    return ReceiptRepository(open_engine(through_proxy), now=Clock())


@pytest.fixture
def undisturbed(server_engine):
    return ReceiptRepository(server_engine, now=Clock())


def events(repository):
    return Counter(event.event_type for event in repository.get_events(1000))


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER], ids=["before", "after"])
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.writes])
def test_cut(undisturbed, disturbed, proxy, name, cut):
    known = prepared(undisturbed)
    before = events(undisturbed)
    OPERATIONS[name].call(undisturbed, known)
    expected = events(undisturbed) - before

    known = prepared(undisturbed)
    disturbed.get_buffer_status()
    before = events(undisturbed)
    proxy.cut("kkt_insert_receipts" if name.startswith("insert") else "COMMIT\0", cut)
    if name in TOLD:
        with pytest.raises(OutcomeUnknownError) as raised:
            OPERATIONS[name].call(disturbed, known)
        assert (name in ABOUT_NO_RECEIPT) == (raised.value.receipt_ids == ())
        if cut is Cut.BEFORE:
            expected = Counter()
    else:
        OPERATIONS[name].call(disturbed, known)
    assert 1 == proxy.cuts
    assert expected == events(undisturbed) - before
