"""
Print first, then deliver: SIGKILL between insert, print and completion, at every step and at random.

The register is simulated by a journal of its own: a print is a line of it, on disk when the register answers. After a
restart the service asks it about each held receipt. The journals of the registers and of the OFD, and what the tills
say they stored, are held against each other and against the buffer. `KKT_BUFFER_PROOF=1` plays 200 rounds at random.
"""

import contextlib
import json
import random
from collections import Counter

import pytest
from builders import PROOF, start_python

from kkt_buffer import ReceiptRepository, create_buffer_engine

ROUNDS = 200 if PROOF else 10
TILLS = ("till-1", "till-2")
DRAFT = '{"totalSum": 10.10, "fiscalSign": null }'

# Each line of its input is a round, played by a forked child. "sale STEP": one thread settles what was left behind,
# sells and delivers, and dies at that step or comes to its end. "restart STEP": the same without a sale, but it finds
# two held receipts, one of them printed. "load SECONDS": several threads, until then. A step is a statement that
# writes, begins or commits, or a moment before, in or after a write into a journal.
LAUNCHER = """
import contextlib, json, logging, os, random, signal, sys, threading, time, uuid
from sqlalchemy import event
from kkt_buffer import InvalidTransitionError, ReceiptRepository, create_buffer_engine, deliver_pending

path, folder, fault = sys.argv[1:]
draft = '{"totalSum": 10.10, "fiscalSign": null }'
step = last = 0
logging.disable()


def count(statement=""):
    global step
    if not statement.startswith(("SELECT", "PRAGMA", "--")):
        step += 1
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)


class Journal:
    def __init__(self, name):
        self.file = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def write(self, line):
        count()
        os.write(self.file, f"{json.dumps(line)}\\n".encode())
        count()
        os.fsync(self.file)
        count()

    def read(self):
        size = os.fstat(self.file).st_size
        return [json.loads(line) for line in os.pread(self.file, size, 0).splitlines()]


class Register:
    def __init__(self, pos_id):
        self.journal = Journal(f"{pos_id}.register")

    def ask(self, receipt_id):
        return next((fields for printed, fields in self.journal.read() if printed == receipt_id), None)

    def next_fields(self):
        number = len(self.journal.read()) + 1
        return {"fiscalDocumentNumber": number, "fiscalSign": 3141592653 - number}

    def print(self, receipt_id):
        fields = self.next_fields()
        self.journal.write([receipt_id, fields])
        return fields


class Till:
    def __init__(self, repository, pos_id, seed):
        self.repository, self.pos_id, self.chance = repository, pos_id, random.Random(seed)
        self.register, self.books = Register(pos_id), Journal(f"{pos_id}.books")

    def start(self):
        for receipt in self.repository.list_held(pos_id=self.pos_id) if fault != "forgets" else ():
            fields = self.register.ask(receipt.id) if fault != "does not ask" else None
            if fields or self.chance.random() < 0.7:
                self.complete(receipt.id, fields)
            else:
                self.repository.discard_held(receipt.id, actor=self.pos_id, reason="the customer has left")

    def complete(self, receipt_id, fields):
        if fault == "completes before the print" and fields is None:
            self.repository.update_receipt_fiscal_doc(receipt_id, self.register.next_fields())
            self.register.print(receipt_id)
            return
        fields = fields or self.register.print(receipt_id)
        with contextlib.suppress(InvalidTransitionError if fault == "does not hold" else ()):
            self.repository.update_receipt_fiscal_doc(receipt_id, fields)

    def store(self):
        receipt = {"id": str(uuid.uuid4()), "pos_id": self.pos_id, "fiscal_doc": draft}
        self.repository.insert_receipt(receipt, hold=fault != "does not hold")
        self.books.write(receipt["id"])
        return receipt["id"]

    def sell(self):
        self.complete(self.store(), None)


def deliver(repository):
    ofd = Journal("ofd")

    def send(receipt):
        ofd.write([receipt.id, receipt.fiscal_doc])
        return int(time.time())

    while deliver_pending(repository, send).outcomes:
        pass


def forever(work):
    while True:
        work()


def play(number, kind, end):
    global step, last
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine, now=lambda: time.time() + 100 * number)  # the leases of the dead are over
    tills = [Till(repository, pos_id, number) for pos_id in ("till-1", "till-2")]
    if kind == "restart":
        tills[0].register.print(tills[0].store())
        tills[0].store()
    if kind != "load":
        repository.get_buffer_status()
        event.listen(engine, "checkout", lambda connection, *_: connection.set_trace_callback(count))
        step, last = 0, end
    for till in tills:
        till.start()
    if kind == "load":
        for till in tills:
            threading.Thread(target=forever, args=(till.sell,), daemon=True).start()
        forever(lambda: (deliver(repository), time.sleep(0.01)))
    if kind == "sale":
        tills[0].sell()
    deliver(repository)


for number, line in enumerate(sys.stdin):
    kind, end = line.split()
    child = os.fork()
    if child == 0:
        try:
            play(number, kind, float(end))
            os._exit(0)
        finally:
            os._exit(1)
    if kind == "load":
        time.sleep(float(end))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Shop:
    """A buffer, the service that is killed over it, and the journals of its registers and of the OFD."""

    def __init__(self, stack, path, folder, fault="nothing"):
        self.path, self.folder = path, folder
        self.engine = create_buffer_engine(path)
        stack.callback(self.engine.dispose)
        self.repository = ReceiptRepository(self.engine)
        self.repository.set_config("buffer_capacity", 1000)
        self.engine.dispose()
        self.launcher = stack.enter_context(start_python(LAUNCHER, path, folder, fault, stdin=-1))
        stack.callback(self.launcher.kill)

    def play(self, kind, end=0):
        """One round; returns whether it was killed."""
        self.launcher.stdin.write(f"{kind} {end}\n")
        self.launcher.stdin.flush()
        result = int(self.launcher.stdout.readline())
        assert result in {0, -9}, "the service has met an error"
        return result == -9

    def play_steps(self, kind):
        """Kill a round at each of its steps; a whole one follows each. Returns how many steps there are."""
        step = 1
        while self.play(kind, step):
            self.check()
            assert not self.play("sale")
            self.check()
            step += 1
        return step - 1

    def journal(self, name):
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def check(self):
        """Hold the journals of the registers and of the OFD against each other; returns what was printed."""
        prints = [line for till in TILLS for line in self.journal(f"{till}.register")]
        times = Counter(receipt_id for receipt_id, _ in prints)
        assert [] == [receipt_id for receipt_id, many in times.items() if many > 1], "printed twice"
        printed = dict(prints)
        for receipt_id, document in self.journal("ofd"):
            assert receipt_id in printed, "an unprinted document was sent"
            fields = printed[receipt_id]
            expected = DRAFT.replace("null", str(fields["fiscalSign"]))
            expected = expected.replace("}", f',"fiscalDocumentNumber":{fields["fiscalDocumentNumber"]}}}')
            assert expected == document, "another document was sent than was printed"
        return set(printed)

    def close(self):
        """Play a last round to its end, and hold the journals against the buffer; returns what was discarded."""
        assert not self.play("sale")
        printed = self.check()
        letters = self.repository.list_dead_letters(open_only=False, limit=9999)
        discarded = {letter.original_receipt_id for letter in letters}
        sent = {receipt_id for receipt_id, _ in self.journal("ofd")}
        stored = {receipt_id for till in TILLS for receipt_id in self.journal(f"{till}.books")}
        assert stored <= sent | discarded, "a stored receipt was neither delivered nor discarded"
        assert printed == sent, "a printed receipt was not delivered"
        assert set() == sent & discarded, "delivered, and discarded"
        status = self.repository.get_buffer_status()
        assert (0, 0, 0) == (status.pending, status.syncing, status.held)
        assert "" == str(self.repository.check_integrity())
        print(f"{len(stored)} stored, {len(printed)} printed and delivered, {len(discarded)} discarded")
        return discarded


@pytest.fixture
def open_shop(path, tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda fault="nothing": Shop(stack, path, tmp_path, fault)


@pytest.mark.slow
class TestPrinting:
    @pytest.mark.parametrize("kind", ["sale", "restart"])
    def test_every_step(self, open_shop, kind):
        """Killed at each step: nothing stored is lost, nothing unprinted is sent, nothing is printed twice."""
        shop = open_shop()
        steps = shop.play_steps(kind)
        print(f"{kind}: {steps} steps")
        assert steps > 20
        assert shop.close() or kind == "sale"  # where nothing need be discarded

    def test_any_moment(self, open_shop):
        """So with several tills and a worker side by side, killed at any moment."""
        shop, chance = open_shop(), random.Random()
        for _ in range(ROUNDS):
            assert shop.play("load", chance.uniform(0.05, 0.6))
            shop.check()
        shop.close()

    @pytest.mark.parametrize(
        ("fault", "found"),
        [
            ("completes before the print", "an unprinted document was sent"),
            ("does not hold", "an unprinted document was sent|another document was sent than was printed"),
            ("does not ask", "printed twice"),
            ("forgets", "a stored receipt was neither delivered nor discarded"),
        ],
    )
    def test_would_be_found(self, open_shop, fault, found):
        """The same check does find a service that is wrong."""
        shop = open_shop(fault)
        with pytest.raises(AssertionError, match=found):
            shop.play_steps("sale")
            shop.close()
