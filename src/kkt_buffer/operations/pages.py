"""Pages of the receipts of one status, for monitors and tools."""

from functools import cache
from typing import Any

from sqlalchemy import Select, bindparam, select, text

from kkt_buffer.arguments import Page
from kkt_buffer.models import HELD_ONLY, PENDING_ONLY, SYNCED_ONLY, UNDELIVERED_REST, Receipt, ReceiptStatus
from kkt_buffer.operations.receipts import receipts
from kkt_buffer.transaction import Transaction

# Pages. Pending receipts are in two indexes, and each part is in HLC order; the other pages need one index.
_BY_HLC = ("hlc_local_time", "hlc_logical_counter", "id")
_BY_DELIVERY = ("synced_at", "id")
_PARTS = {
    ReceiptStatus.PENDING: (PENDING_ONLY, f"{HELD_ONLY} AND status = 'pending'"),
    ReceiptStatus.SYNCING: (f"{UNDELIVERED_REST} AND status = 'syncing'",),
    ReceiptStatus.FAILED: (f"{UNDELIVERED_REST} AND status = 'failed'",),
    ReceiptStatus.SYNCED: (SYNCED_ONLY,),
}


@cache
def _page(status: ReceiptStatus, *, of_pos: bool, after: bool) -> Select[Any]:
    """The query for one page. Only the terms that are needed, so that each has its index."""
    order = ", ".join(key := _page_key(status))
    pos = " AND pos_id = :pos_id" if of_pos else ""
    rest = f" AND ({order}) > ({', '.join(f':{name}' for name in key)})" if after else ""
    parts = " UNION ALL ".join(
        f"SELECT * FROM (SELECT {order} FROM receipts WHERE {part}{pos}{rest} ORDER BY {order} LIMIT :limit) AS part"
        for part in _PARTS[status]
    )
    return (
        select(Receipt)
        .where(text(f"id IN (SELECT id FROM ({parts}) AS page)"))
        .order_by(*(receipts.c[name] for name in key))
        .limit(bindparam("limit"))
    )


def _page_key(status: ReceiptStatus) -> tuple[str, ...]:
    return _BY_DELIVERY if status is ReceiptStatus.SYNCED else _BY_HLC


def list_receipts(tx: Transaction, page: Page) -> list[Receipt]:
    """One page of the receipts of one status: those after the last receipt of the page before."""
    status, pos_id, after, limit = page
    position = {} if after is None else {name: getattr(after, name) for name in _page_key(status)}
    if pos_id is not None:
        position["pos_id"] = pos_id
    return tx.load(_page(status, of_pos=pos_id is not None, after=after is not None), limit=limit, **position)
