"""What was moved is all there, and goes on where the file ended."""

import json

import pytest
from builders import NOON, STATUSES, a_foreign_receipt, a_receipt, another_program, everything, new_receipt, stamps
from moving.rows import rows_of
from operations_table import prepared
from samples import sample_receipts

from kkt_buffer import ReceiptRepository, SchemaError, check, create_buffer_engine

DAY = 86_400


@pytest.fixture
def eventful(path, file_engine, file_repository, clock):
    """A file with a long story, that nobody has open: every status, a held receipt, closed dead letters, a prune."""
    repository = file_repository
    repository.set_config("buffer_capacity", 12)
    prepared(repository)
    for status in STATUSES:
        a_receipt(repository, status)
    for document in (*sample_receipts(3), {"\\N\t\\.\n": "\x7f\u2028\U0001f9fe"}):
        text_of_it = json.dumps(document, ensure_ascii=False)
        repository.mark_synced(repository.insert_receipt(new_receipt(fiscal_doc=text_of_it)), NOON)
    repository.resolve(a_receipt(repository, "failed").id, actor="Anna", reason="a tab\tand a \\")
    repository.requeue(a_receipt(repository, "failed").id, actor="Anna", reason="новая строка\n")
    [receipt] = repository.claim_pending(1)
    repository.record_failure(receipt.id, "HTTP 500\nпопробуйте позже", receipt.lease_token)
    repository.log_event("shift_closed", metadata={"number": 212})
    a_foreign_receipt(
        file_engine, "кассa-1: a\\N", status="synced", synced_at=5, hlc_server_time=5, fiscal_doc="no JSON\t"
    )
    clock.advance(DAY)
    repository.mark_synced(repository.insert_receipt(new_receipt()), NOON)
    clock.seconds += 500 * DAY
    repository.prune()
    file_engine.dispose()
    return path


class TestWhole:
    @pytest.mark.parametrize("made", ["server_buffer", "postgresql_url"], ids=["made", "not made yet"])
    def test_everything(self, eventful, moved, made, request, open_engine):
        """Every row arrives as it is, with the counts; the target is a buffer like any other, and whole."""
        url = request.getfixturevalue(made)
        expected = rows_of(eventful)
        done = moved(eventful, url)
        arrived = rows_of(url)
        [mark] = [row for row in arrived["config"] if row[0] == "move_id"]
        assert expected | {"config": sorted([*expected["config"], mark], key=str)} == arrived
        assert {name: len(rows) for name, rows in arrived.items()} == done.rows
        assert not done.is_repeated
        engine = open_engine(url)
        check(engine)
        assert ReceiptRepository(engine).check_integrity().is_sound

    def test_documents(self, path, file_repository, moved, server_buffer, open_engine):
        """A document keeps every byte, whatever there is in it."""
        texts = ['{"a": "\\\\N\\t\\n\\\\."}', '{\t"a":\n"\x7f\u2028\U0001f9fe"\r}\n', '{"sum": 10.10 }  ']
        ids = file_repository.insert_receipts(new_receipt(fiscal_doc=document) for document in texts)
        file_repository.close()
        moved(path, server_buffer)
        repository = ReceiptRepository(open_engine(server_buffer))
        found = [repository.get_receipt_by_id(receipt_id) for receipt_id in ids]
        assert texts == [receipt.fiscal_doc for receipt in found]
        assert all(receipt.is_intact for receipt in found)

    def test_goes_on(self, path, file_repository, clock, moved, server_buffer, open_engine):
        """
        The next timestamp is above all earlier ones, also above that of a receipt which was pruned; so is the next
        event. A lease lasts as long as it would have done. What the buffer counts is right from then on.
        """
        file_repository.update_receipt_status(a_receipt(file_repository).id, "syncing")
        clock.seconds += 400 * DAY
        greatest = a_receipt(file_repository, "synced")
        last = file_repository.log_event("last")
        with another_program(path) as db:
            db.execute("DELETE FROM receipts WHERE id = ?", (greatest.id,))
            [(last,)] = db.execute("SELECT MAX(id) FROM buffer_events")
        file_repository.close()
        moved(path, server_buffer)
        clock.seconds -= 400 * DAY
        repository = ReceiptRepository(open_engine(server_buffer), now=clock)
        made = a_receipt(repository)
        assert stamps([greatest]) < stamps([made])
        assert last + 1 == repository.get_events(1)[0].id
        assert [made.id] == [receipt.id for receipt in repository.claim_pending()]
        clock.advance(60)
        assert 2 == len(repository.claim_pending())
        assert (2, 0) == (repository.get_buffer_status().syncing, repository.get_buffer_status().synced)
        assert repository.check_integrity().is_sound

    def test_pruned_events(self, path, file_repository, moved, server_buffer, open_engine):
        """The id of an event is not given to another one, although the event was deleted."""
        file_repository.log_event("old")
        file_repository.set_config("retention_events_days", 0)
        with another_program(path) as db:
            [(last,)] = db.execute("SELECT MAX(id) FROM buffer_events")
            db.execute("DELETE FROM buffer_events")
        file_repository.close()
        moved(path, server_buffer)
        repository = ReceiptRepository(open_engine(server_buffer))
        repository.log_event("new")
        assert [last + 1] == [new.id for new in repository.get_events()]

    def test_empty(self, path, moved, server_buffer, open_engine):
        """A buffer that was never used is moved too."""
        assert 0 == moved(path, server_buffer).rows["receipts"]
        repository = ReceiptRepository(open_engine(server_buffer))
        repository.insert_receipt(new_receipt())
        assert [1] == [new.id for new in repository.get_events()]

    def test_again(self, used, moved, server_buffer, open_engine):
        """A second run finds that it is done, and changes nothing, although the target has gone on meanwhile."""
        moved(used, server_buffer)
        engine = open_engine(server_buffer)
        a_receipt(ReceiptRepository(engine))
        before = everything(used), everything(server_buffer)
        again = moved(used, server_buffer)
        assert (True, 5) == (again.is_repeated, again.rows["receipts"])
        assert before == (everything(used), everything(server_buffer))
        check(engine)

    def test_old_schema(self, tmp_path, moved, server_buffer):
        """A file of an earlier release is upgraded first, by whoever moves it."""
        path = tmp_path / "old.db"
        create_buffer_engine(path).dispose()
        with pytest.raises(SchemaError, match="kkt-buffer upgrade PATH"):
            moved(path, server_buffer)
