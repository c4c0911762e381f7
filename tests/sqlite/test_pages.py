"""How many pages an operation writes: on a till's disk, this is what it costs, and what its disk wears out by."""

from statistics import fmean

import wal
from samples import a_document_of


def test_insert_receipt(file_engine, file_repository, path):
    """The mean of 1,000 receipts of 2 KB: at most 11 pages each."""
    file_repository.set_config("buffer_capacity", 2000)
    receipt = {"pos_id": "till-1", "fiscal_doc": a_document_of(2048)}
    pages = wal.pages(file_engine, path, lambda: file_repository.insert_receipt(receipt), 1000)
    print(f"{fmean(pages):.2f} pages for each receipt, from {min(pages):.0f} to {max(pages):.0f}")
    assert fmean(pages) <= 11
