"""How many pages an operation writes: on a till's disk, this is what it costs, and what its disk wears out by."""

from statistics import fmean

from samples import a_document_of
from sqlalchemy import event

FRAME_HEADER = 24


def test_insert_receipt(file_engine, file_repository, path):
    """The mean of 1,000 receipts of 2 KB: at most 11 pages each."""
    # Without checkpoints the WAL only grows, by a frame for each page that is written.
    event.listen(file_engine, "connect", lambda driver, _: driver.execute("PRAGMA wal_autocheckpoint = 0").fetchone())
    file_engine.dispose()  # the connection that looked at the file still checkpoints
    file_repository.set_config("buffer_capacity", 2000)
    with file_engine.connect() as connection:
        page_size = connection.exec_driver_sql("PRAGMA page_size").scalar()
    wal = path.with_name(f"{path.name}-wal")
    document = a_document_of(2048)
    pages = []
    size = wal.stat().st_size
    for _ in range(1000):
        file_repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": document})
        size, before = wal.stat().st_size, size
        pages.append((size - before) / (page_size + FRAME_HEADER))
    print(f"{fmean(pages):.2f} pages for each receipt, from {min(pages):.0f} to {max(pages):.0f}")
    assert all(count.is_integer() and count > 0 for count in pages), "the WAL was cut or checkpointed meanwhile"
    assert fmean(pages) <= 11
