"""
A day of a buffer, through the public API alone: `python -m crash.writer DATABASE ACKNOWLEDGED DAY [FAULT]`.

Runs under strace. After each call that has returned, one line in ACKNOWLEDGED says what is true from now on: a JSON
list with the facts that each transaction has changed. Each till is a thread of its own with receipts of its own, so
that the changes of one receipt come one after another. A FAULT takes away one thing that durability stands on.
"""

import json
import os
import sys
import threading
import time
import uuid

from crash.facts import Story, digest

from kkt_buffer import DeliveryRejected, ReceiptRepository, buffer, migrate
from kkt_buffer.sqlite import database, file

TILLS = 3
ROUNDS = 2
DAY = 86_400
SERVER_TIME = 1_772_366_405
ANNA = {"actor": "Anna", "reason": "because"}
EARLY = "acknowledged before the commit"


def normal_synchronous():
    """A commit is in the kernel's hands, not on disk."""
    relaxed = {"synchronous": {"value": "NORMAL", "reads": 1}}
    database.DURABLE = tuple(pragma._replace(**relaxed.get(pragma.name, {})) for pragma in database.DURABLE)


def unsynced_folders():
    """A new folder's name may be lost."""
    file.sync_folder = lambda folder: None


FAULTS = {"": lambda: None, "synchronous=NORMAL": normal_synchronous, "folders not synced": unsynced_folders}
FAULTS[EARLY] = lambda: None


class Day:
    """The buffer that is worked on, and what should be in it."""

    def __init__(self, database, acknowledged, *, early):
        self.database = database
        self.acknowledged = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.early = early
        self.stories = {}

    def acknowledge(self, *transactions):
        """One line, by one write."""
        os.write(self.acknowledged, json.dumps(transactions).encode() + b"\n")

    def do(self, work, *told):
        """Work, then acknowledge what each of `told` makes of the result; the fault is to do so before the commit."""
        if self.early:
            with buffer.transaction():
                result = work()
                self.acknowledge(*(tell(result) for tell in told))
        else:
            result = work()
            self.acknowledge(*(tell(result) for tell in told))
        return result

    def open(self):
        buffer.init_buffer_db(self.database)
        self.acknowledge({"schema": migrate.revisions()[-1]})
        self.repository = ReceiptRepository(buffer.get_db())

    def set_config(self, key, value):
        self.do(lambda: buffer.set_config(key, value), lambda _: {f"config:{key}": str(value)})

    # New receipts.

    def new(self, pos_id, size):
        document = json.dumps({"user": 'ООО "Ромашка"', "n": os.urandom(size // 2).hex()}, ensure_ascii=False)
        receipt = {"id": str(uuid.uuid4()), "pos_id": pos_id, "fiscal_doc": document}
        self.stories[receipt["id"]] = Story(pos_id, digest(document))
        return receipt

    def told(self, receipt_ids):
        return {receipt_id: self.stories[receipt_id].told() for receipt_id in receipt_ids}

    def insert(self, pos_id, size=600):
        receipt = self.new(pos_id, size)
        self.do(lambda: buffer.insert_receipt(receipt), lambda receipt_id: self.told([receipt_id]))
        self.note_hlc([receipt["id"]])

    def insert_some(self, pos_id):
        receipts = [self.new(pos_id, 900) for _ in range(4)]
        self.note_hlc(self.do(lambda: buffer.insert_receipts(receipts), self.told))

    def insert_with_own_rows(self, pos_id):
        """Receipts, an event and a setting of the service's own in one transaction."""
        receipts = [self.new(pos_id, 300) for _ in range(2)]
        ids = [receipt["id"] for receipt in receipts]

        def work():
            with buffer.transaction():
                for receipt in receipts:
                    buffer.insert_receipt(receipt)
                buffer.set_config(f"last of {pos_id}", ids[-1])
                return buffer.log_event("sync_started", metadata={"till": pos_id})

        own = {f"config:last of {pos_id}": ids[-1]}
        self.do(work, lambda number: self.told(ids) | own | {f"event:{number}": "sync_started"})
        self.note_hlc(ids)

    def note_hlc(self, receipt_ids):
        """On a line of its own: an acknowledgement should come as soon as it can."""
        receipts = [buffer.get_receipt_by_id(receipt_id) for receipt_id in receipt_ids]
        self.acknowledge({f"hlc:{one.id}": [one.hlc_local_time, one.hlc_logical_counter] for one in receipts})

    # Delivery and dead letters.

    def change(self, receipt_id, work, changed):
        def tell(_):
            changed(self.stories[receipt_id])
            return self.told([receipt_id])

        self.do(work, tell)

    def claim(self, pos_id, limit):
        def tell(receipts):
            for receipt in receipts:
                self.stories[receipt.id].claimed(receipt.lease_token)
            return self.told(receipt.id for receipt in receipts)

        return self.do(lambda: self.repository.claim_pending(limit, pos_id=pos_id), tell)

    def settle(self, number, one, token):
        """Another end for each of the receipts that a worker has claimed."""
        if number == 0:
            self.change(one, lambda: buffer.mark_synced(one, SERVER_TIME), lambda story: story.synced(SERVER_TIME))
        elif number == 1:
            failed = "no answer"
            self.change(
                one, lambda: self.repository.record_failure(one, failed, token), lambda story: story.attempted(failed)
            )
        elif number == 2:
            self.give_up(one, "rejected")
        elif number == 3:
            self.give_up(one, "the tax table is wrong")
            self.change(one, lambda: buffer.requeue(one, **ANNA), Story.requeued)
            self.change(one, lambda: buffer.mark_synced(one, SERVER_TIME), lambda story: story.synced(SERVER_TIME))
        elif number == 4:
            self.give_up(one, "a test")
            self.change(one, lambda: buffer.resolve(one, **ANNA), Story.resolved)
        else:
            self.change(one, lambda: self.repository.release(one, token), Story.released)

    def give_up(self, one, reason):
        self.change(one, lambda: buffer.move_to_dlq(one, reason), lambda story: story.failed(reason))

    def deliver(self):
        """One receipt at a time: what the sender sees is claimed, and that is acknowledged too."""
        for answer in (SERVER_TIME, DeliveryRejected("no"), SERVER_TIME, SERVER_TIME):
            sent = []

            def send(receipt, answer=answer, sent=sent):
                sent.append(receipt.id)
                self.stories[receipt.id].claimed(receipt.lease_token)
                self.acknowledge(self.told(sent), self.last_event("sync_started"))
                if isinstance(answer, Exception):
                    raise answer
                return answer

            buffer.deliver_pending(send, 1)
            if isinstance(answer, Exception):
                self.stories[sent[0]].failed(f"rejected by the OFD: DeliveryRejected: {answer}")
            else:
                self.stories[sent[0]].synced(answer)
            self.acknowledge(self.told(sent), self.last_event("sync_completed"))

    @staticmethod
    def last_event(kind):
        return {f"event:{buffer.get_events(1, event_type=kind)[0].id}": kind}

    def requeue_all(self):
        def tell(_):
            letters = [one for one, story in self.stories.items() if story.letters and story.letters[-1][1] is None]
            for one in letters:
                self.stories[one].requeued()
            return self.told(letters)

        self.do(lambda: self.repository.requeue_all(**ANNA), tell)

    def prune(self):
        """A hundred days on: closed dead letters go, then what was resolved, then what was delivered, then events."""
        old = ReceiptRepository(buffer.get_db(), now=lambda: time.time() - 95 * DAY)
        numbers = [self.do(lambda: old.log_event("sync_completed"), lambda n: {f"event:{n}": "sync_completed"})]
        numbers.append(self.do(lambda: old.log_event("sync_failed"), lambda n: {f"event:{n}": "sync_failed"}))
        self.insert("the last one stays")
        later = ReceiptRepository(buffer.get_db(), now=lambda: time.time() + 100 * DAY)

        def forget(ids):
            return {one: {"events": self.stories.pop(one).events} for one in ids} | {f"hlc:{one}": None for one in ids}

        def history(_):
            told = []
            for one, story in self.stories.items():
                if story.status != "failed" and story.letters:
                    story.letters.clear()
                    told.append(one)
            return self.told(told)

        def resolved(_):
            return forget(
                [one for one, story in self.stories.items() if story.status == "failed" and story.letters[-1][1]]
            )

        def delivered(_):
            return forget([one for one, story in self.stories.items() if story.status == "synced"])

        self.do(later.prune, history, resolved, delivered, lambda _: dict.fromkeys(f"event:{n}" for n in numbers))

    # The day.

    def till(self, pos_id):
        for _ in range(ROUNDS):
            self.insert(pos_id)
            self.insert(pos_id, 2500)
            self.insert_some(pos_id)
            self.insert_with_own_rows(pos_id)
            for number, receipt in enumerate(self.claim(pos_id, 6)):
                self.settle(number, receipt.id, receipt.lease_token)

    def tills(self):
        """All at once."""
        errors = []

        def work(pos_id):
            try:
                self.till(pos_id)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(f"till-{number}",)) for number in range(TILLS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def long_reader(self):
        """While somebody reads, the WAL cannot start afresh: it grows over its limit, and is cut back after it."""
        with buffer.get_db().execution_options(kkt_buffer_read_only=True).connect() as reader:
            reader.exec_driver_sql("SELECT COUNT(*) FROM receipts").scalar()
            for _ in range(20):
                self.insert("till-0", 40_000)

    def upgrade(self):
        """On a buffer of the earlier release, with receipts of its own."""
        self.open()
        self.set_config("buffer_capacity", 10_000)
        self.tills()
        buffer.close_buffer_db()

    def first_start(self):
        """A new buffer, and all that one can do with it."""
        self.upgrade()
        self.open()
        self.deliver()
        self.long_reader()
        self.requeue_all()
        self.prune()
        self.insert("till-1", 3000)
        self.insert_some("till-1")
        buffer.close_buffer_db()


def main(database, acknowledged, day, fault=""):
    FAULTS[fault]()
    {"first start": Day.first_start, "upgrade": Day.upgrade}[day](Day(database, acknowledged, early=fault == EARLY))


if __name__ == "__main__":
    main(*sys.argv[1:])
