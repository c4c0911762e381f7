"""`DeliveryWorker` with 16 senders, each of which waits 5 ms for the OFD, over receipts of 64 tills."""

import time
from itertools import cycle
from threading import Semaphore

from figures import block
from ours_and_floor import Ours, documents

from kkt_buffer import DeliveryWorker

SENDERS = 16
SEND_SECONDS = 0.005
RECEIPTS = 320  # in a round
TILLS = 64  # two receipts of one till are never on their way together


class Worker:
    """A buffer whose receipts a worker delivers, block by block."""

    def __init__(self, path):
        self.ours = Ours(path)
        self.documents = cycle([*documents()])
        self.sent = Semaphore(0)
        self.fill()

    def block(self):
        return block(self.deliver, 1, receipts=RECEIPTS, after=self.after)

    def fill(self):
        self.ours.repository.insert_receipts(
            {"pos_id": f"till-{number % TILLS}", "fiscal_doc": next(self.documents)} for number in range(RECEIPTS)
        )
        self.worker = DeliveryWorker(self.ours.repository, self.send, concurrency=SENDERS)

    def send(self, _receipt):
        time.sleep(SEND_SECONDS)
        self.sent.release()
        return int(time.time())

    def deliver(self):
        """From the start of the worker until the last receipt is recorded."""
        self.worker.start()
        for _ in range(RECEIPTS):
            self.sent.acquire()
        while (status := self.ours.repository.get_buffer_status()).pending + status.syncing:
            time.sleep(0.001)

    def after(self):
        self.worker.stop(10)
        self.fill()

    def close(self):
        self.ours.close()
