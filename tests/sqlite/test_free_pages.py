"""What becomes of the room in the file that pruned receipts leave."""

from builders import NOON, new_receipt

DAY = 86_400


def test_used_again(file_repository, file_engine, clock):
    """The freed pages are used again, so the file does not grow."""
    file_repository.set_config("buffer_capacity", 10_000)

    def fill():
        for receipt_id in file_repository.insert_receipts(new_receipt() for _ in range(250)):
            file_repository.mark_synced(receipt_id, NOON)

    fill()
    clock.seconds += 8 * DAY
    assert file_repository.prune().receipts == 250
    with file_engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        assert connection.exec_driver_sql("PRAGMA freelist_count").scalar() > 0
    fill()
    with file_engine.connect() as connection:
        # The events stay for 90 days, and are all that needs room.
        assert connection.exec_driver_sql("PRAGMA page_count").scalar() < pages * 1.3
