"""The figures for Prometheus: the same ones as text and through `prometheus_client`."""

import re
import sys
from pathlib import Path
from time import perf_counter

import pytest
from builders import a_receipt, commits, new_receipt
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kkt_buffer import DeliveryReport, Outcome, deliver_pending
from kkt_buffer.metrics import COUNTER, FIGURES, BufferCollector, as_text
from kkt_buffer.testing import FakeOFD

REFERENCE = (Path(__file__).parents[1] / "src" / "kkt_buffer" / "README.md").read_text()
DAY = 86_400


def values(text):
    """Each sample by its name, with its outcome if it has one."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def collector(repository, clock):
    return BufferCollector(repository, now=clock)


@pytest.fixture
def scrape(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return lambda: generate_latest(registry).decode()


class TestFigures:
    def test_values(self, repository, clock):
        repository.set_config("buffer_capacity", 8)
        for status in ("pending", "syncing", "failed", "synced"):
            a_receipt(repository, status)
        repository.insert_receipt(new_receipt(), hold=True)
        clock.advance(100)
        expected = {
            ("kkt_buffer_percent_full",): 37.5,
            ("kkt_buffer_size",): 3,
            ("kkt_dlq_size",): 1,
            ("kkt_circuit_breaker_state",): 0,
            ("kkt_oldest_undelivered_seconds",): 100,
            ("kkt_deadline_seconds",): 30 * DAY - 100,
        }
        assert expected == values(as_text(repository, clock))

    def test_empty(self, repository, clock):
        """Where nothing waits there is no deadline, so no alert can fire on it."""
        found = values(as_text(repository, clock))
        assert 0 == found["kkt_oldest_undelivered_seconds",]
        assert ("kkt_deadline_seconds",) not in found

    def test_overdue(self, repository, clock):
        a_receipt(repository)
        clock.advance(31 * DAY)
        assert -DAY == values(as_text(repository, clock))["kkt_deadline_seconds",]

    @pytest.mark.parametrize(
        ("events", "state"),
        [([], 0), (["opened"], 1), (["opened", "closed"], 0), (["opened", "closed", "opened"], 1), (["closed"], 0)],
    )
    def test_circuit(self, repository, clock, events, state):
        """The last event of a breaker tells its state, in whichever process it runs."""
        for event in events:
            repository.log_event(f"circuit_{event}")
        assert state == values(as_text(repository, clock))["kkt_circuit_breaker_state",]

    def test_lock_nobody(self, shared_engine, shared_repository, clock):
        """A scrape inside another's write transaction waits for nothing and commits nothing."""
        with shared_engine.connect() as writer, writer.begin():
            writer.exec_driver_sql("UPDATE config SET value = '100' WHERE key = 'buffer_capacity'")
            with commits(shared_engine) as seen:
                assert as_text(shared_repository, clock)
            assert [] == seen

    def test_cheap(self, file_repository, clock):
        """Of a file in less than a millisecond, as the best of many, whatever else this machine does."""
        file_repository.insert_receipts(new_receipt() for _ in range(100))
        times = []
        for _ in range(200):
            began = perf_counter()
            as_text(file_repository, clock)
            times.append(perf_counter() - began)
        assert min(times) < 0.001


class TestCollector:
    def test_same_figures(self, repository, collector, scrape, clock):
        """What is scraped is what the command prints, and the counters of this process."""
        a_receipt(repository)
        found = values(scrape())
        counters = {sample for sample in found if sample[0].startswith(COUNTER)}
        assert values(as_text(repository, clock)) == {key: found[key] for key in found.keys() - counters}
        assert {(f"{COUNTER}_total", str(outcome)) for outcome in Outcome} == counters

    def test_outcomes(self, repository, collector, scrape):
        """Outcomes are added up over the reports."""
        ids = [repository.insert_receipt(new_receipt()) for _ in range(3)]
        ofd = FakeOFD(reject=ids[:1], offline=True)
        collector(deliver_pending(repository, ofd))
        ofd.offline = False
        collector(deliver_pending(repository, ofd))
        collector(DeliveryReport({"x": Outcome.SYNCED}))
        collector(DeliveryReport({"y": Outcome.SYNCED}))
        found = values(scrape())
        counts = {str(outcome): found[f"{COUNTER}_total", str(outcome)] for outcome in Outcome}
        assert {"synced": 4, "dead_lettered": 1, "released": 3, "retry": 0, "lease_lost": 0} == counts

    def test_registering_reads_nothing(self, open_engine, tmp_path):
        """A service may register its metrics before its buffer is upgraded."""
        from kkt_buffer import ReceiptRepository  # noqa: PLC0415

        CollectorRegistry().register(BufferCollector(ReceiptRepository(open_engine(tmp_path / "new.db"))))

    def test_without_the_extra(self, repository, monkeypatch):
        """Told when it is made, with what to install."""
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'kkt-buffer\[prometheus\]'"):
            BufferCollector(repository)


def test_alert_rules():
    """The rules in the reference name figures that there are."""
    [rules] = re.findall(r"```yaml\n(groups:.*?)```", REFERENCE, re.DOTALL)
    named = set(re.findall(r"\bkkt_\w+", rules))
    assert named <= {figure.name for figure in FIGURES} | {f"{COUNTER}_total"}
    assert {"kkt_buffer_percent_full", "kkt_dlq_size", "kkt_deadline_seconds", "kkt_circuit_breaker_state"} <= named
