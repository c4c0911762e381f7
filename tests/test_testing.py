"""What `kkt_buffer.testing` and the pytest plugin give to the tests of a service."""

import doctest
import subprocess
import sys
from time import perf_counter

import pytest
from builders import new_receipt, run_python

import kkt_buffer.testing
from kkt_buffer import Outcome, ReceiptRepository, check
from kkt_buffer.testing import NOON, FakeOFD, assert_buffered, drain, memory_engine

EXAMPLE = """
    from kkt_buffer.testing import FakeOFD, assert_buffered, drain

    SOLD = []

    def test_a_sale(kkt_buffer, kkt_clock):
        kkt_clock.advance(60)
        SOLD.append(kkt_buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": {"totalSum": 6490}}))
        drain(kkt_buffer, FakeOFD(now=kkt_clock))
        receipt = assert_buffered(kkt_buffer, SOLD[0], status="synced")
        assert receipt.created_at == receipt.hlc_server_time == kkt_clock()

    def test_a_new_one(kkt_buffer):
        assert kkt_buffer.get_buffer_status().total_receipts == 0
"""


class TestPlugin:
    def test_fixtures(self, tmp_path):
        """In another project the fixtures are there by themselves, and each test has an empty buffer."""
        import textwrap  # noqa: PLC0415

        (tmp_path / "test_shop.py").write_text(textwrap.dedent(EXAMPLE))
        command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "2 passed" in done.stdout, done.stdout + done.stderr

    def test_imports_late(self):
        """Loading the plugin imports neither SQLAlchemy nor the package, which coverage would miss then."""
        program = "import sys, _kkt_buffer_pytest; print({'sqlalchemy', 'kkt_buffer'} & {*sys.modules})"
        assert "set()\n" == run_python(program).stdout

    def test_without_pytest(self):
        """The helpers serve those who have another test runner."""
        run_python("import sys; sys.modules['pytest'] = None; import kkt_buffer.testing")

    def test_clock(self, kkt_buffer, kkt_clock):
        """The buffer's time is that of the clock."""
        kkt_clock.advance(-5)
        receipt_id = kkt_buffer.insert_receipt(new_receipt())
        assert NOON - 5 == assert_buffered(kkt_buffer, receipt_id).created_at


class TestMemoryEngine:
    def test_schema(self):
        """A copy is what the migrations make, object by object."""
        engine = memory_engine()
        check(engine)
        assert ReceiptRepository(engine).check_integrity().is_sound
        engine.dispose()

    def test_each_its_own(self):
        first, second = memory_engine(), memory_engine()
        ReceiptRepository(first).insert_receipt(new_receipt())
        assert (1, 0) == tuple(ReceiptRepository(each).get_buffer_status().pending for each in (first, second))
        first.dispose()
        second.dispose()

    def test_fast(self):
        """Under 20 ms each, once the first one was made."""
        memory_engine().dispose()
        times = []
        for _ in range(20):
            began = perf_counter()
            memory_engine().dispose()
            times.append(perf_counter() - began)
        assert min(times) < 0.020


class TestFakeOFD:
    def test_accepts(self, kkt_buffer, kkt_clock):
        """It has what it accepted, in the order of sending, and answers with its time."""
        ids = kkt_buffer.insert_receipts(new_receipt() for _ in range(3))
        ofd = FakeOFD(now=kkt_clock)
        assert 3 == drain(kkt_buffer, ofd).count(Outcome.SYNCED)
        assert ids == [receipt.id for receipt in ofd.received]
        assert NOON == assert_buffered(kkt_buffer, ids[0], status="synced").hlc_server_time

    def test_offline(self, kkt_buffer):
        """It can go and come back."""
        receipt_id = kkt_buffer.insert_receipt(new_receipt())
        ofd = FakeOFD(offline=True)
        assert "DeliveryUnavailable: the OFD is offline" == drain(kkt_buffer, ofd).outage
        assert_buffered(kkt_buffer, receipt_id, status="pending")
        ofd.offline = False
        assert drain(kkt_buffer, ofd).outage is None
        assert_buffered(kkt_buffer, receipt_id, status="synced")

    def test_rejects(self, kkt_buffer):
        first, second = kkt_buffer.insert_receipts(new_receipt() for _ in range(2))
        report = drain(kkt_buffer, FakeOFD(reject=[first]))
        assert {first: Outcome.DEAD_LETTERED, second: Outcome.SYNCED} == report.outcomes

    def test_delay(self, kkt_buffer):
        kkt_buffer.insert_receipt(new_receipt())
        began = perf_counter()
        drain(kkt_buffer, FakeOFD(delay=0.05))
        assert perf_counter() - began >= 0.05


class TestDrain:
    def test_more_than_a_batch(self, kkt_buffer):
        kkt_buffer.insert_receipts(new_receipt() for _ in range(120))
        assert 120 == drain(kkt_buffer, FakeOFD()).count(Outcome.SYNCED)

    def test_backoff(self, kkt_buffer, kkt_clock):
        """A receipt in its backoff is not due; the last outcome of each receipt counts."""

        def broken(_receipt):
            raise ArithmeticError

        receipt_id = kkt_buffer.insert_receipt(new_receipt())
        assert {receipt_id: Outcome.RETRY} == drain(kkt_buffer, broken).outcomes
        assert {} == drain(kkt_buffer, FakeOFD()).outcomes
        kkt_clock.advance(300)
        assert {receipt_id: Outcome.SYNCED} == drain(kkt_buffer, FakeOFD()).outcomes


class TestAssertBuffered:
    def test_as_expected(self, kkt_buffer):
        receipt_id = kkt_buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": '{"totalSum":  6490}'})
        expected = {"status": "pending", "pos_id": "till-1"}
        for document in ('{"totalSum":  6490}', {"totalSum": 6490}, None):
            assert receipt_id == assert_buffered(kkt_buffer, receipt_id, fiscal_doc=document, **expected).id

    @pytest.mark.parametrize(
        ("expected", "told"),
        [
            ({"status": "synced"}, "status is 'pending', expected 'synced'"),
            ({"pos_id": "till-2"}, "pos_id is 'till-1', expected 'till-2'"),
            ({"fiscal_doc": "{}"}, "fiscal_doc is "),
            ({"fiscal_doc": {}}, "fiscal_doc is "),
            ({"status": "failed", "pos_id": "x"}, "status is 'pending', expected 'failed', pos_id is 'till-1'"),
        ],
    )
    def test_other(self, kkt_buffer, expected, told):
        receipt_id = kkt_buffer.insert_receipt(new_receipt())
        with pytest.raises(AssertionError, match=f"receipt {receipt_id}: {told}"):
            assert_buffered(kkt_buffer, receipt_id, **expected)

    def test_missing(self, kkt_buffer):
        with pytest.raises(AssertionError, match="receipt x is not in the buffer"):
            assert_buffered(kkt_buffer, "x")


def test_examples():
    """The examples in the documentation run."""
    assert 0 == doctest.testmod(kkt_buffer.testing).failed
