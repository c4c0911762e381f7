"""Commands that look after the file: prune, backup with rotation, export. (`verify` has a file of its own.)"""

import json
import subprocess
import sys

import pytest
from builders import NOON, STATUSES, a_receipt, another_program, everything, new_receipt, run_python
from damage import damage

from kkt_buffer import ReceiptRepository, create_buffer_engine, rotation

DAY = 86_400
PAGE = 4096


class TestPrune:
    def test_prune(self, filled, done):
        """Old receipts of the fixture are delivered and past their retention; the rest stays."""
        assert "deleted 1 receipt, 0 dead letters" in done("prune", filled)
        assert 3 == json.loads(done("status", filled, "--json"))["total_receipts"]


class TestBackup:
    def test_copy(self, used, tmp_path, done):
        target = tmp_path / "copies" / "copy.db"
        assert f"{target}: complete, and on disk\n" == done("backup", used, target)
        assert everything(used) == everything(target)

    def test_default_folder(self, used, done):
        """Beside the buffer, under its name, with the time."""
        assert f"(1 copy in {used.parent / 'backups'})" in done("backup", "--db", used)
        [copy] = (used.parent / "backups").iterdir()
        assert everything(used) == everything(copy)

    def test_rotation(self, used, tmp_path, done):
        """The newest copies stay; files of others are not touched."""
        folder = tmp_path / "usb"
        folder.mkdir()
        foreign = ["notes.txt", "other-20250101T000000.db", "buffer-2025.db", "buffer-20250101T000000.db.txt"]
        old = [f"buffer-202501{day:02d}T000000.db" for day in range(1, 6)]
        for name in (*foreign, *old):
            (folder / name).touch()
        assert f"(3 copies in {folder})" in done("backup", folder, "--db", used, "--keep", 3)
        names = {path.name for path in folder.iterdir()}
        assert {*foreign, *old[3:]} == names - {max(names & {path.name for path in rotation.backups(folder)})}

    def test_damaged(self, used, tmp_path, run):
        """A copy of a damaged buffer replaces no older one, and that is told."""
        with another_program(used) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.execute("UPDATE receipts SET retry_count = -1 WHERE status = 'pending'")
        ended = run("backup", tmp_path / "usb", "--db", used, "--keep", 1)
        assert (1, "") == (ended.status, ended.out)
        assert f"{tmp_path / 'usb' / 'buffer-damaged.db'} is damaged, as the buffer is: " in ended.err
        assert "a row of receipts breaks ck_receipts_retry_count" in ended.err
        assert "No older copy was deleted." in ended.err

    @pytest.mark.parametrize("keep", [0, -1])
    def test_keep_none(self, used, tmp_path, refused, keep):
        assert "keep: expected a whole number of 1 or more" in refused("backup", tmp_path, "--db", used, "--keep", keep)

    def test_missing(self, tmp_path, refused):
        refused("backup", tmp_path / "usb", "--db", tmp_path / "buffer.db")
        assert [] == list(tmp_path.iterdir())


class TestRotation:
    def test_clock(self, file_repository, tmp_path, moscow):
        """The name has the local time. A clock that was set back does not make the new copy the one to delete."""
        times = iter((NOON, NOON + 2 * DAY, NOON + DAY, NOON - DAY))
        for _ in range(4):
            copy, report = rotation.back_up(
                file_repository, tmp_path / "b", name="till", keep=2, now=lambda: next(times)
            )
            assert report.is_sound
            assert copy.exists()
        expected = ["till-20260228T150000.db", "till-20260303T150000.db"]
        assert expected == [path.name for path in rotation.backups(tmp_path / "b", name="till")]

    def test_keep_one(self, file_repository, tmp_path):
        for seconds in range(3):
            copy, _ = rotation.back_up(file_repository, tmp_path / "b", keep=1, now=lambda at=seconds: NOON + at)
        assert [copy] == list((tmp_path / "b").iterdir())

    def test_damaged(self, file_engine, file_repository, tmp_path):
        """The copies from before the damage stay, however many there are."""
        rotation.back_up(file_repository, tmp_path / "b", keep=1, now=lambda: NOON)
        receipt = a_receipt(file_repository)
        with file_engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
            connection.exec_driver_sql("UPDATE receipts SET retry_count = -1 WHERE id = ?", (receipt.id,))
        for days in (1, 2):
            copy, report = rotation.back_up(
                file_repository, tmp_path / "b", keep=1, now=lambda at=days: NOON + at * DAY
            )
            assert report.is_damaged
            assert [old := rotation.backups(tmp_path / "b")[0]] == rotation.backups(tmp_path / "b")
            assert {old, copy} == set((tmp_path / "b").iterdir())


def break_pages(path, which, *, index=False, shorten=False):
    """
    Overwrite those leaf pages of the table of receipts that `which` picks; and the index on the ids, if asked to.

    With `shorten`, the pages lose their last row, which SQLite does not notice.
    """
    with another_program(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        roots = dict(db.execute("SELECT name, rootpage FROM sqlite_master WHERE tbl_name = 'receipts'"))
    content = bytearray(path.read_bytes())
    start = (roots["receipts"] - 1) * PAGE
    page = content[start : start + PAGE]
    assert 5 == page[0]  # an interior page of a table
    cells = [int.from_bytes(page[12 + 2 * n : 14 + 2 * n]) for n in range(int.from_bytes(page[3:5]))]
    leaves = [int.from_bytes(page[cell : cell + 4]) for cell in cells] + [int.from_bytes(page[8:12])]
    for number in (*which(leaves), *([roots["sqlite_autoindex_receipts_1"]] if index else [])):
        start = (number - 1) * PAGE
        if shorten:
            content[start + 4] -= 1  # how many rows the page has
        else:
            content[start : start + PAGE] = b"\xa5" * PAGE
    path.write_bytes(content)


def lines_of(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def many(file_engine, file_repository, path):
    """The ids of 300 receipts in the buffer at `path`, in their order."""
    file_repository.set_config("buffer_capacity", 1000)
    ids = file_repository.insert_receipts(
        new_receipt(pos_id=f"till-{number}", fiscal_doc={"n": number, "text": "x" * 500}) for number in range(300)
    )
    file_engine.dispose()
    return ids


class TestExport:
    def test_columns(self, used, done):
        """Every column as it is stored, the document as its text, in the order in which they were stored."""
        found = lines_of(done("export", used))
        assert list(STATUSES) == [row["status"] for row in found]
        assert all(isinstance(json.loads(row["fiscal_doc"]), dict) for row in found)
        assert {"digest", "held_at", "lease_token", "hlc_logical_counter"} <= found[0].keys()

    def test_can_be_stored_again(self, many, path, done, repository):
        """What was exported is enough to store the receipts again, byte for byte."""
        repository.set_config("buffer_capacity", 1000)
        found = lines_of(done("export", path))
        repository.insert_receipts({key: row[key] for key in ("id", "pos_id", "fiscal_doc")} for row in found)
        assert many == [receipt.id for receipt in repository.get_pending_receipts(1000)]

    def test_empty(self, path, done):
        assert "" == done("export", path)

    def test_damaged_pages(self, many, path, run):
        """Of a damaged file everything is read but the rows on the damaged pages, and these are named."""
        break_pages(path, lambda leaves: (leaves[3], leaves[20]))
        ended = run("export", path)
        saved = [row["id"] for row in lines_of(ended.out)]
        lost = [line.split()[2] for line in ended.err.splitlines()]
        assert 1 == ended.status
        assert 280 < len(saved) < 300
        assert set(many) == {*saved, *lost}
        assert [receipt_id for receipt_id in many if receipt_id in saved] == saved

    def test_last_page(self, many, path, run):
        """Also where the number of the last row cannot be read any more: the index on the ids is whole."""
        break_pages(path, lambda leaves: leaves[10:])
        ended = run("export", path)
        saved = [row["id"] for row in lines_of(ended.out)]
        assert many[: len(saved)] == saved
        assert 50 < len(saved) < 250
        assert [f"error: receipt {lost} could not be read" for lost in many if lost not in saved] == sorted(
            ended.err.splitlines(), key=lambda line: many.index(line.split()[2])
        )

    def test_vanished(self, many, path, run):
        """A row that is missing without an error of SQLite is named too."""
        break_pages(path, lambda leaves: (leaves[3],), shorten=True)
        ended = run("export", path)
        saved = [row["id"] for row in lines_of(ended.out)]
        [lost] = set(many) - set(saved)
        assert f"error: receipt {lost} could not be read\n" == ended.err

    @pytest.mark.parametrize("number", [2**60, 2**63 - 1, -(2**63)])
    @pytest.mark.parametrize("index", [False, True])
    def test_absurd_number(self, many, path, run, number, index):
        """A row whose number was damaged does not make the reading go on for ever."""
        damage(path, f"UPDATE receipts SET rowid = {number} WHERE id = '{many[7]}'")
        break_pages(path, lambda leaves: leaves[3:5], index=index)
        ended = run("export", path)
        saved = [row["id"] for row in lines_of(ended.out)]
        assert 280 < len(saved) < 300
        assert index is ("more receipts may be lost" in ended.err)
        assert index or set(many) == {*saved, *(line.split()[2] for line in ended.err.splitlines())}

    def test_index_too(self, many, path, run):
        """Where nothing tells how many rows there were, it is read on until nothing comes any more."""
        break_pages(path, lambda leaves: (leaves[0], leaves[-1]), index=True)
        ended = run("export", path)
        saved = [row["id"] for row in lines_of(ended.out)]
        assert 280 < len(saved) < 300
        assert ["error: more receipts may be lost: the index with their ids is damaged too"] == ended.err.splitlines()

    def test_index_alone(self, many, path, done):
        """Where the index alone is damaged, nothing is lost, and nothing is said to be."""
        break_pages(path, lambda _: (), index=True)
        assert many == [row["id"] for row in lines_of(done("export", path))]

    def test_cut(self, many, path, run):
        """Of a file that was cut, what is left of it; and it is told that nobody knows what else there was."""
        with another_program(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        ended = run("export", path)
        assert 1 == ended.status
        assert 20 < len(lines_of(ended.out)) < 300
        assert "more receipts may be lost: the index with their ids is damaged too" in ended.err

    def test_changed(self, many, path, run):
        """A document that was changed is exported as it is, and told of."""
        with another_program(path) as db:
            db.execute("DROP TRIGGER trg_guard_acknowledged")
            db.execute("UPDATE receipts SET fiscal_doc = '{}' WHERE id = ?", (many[7],))
        ended = run("export", path)
        assert (1, 300) == (ended.status, len(lines_of(ended.out)))
        assert f"error: receipt {many[7]} was changed: its document does not match its digest\n" == ended.err

    def test_invalid_text(self, many, path, run):
        """Invalid UTF-8 and binary data are exported as escapes."""
        with another_program(path) as db:
            db.execute("UPDATE receipts SET last_error = CAST(x'FF41' AS TEXT) WHERE id = ?", (many[0],))
            db.execute("UPDATE receipts SET last_error = x'FE42' WHERE id = ?", (many[1],))
        found = lines_of(run("export", path).out)
        assert [r"\xffA", r"\xfeB", None] == [row["last_error"] for row in found[:3]]

    def test_other_schema(self, tmp_path, done):
        """A buffer of an earlier release is exported as it is."""
        path = tmp_path / "old.db"
        with another_program(path) as db:
            db.execute("CREATE TABLE receipts (id TEXT PRIMARY KEY, fiscal_doc TEXT)")
            db.execute("INSERT INTO receipts VALUES ('a', '{}')")
        assert [{"id": "a", "fiscal_doc": "{}"}] == lines_of(done("export", path))

    def test_no_table(self, tmp_path, refused):
        path = tmp_path / "other.db"
        with another_program(path) as db:
            db.execute("CREATE TABLE notes (id TEXT)")
        assert "it has no table of receipts" in refused("export", path)

    @pytest.mark.parametrize(
        ("name", "told"), [("missing.db", "there is no buffer at "), (".", "error: "), ("empty.db", "is empty")]
    )
    def test_cannot_be_opened(self, tmp_path, refused, name, told):
        if name == "empty.db":
            (tmp_path / name).touch()
        before = list(tmp_path.iterdir())
        assert told in refused("export", tmp_path / name)
        assert before == list(tmp_path.iterdir())

    def test_no_space(self, many, path):
        """Output that cannot be written is an error of one line."""
        with open("/dev/full", "wb") as full:
            export = [sys.executable, "-m", "kkt_buffer", "export", str(path)]
            ended = subprocess.run(export, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (1, "error: the output: No space left on device\n") == (ended.returncode, ended.stderr)

    def test_memory(self, refused):
        assert "export needs a file" in refused("export", ":memory:")

    def test_in_use(self, many, path, done):
        """Beside a process that writes; what is not in the file itself yet, but in its WAL, is exported too."""
        engine = create_buffer_engine(path)
        receipt_id = ReceiptRepository(engine).insert_receipt(new_receipt())
        assert receipt_id == lines_of(done("export", path))[-1]["id"]
        engine.dispose()


def test_reader_gone(many, path):
    """`kkt-buffer export | head -1` ends without a word."""
    program = """
        import subprocess, sys
        export = subprocess.Popen([sys.executable, "-m", "kkt_buffer", "export", sys.argv[1]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        export.stdout.readline()
        export.stdout.close()
        assert export.stderr.read() == b""
        assert export.wait() == 1
    """
    run_python(program, path)
