"""
What is known of a buffer, as plain JSON by key: in these words the writer acknowledges and a disk image is read.

The keys are `schema` (the revision), `objects` (tables, triggers and so on), `config:KEY`, `event:NUMBER`, `hlc:ID`
and, for all there is about a receipt in every table, its id.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Engine, text

Facts = dict[str, Any]


@dataclass
class Story:
    """All there is about one receipt, which is written in one transaction or not at all."""

    pos_id: str
    document: str
    status: str = "pending"
    retry_count: int = 0
    last_error: str | None = None
    lease_token: str | None = None
    server_time: int | None = None
    letters: list[list[str | None]] = field(default_factory=list)  # reason and resolution, oldest first
    events: list[str] = field(default_factory=lambda: ["receipt_added"])

    def told(self):
        return asdict(self)

    def claimed(self, token):
        self.status, self.lease_token = "syncing", token

    def released(self):
        self.status, self.lease_token = "pending", None

    def attempted(self, error):
        self.released()
        self.retry_count, self.last_error = self.retry_count + 1, error
        self.events.append("receipt_attempt_failed")

    def synced(self, server_time):
        self.released()
        self.status, self.server_time = "synced", server_time
        self._close_letter("delivered")
        self.events.append("receipt_synced")

    def failed(self, reason):
        self.released()
        self.status = "failed"
        self.letters.append([reason, None])
        self.events.append("receipt_failed")

    def requeued(self):
        self.status, self.retry_count = "pending", 0
        self._close_letter("requeued")
        self.events.append("receipt_requeued")

    def resolved(self):
        self._close_letter("resolved")
        self.events.append("receipt_resolved")

    def _close_letter(self, how):
        if self.letters and self.letters[-1][1] is None:
            self.letters[-1][1] = how


def digest(document: str) -> str:
    """Stands for the text of a document, which must be kept byte for byte."""
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def found(engine: Engine) -> Facts:
    """What the buffer holds, but for the revision, which only tells something before `init_buffer_db` is through."""
    facts: Facts = {}
    with engine.execution_options(kkt_buffer_read_only=True).connect() as connection:

        def rows(statement):
            return connection.execute(text(statement)).all()

        facts["objects"] = [list(row) for row in rows("SELECT type, name, sql FROM sqlite_master ORDER BY type, name")]
        for key, value in rows("SELECT key, value FROM config"):
            facts[f"config:{key}"] = value
        for row in rows("SELECT * FROM receipts ORDER BY rowid"):
            facts[f"hlc:{row.id}"] = [row.hlc_local_time, row.hlc_logical_counter]
            facts[row.id] = Story(
                row.pos_id,
                digest(row.fiscal_doc),
                row.status,
                row.retry_count,
                row.last_error,
                row.lease_token,
                row.hlc_server_time,
                events=[],
            ).told()
        for receipt_id, *letter in rows("SELECT original_receipt_id, reason, resolution FROM dlq ORDER BY rowid"):
            facts[receipt_id]["letters"].append(letter)
        for number, kind, receipt_id in rows("SELECT id, event_type, receipt_id FROM buffer_events ORDER BY id"):
            if receipt_id is None:
                facts[f"event:{number}"] = kind
            else:
                facts.setdefault(receipt_id, {"events": []})["events"].append(kind)
    return facts
