"""
Helpers for the tests of a service: a clock, a buffer in memory, an OFD that fails on demand. pytest is not needed.

With pytest, the fixtures `kkt_buffer` (a repository) and `kkt_clock` are there by themselves.
"""

import atexit
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Engine

from kkt_buffer.delivery import DeliveryReport, Outcome, Send, deliver_pending
from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.errors import DeliveryRejected, DeliveryUnavailable
from kkt_buffer.migrate import upgrade
from kkt_buffer.models import Receipt
from kkt_buffer.repository import ReceiptRepository

if TYPE_CHECKING:
    import sqlite3

NOON = 1_772_366_400  # 2026-03-01 12:00 UTC


@dataclass
class Clock:
    """
    A wall clock that stands still until a test moves it, in Unix seconds.

    >>> clock = Clock()
    >>> clock.advance(60)
    >>> clock() - NOON
    60
    """

    seconds: float = NOON

    def __call__(self) -> float:
        """The current time."""
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Move the clock; back, if `seconds` is negative."""
        self.seconds += seconds


def memory_engine() -> Engine:
    """
    An engine on a new, empty buffer in memory, with the schema of this release. `dispose()` deletes it.

    The migrations run once per process; each buffer is a copy of the first one, in a few milliseconds.

    >>> engine = memory_engine()
    >>> engine.dispose()
    """
    engine = create_buffer_engine(":memory:")
    with (
        contextlib.closing(_template().raw_connection()) as template,
        contextlib.closing(engine.raw_connection()) as copy,
    ):
        cast("sqlite3.Connection", template.driver_connection).backup(
            cast("sqlite3.Connection", copy.driver_connection)
        )
    return engine


@cache
def _template() -> Engine:
    """A buffer in memory that was made by the migrations and is never used but to be copied."""
    engine = create_buffer_engine(":memory:")
    atexit.register(engine.dispose)
    upgrade(engine)
    return engine


class FakeOFD:
    """
    A sender that plays the OFD: give it to `deliver_pending` or to a worker.

    While `offline` is true, it raises `DeliveryUnavailable`. It rejects the receipts whose ids are in `reject`, with
    `DeliveryRejected`. It answers after `delay` seconds with the time of `now`. All of them may be changed meanwhile.
    `received` has each receipt that it accepted, as often as it was sent.

    >>> ofd = FakeOFD(offline=True)
    >>> repository = ReceiptRepository(memory_engine())
    >>> receipt_id = repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
    >>> deliver_pending(repository, ofd).outage
    'DeliveryUnavailable: the OFD is offline'
    >>> ofd.offline = False
    >>> drain(repository, ofd).count(Outcome.SYNCED)
    1
    >>> [receipt.id == receipt_id for receipt in ofd.received]
    [True]
    """

    def __init__(
        self,
        *,
        offline: bool = False,
        reject: Iterable[str] = (),
        delay: float = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.offline = offline
        self.reject = set(reject)
        self.delay = delay
        self.now = now
        self.received: list[Receipt] = []

    def __call__(self, receipt: Receipt) -> int:
        """Accept the receipt and return the time of the OFD, or raise."""
        if self.delay:
            time.sleep(self.delay)
        if self.offline:
            raise DeliveryUnavailable("the OFD is offline")
        if receipt.id in self.reject:
            raise DeliveryRejected("the OFD rejects this receipt")
        self.received.append(receipt)
        return int(self.now())


def drain(repository: ReceiptRepository, send: Send) -> DeliveryReport:
    """
    Deliver until nothing is due any more, or the OFD is down; returns all outcomes, the last one of each receipt.

    Receipts in their backoff are not due: advance the clock, and drain again.
    """
    outcomes: dict[str, Outcome] = {}
    while (report := deliver_pending(repository, send)).outcomes and report.outage is None:
        outcomes |= report.outcomes
    return DeliveryReport(outcomes | report.outcomes, report.outage)


def assert_buffered(
    repository: ReceiptRepository,
    receipt_id: str,
    *,
    status: str | None = None,
    pos_id: str | None = None,
    fiscal_doc: str | Mapping[str, Any] | None = None,
) -> Receipt:
    """
    Assert that the receipt is stored, intact, and as expected where something is given; returns it.

    A `fiscal_doc` as text must be stored byte for byte; a mapping is compared with the decoded document.
    """
    receipt = repository.get_receipt_by_id(receipt_id)
    if receipt is None:
        raise AssertionError(f"receipt {receipt_id} is not in the buffer")
    found: dict[str, object] = {"intact": receipt.is_intact}
    expected: dict[str, object] = {"intact": True}
    if status is not None:
        expected["status"], found["status"] = status, str(receipt.status)
    if pos_id is not None:
        expected["pos_id"], found["pos_id"] = pos_id, receipt.pos_id
    if isinstance(fiscal_doc, str):
        expected["fiscal_doc"], found["fiscal_doc"] = fiscal_doc, receipt.fiscal_doc
    elif fiscal_doc is not None:
        expected["fiscal_doc"], found["fiscal_doc"] = json.loads(json.dumps(fiscal_doc)), receipt.document
    if expected != found:
        different = ", ".join(
            f"{name} is {found[name]!r}, expected {expected[name]!r}"
            for name in expected
            if expected[name] != found[name]
        )
        raise AssertionError(f"receipt {receipt_id}: {different}")
    return receipt
