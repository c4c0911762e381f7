"""What the documents tell is true: their code runs when pasted, in its order."""

import re
import sys
from pathlib import Path

import predecessor
import pytest
from builders import run_python
from delivery.ofd import OfdServer

from kkt_buffer import DeadLetter, Receipt, ReceiptRepository, errors
from kkt_buffer.config import CONFIG_RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "src" / "kkt_buffer" / "README.md").read_text()
MIGRATIONS = (ROOT / "migrations" / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(ROOT / ".github").glob("*.md"),
    *(
        ROOT / folder / "README.md"
        for folder in ("migrations", "src/kkt_buffer", "src/kkt_buffer/postgresql", "src/kkt_buffer/sqlite", "tests")
    ),
]


def blocks_of(document):
    return re.findall(r"```python\n(.*?)```", document, re.DOTALL)


BLOCKS = blocks_of(README)


@pytest.fixture
def ofd(monkeypatch):
    """The OFD of the examples."""
    with OfdServer() as server:
        monkeypatch.setenv("OFD_URL", server.url)
        yield server


class TestReadme:
    def test_length(self):
        """A stranger reads it in five minutes."""
        assert len(README.splitlines()) <= 200

    def test_first_block(self, tmp_path):
        """The first lines work by themselves, in an empty folder."""
        assert re.fullmatch(r"[0-9a-f-]{36} 1\n", run_python(BLOCKS[0], cwd=tmp_path).stdout)

    def test_all_blocks(self, tmp_path, ofd):
        """All blocks work in their order; the endpoint takes a receipt, is idempotent, and tells of a full buffer."""
        use = """
from time import sleep
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
    while buffer.get_buffer_status().synced < 4:
        sleep(0.05)
    buffer.set_config("buffer_capacity", 1)
    buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": "{}"}, hold=True)
    refused = client.post(f"/receipts/{own[:-1]}1", json={"totalSum": 1})
    assert refused.status_code == 503 and "Buffer full" in refused.text
"""
        ofd.answers += [503]
        printed = run_python("\n".join([*BLOCKS, use]), cwd=tmp_path).stdout.splitlines()
        assert "1 3" == printed[1]  # sales, and receipts
        assert b'{"totalSum": 10.10,"fiscalDocumentNumber":101,"fiscalSign":3141592653}' in ofd.received

    def test_sale(self, tmp_path):
        """What the foreign key of a sale refers to is not pruned; the other receipts are."""
        [sale] = [block for block in BLOCKS if "sales = Table" in block]
        use = """
import time
from kkt_buffer import ReceiptRepository

for receipt in buffer.get_pending_receipts():
    buffer.mark_synced(receipt.id, 5)
next_year = ReceiptRepository(buffer.get_db(), now=lambda: time.time() + 366 * 86_400)
print(next_year.prune().receipts, buffer.get_receipt_by_id(receipt_id) is not None)
"""
        imports = "import kkt_buffer\nfrom kkt_buffer import Receipt"
        printed = run_python("\n".join([BLOCKS[0], imports, sale, use]), cwd=tmp_path).stdout.splitlines()
        assert "1 True" == printed[-1]

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
        printed = run_python("\n".join([*BLOCKS[:2], use]), cwd=tmp_path).stdout.splitlines()[1:]
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


class TestOtherDocuments:
    def test_reference(self, tmp_path):
        """Its blocks run in their order."""
        run_python("\n".join(blocks_of(REFERENCE)), cwd=tmp_path)

    def test_postgresql(self, tmp_path, postgresql_url):
        """The lines for a server work on one."""
        [block] = blocks_of((ROOT / "src" / "kkt_buffer" / "postgresql" / "README.md").read_text())
        use = "print(repository.get_buffer_status().pending)"
        here = block.replace("postgresql+psycopg://shop:SECRET@db1/shop", postgresql_url)
        assert "1\n" == run_python(here + use, cwd=tmp_path).stdout

    def test_cash(self, tmp_path):
        """The recipe for cash sessions, on a file of the sqlite3 version: both rows, or none."""
        (tmp_path / "data").mkdir()
        predecessor.make(tmp_path / "data" / "buffer.db", 1)
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
        printed = run_python("\n".join([*blocks_of(MIGRATIONS), use]), cwd=tmp_path).stdout.splitlines()
        assert ["1", "100"] == printed[-2:]


class TestTables:
    def test_operations(self):
        """Every operation of the repository has its place."""
        public = [name for name in dir(ReceiptRepository) if not name.startswith("_")]
        assert [] == [name for name in public if not re.search(rf"`{name}[(`]", REFERENCE)]

    @pytest.mark.parametrize("model", [Receipt, DeadLetter])
    def test_fields(self, model):
        """Every field of what is returned."""
        table = REFERENCE.partition(f"| `{model.__name__}` | |\n")[2].partition("\n\n")[0]
        first = [line.split(" | ")[0] for line in table.splitlines()]
        assert set(model.__table__.c.keys()) == set(re.findall(r"`(\w+)`", " ".join(first)))

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
        assert set() == {name for name in raised if f"`{name}`" not in REFERENCE}

    def test_targets(self):
        """Every make target that it names exists; so do those that contributors read of, all of them."""
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for words in (README, CONTRIBUTING):
            assert set(re.findall(r"\bmake\s+([a-z]+)\b", words)) - {"it"} <= targets

    def test_links(self):
        """What a document of ours links to is there."""
        for document in DOCUMENTS:
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
