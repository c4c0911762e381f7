"""What the README tells is true: its code runs when pasted, in its order."""

import re
import sys
from pathlib import Path

import predecessor
import pytest
from builders import run_python
from delivery.ofd import OfdServer

from kkt_buffer import ReceiptRepository, errors
from kkt_buffer.config import CONFIG_RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def ofd(monkeypatch):
    """The OFD of the examples."""
    with OfdServer() as server:
        monkeypatch.setenv("OFD_URL", server.url)
        yield server


class TestCode:
    def test_first_block(self, tmp_path):
        """The five lines work by themselves, in an empty folder."""
        assert run_python(BLOCKS[0], cwd=tmp_path).stdout == "{'totalSum': 6490, 'items': []} 1\n"

    def test_all_blocks(self, tmp_path, ofd):
        """So do all blocks in their order; the endpoint takes a receipt, is idempotent, and tells of a full buffer."""
        use = """
import time
from fastapi.testclient import TestClient

with TestClient(app) as client:
    content = '{"sum": 10.10, "q": 0.12345678901234567890}'
    own = "123e4567-e89b-42d3-a456-426614174000"
    for _ in range(2):
        assert client.post(f"/receipts/{own}", content=content).json() == {"id": own}
    assert client.post(f"/receipts/{own}", json={"totalSum": 2}).status_code == 409
    assert buffer.get_receipt_by_id(own).fiscal_doc == content
    assert client.post(f"/receipts/{own[:-1]}1", content='{"totalSum": NaN}').status_code == 422
    assert client.post("/receipts/1", json={"totalSum": 1}).status_code == 422
    buffer.set_config("buffer_capacity", 1)
    refused = client.post(f"/receipts/{own[:-1]}1", json={"totalSum": 1})
    assert refused.status_code == 503 and "Buffer full" in refused.text
    print(buffer.get_buffer_status().total_receipts)
    while buffer.get_buffer_status().synced < 4:
        time.sleep(0.05)
    print(buffer.get_buffer_status().synced)
"""
        assert len(BLOCKS) >= 4
        ofd.answers += [503]
        blocks = [block.replace('__name__ == "__main__"', "False") for block in BLOCKS]
        printed = run_python("\n".join([*blocks, use]), cwd=tmp_path).stdout
        assert '{"totalSum": 10.10,"fiscalDocumentNumber":101,"fiscalSign":3141592653}' in printed.splitlines()
        assert printed.splitlines()[-2:] == ["4", "4"]

    def test_sale(self, tmp_path):
        """What the foreign key of a sale refers to is not pruned; the other receipt is."""
        [sale] = [block for block in BLOCKS if "class Sale" in block]
        use = """
import time
from kkt_buffer import ReceiptRepository

for receipt in buffer.get_pending_receipts():
    buffer.mark_synced(receipt.id, 5)
next_year = ReceiptRepository(buffer.get_db(), now=lambda: time.time() + 366 * 86_400)
print(next_year.prune().receipts, buffer.get_receipt_by_id(receipt_id) is not None)
"""
        printed = run_python("\n".join([BLOCKS[0], sale, use]), cwd=tmp_path).stdout.splitlines()
        assert "1 True" == printed[-1]

    def test_cash(self, tmp_path):
        """The recipe for cash sessions, on a file of the sqlite3 version: both rows, or none."""
        (tmp_path / "data").mkdir()
        predecessor.make(tmp_path / "data" / "buffer.db", 1)
        [recipe] = [block for block in BLOCKS if "cash_transactions" in block]
        use = """
from sqlalchemy.exc import IntegrityError

with buffer.transaction() as session:
    session.execute(text("INSERT INTO pos_sessions VALUES ('till-1', 5)"))
before = buffer.get_buffer_status().total_receipts
sell("till-1", "{}", 100)
try:
    sell("till-2", "{}", 100)  # has no session
except IntegrityError:
    pass
with buffer.transaction() as session:
    print(buffer.get_buffer_status().total_receipts - before)
    print(session.scalar(text("SELECT SUM(amount) FROM cash_transactions WHERE amount = 100")))
"""
        printed = run_python("\n".join([BLOCKS[0], recipe, use]), cwd=tmp_path).stdout.splitlines()
        assert ["1", "100"] == printed[-2:]

    def test_sender(self, tmp_path, ofd):
        """The example's sender: what an OFD answers, and a line that breaks."""
        use = """
def deliver():
    report = buffer.deliver_pending(send, outage=(httpx.TransportError,))
    print(*report.outcomes.values(), report.outage, sep=" | ")
for _ in range(7):
    deliver()
import time
time.sleep(1)
buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": '{"price": 10.10, "text": "хлеб"}'})
deliver()
ofd.close()
buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"})
ofd = httpx.Client(base_url="http://127.0.0.1:1")
deliver()
"""
        later = {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}
        ofd.answers += [500, (503, later), 401, None, (429, {"Retry-After": "1"}), 422, 302]
        printed = run_python("\n".join([BLOCKS[0], BLOCKS[2], use]), cwd=tmp_path).stdout.splitlines()[1:]
        expected = [
            "released | DeliveryUnavailable: HTTP 500",
            "released | DeliveryUnavailable: HTTP 503",
            "released | DeliveryUnavailable: HTTP 401",
            "released | RemoteProtocolError: Server disconnected without sending a response.",
            "released | DeliveryUnavailable: HTTP 429",
            "DeliveryUnavailable: HTTP 429",  # nothing was sent
            "DeliveryUnavailable: HTTP 429",
            "dead_lettered | retry | None",
        ]
        *others, last = printed
        assert expected == others
        assert last.startswith("released | ConnectError: ")
        assert '{"price": 10.10, "text": "хлеб"}'.encode() in ofd.received

    def test_worker(self, tmp_path, ofd):
        """The example's worker runs until it is asked to stop, and is then a program that has done its work."""
        ofd.answers += [503, None]
        use = """
import os, signal, threading, time
def stop():
    while buffer.get_buffer_status().pending:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop).start()
"""
        blocks = [BLOCKS[0], BLOCKS[2], use, BLOCKS[3], "print(buffer.get_buffer_status().synced)"]
        printed = run_python("\n".join(blocks), cwd=tmp_path).stdout.splitlines()
        assert "1" == printed[-1]


class TestTables:
    def test_operations(self):
        """Every operation of the repository has its place."""
        public = [name for name in dir(ReceiptRepository) if not name.startswith("_")]
        assert [] == [name for name in public if not re.search(rf"`{name}[(`]", README)]

    def test_settings(self):
        """Every setting, and its default."""
        for key, rule in CONFIG_RULES.items():
            [line] = [
                line for line in README.splitlines() if line.startswith("|") and f"`{key}`" in line.split(" | ")[0]
            ]
            assert re.search(rf"\b{rule.default}\b", line), key

    def test_errors(self):
        """Every error that an operation can raise."""
        raised = {name for name in vars(errors) if name.endswith("Error") or name.startswith("Delivery")} - {
            "ReceiptBufferError",
            "ClockDriftError",
        }
        assert set() == {name for name in raised if f"`{name}`" not in README}

    def test_targets(self):
        """Every make target that it names exists; so do those that contributors read of, all of them."""
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for words in (README, CONTRIBUTING):
            assert set(re.findall(r"\bmake\s+([a-z]+)\b", words)) - {"it"} <= targets

    def test_links(self):
        """What a document of ours links to is there."""
        for document in (ROOT / "README.md", *(ROOT / ".github").glob("*.md"), ROOT / "tests" / "README.md"):
            links = re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text())
            assert [] == [link for link in links if not (document.parent / link).exists()], document

    def test_python_version(self):
        """The Python that runs this is one that the README allows."""
        assert sys.version_info >= (3, 11)


def test_tests_named():
    """What the README of the tests names is there: files, the tests and classes in them, and folders."""
    tests = Path(__file__).parent
    table = (tests / "README.md").read_text()
    for file, names in re.findall(r"`([a-z_/]+\.py)`(?:: ((?:(?:test_|Test)\w+(?:, )?)+))?", table):
        source = (tests / file).read_text()
        assert [] == [name for name in names.split(", ") if name and not re.search(rf"(def|class) {name}\b", source)]
    assert all((tests / folder).is_dir() for folder in re.findall(r"^\| `(\w+)/`", table, re.MULTILINE))
