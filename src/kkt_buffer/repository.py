"""
`ReceiptRepository`: reading and writing the buffer, one transaction per method, or the one that this thread has open.

Each file here has the operations on one subject. What a status may become is in `models`; counters, events and guards
are triggers, in `schema`; what an argument may be, in `arguments`.
"""

from kkt_buffer.operations.dead_letters import DeadLetters
from kkt_buffer.operations.events import Events
from kkt_buffer.operations.integrity import Integrity, IntegrityReport
from kkt_buffer.operations.leases import Leases
from kkt_buffer.operations.pruning import PruneReport, Pruning
from kkt_buffer.operations.status import BufferStatus

__all__ = ["BufferStatus", "IntegrityReport", "PruneReport", "ReceiptRepository"]


class ReceiptRepository(Leases, DeadLetters, Pruning, Events, Integrity):
    """
    The buffer, for any number of threads.

    `engine` comes from `create_buffer_engine`; `now` is the wall clock, in Unix seconds; `jitter` gives numbers from 0
    to 1, to spread retries. Every method opens a transaction of its own, or joins the one that `transaction()` has open
    in this thread. What is returned is detached and complete.

    Besides what each method names, every one of them raises `BufferStorageError` when the file cannot be read or
    written, and `TypeError` or `ValueError` for an argument of the wrong kind; nothing is changed then.
    """
