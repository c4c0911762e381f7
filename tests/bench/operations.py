"""Each operation beside its floor, on two files that grow alike, and the pages that an insert writes."""

from statistics import fmean

import wal
from figures import Figures, Row, block, figures, interleaved
from ours_and_floor import BATCH, Floor, Ours

TITLE, REFERENCE = "operations", "floor"


def rows(folder, scale):
    ours, floor = Ours(folder / "ours.db"), Floor(folder / "floor.db")
    # What, a block of ours, a block of the floor's, how many times the floor ours may take.
    pairs = [
        ("insert_receipt", block(ours.insert, 20), block(floor.insert, 20), 1.8),
        (
            f"insert_receipts({BATCH}), per receipt",
            block(ours.insert_batch, 2, receipts=BATCH),
            block(floor.insert, 2 * BATCH),
            0.35,
        ),
        (f"get_pending_receipts({BATCH}), decoded", block(ours.pending, 10), block(floor.pending, 10), 1.8),
        (f"claim and ack of {BATCH}", block(ours.claim_and_ack, 1), block(floor.claim_and_ack, 1), 1.5),
        ("mark_synced", block(ours.mark_synced, 20), block(floor.mark_synced, 20), None),
        ("get_buffer_status", block(ours.status, 20), block(floor.status, 20), None),
    ]
    blocks = {}
    for what, mine, its, _ in pairs:
        blocks |= {(what, "ours"): mine, (what, "floor"): its}
    taken = interleaved(blocks, scale.rounds)
    assert (ours.status(), ours.pending()) == (floor.status(), floor.pending()), "they have not done the same"
    floor.close()
    for what, _, _, budget in pairs:
        mine, its = figures(taken[what, "ours"]), figures(taken[what, "floor"])
        yield Row(what, "µs", mine, its, scale.on_good(budget))
    ours.close()
    if not scale.till:
        fresh = Ours(folder / "pages.db")
        pages = wal.pages(fresh.engine, fresh.path, fresh.insert, 1000)
        yield Row("insert_receipt, pages of the WAL", "pages", Figures(fmean(pages)), budget=11, absolute=True)
        fresh.close()
