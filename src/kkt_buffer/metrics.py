"""
The figures of a buffer for Prometheus.

`as_text` needs nothing but this package; `BufferCollector` needs the extra `prometheus`. Both read `FIGURES`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from kkt_buffer.delivery import DeliveryReport, Outcome
from kkt_buffer.operations.status import BufferStatus
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    from prometheus_client import Metric

COUNTER = "kkt_deliveries"
COUNTER_HELP = "Receipts that this process has tried to deliver, by outcome."


class Moment(NamedTuple):
    """What the figures are made of. `now` is in Unix seconds."""

    status: BufferStatus
    now: float


class Figure(NamedTuple):
    """One gauge. `value` is None where there is nothing to tell; then the gauge is left out."""

    name: str
    help: str
    value: Callable[[Moment], float | None]


def _age(moment: Moment) -> float:
    oldest = moment.status.oldest_undelivered_at
    return 0 if oldest is None else moment.now - oldest


def _left(moment: Moment) -> float | None:
    deadline = moment.status.deadline_at
    return None if deadline is None else deadline - moment.now


FIGURES = (
    Figure(
        "kkt_buffer_percent_full",
        "Undelivered receipts in percent of the capacity; at 100 the till refuses receipts.",
        lambda moment: moment.status.percent_full,
    ),
    Figure(
        "kkt_buffer_size",
        "Undelivered receipts: pending, held, or with a worker.",
        lambda moment: moment.status.undelivered,
    ),
    Figure("kkt_dlq_size", "Open dead letters, which wait for a person.", lambda moment: moment.status.dlq_size),
    Figure(
        "kkt_circuit_breaker_state",
        "0: closed, receipts are sent. 1: open, the OFD is only probed.",
        lambda moment: int(moment.status.circuit_opened_at is not None),
    ),
    Figure("kkt_oldest_undelivered_seconds", "Age of the oldest receipt that the OFD does not have; 0: none.", _age),
    Figure(
        "kkt_deadline_seconds",
        "Time left to deliver the oldest receipt, negative when it is over; absent if there is none.",
        _left,
    ),
)


def figures(repository: ReceiptRepository, now: Callable[[], float] = time.time) -> Iterator[tuple[Figure, float]]:
    """The current values, from one read transaction. Takes no lock."""
    moment = Moment(repository.get_buffer_status(), now())
    for figure in FIGURES:
        value = figure.value(moment)
        if value is not None:
            yield figure, value


def as_text(repository: ReceiptRepository, now: Callable[[], float] = time.time) -> str:
    """The current values in the text format of Prometheus, for its textfile collector."""
    return "".join(
        f"# HELP {figure.name} {figure.help}\n# TYPE {figure.name} gauge\n{figure.name} {float(value)!r}\n"
        for figure, value in figures(repository, now)
    )


class BufferCollector:
    """
    A collector for `prometheus_client`: the figures of a buffer, read at each scrape, and counts of outcomes.

    Call it with the report of each delivery, or let the worker do so. `now` is the wall clock, in Unix seconds. Raises
    `ModuleNotFoundError` if the extra `prometheus` is not installed.

        REGISTRY.register(collector := BufferCollector(repository))
        collector(deliver_pending(repository, send))
    """

    def __init__(self, repository: ReceiptRepository, *, now: Callable[[], float] = time.time) -> None:
        try:
            from prometheus_client import core  # noqa: PLC0415 (an extra)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "BufferCollector needs prometheus-client: pip install 'kkt-buffer[prometheus]'. Without it, "
                "`kkt-buffer metrics` prints the same gauges.",
                name=error.name,
            ) from error
        self._core = core
        self._repository = repository
        self._now = now
        self._outcomes = Counter[Outcome]()

    def __call__(self, report: DeliveryReport) -> None:
        """Count the outcomes of a report."""
        self._outcomes.update(report.outcomes.values())

    def describe(self) -> Iterator["Metric"]:
        """The metrics without values: registering does not read the buffer."""
        for figure in FIGURES:
            yield self._core.GaugeMetricFamily(figure.name, figure.help)
        yield self._core.CounterMetricFamily(COUNTER, COUNTER_HELP, labels=["outcome"])

    def collect(self) -> Iterator["Metric"]:
        """The metrics with their current values."""
        for figure, value in figures(self._repository, self._now):
            yield self._core.GaugeMetricFamily(figure.name, figure.help, value=value)
        deliveries = self._core.CounterMetricFamily(COUNTER, COUNTER_HELP, labels=["outcome"])
        for outcome in Outcome:
            deliveries.add_metric([outcome], self._outcomes[outcome])
        yield deliveries
