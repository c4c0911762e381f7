"""
`python -m kkt_buffer demo`: one shift of a till, on a real database file, with a real kill in the middle.

Only the operator (ОФД) is simulated, and so are the goods.
"""

import itertools
import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kkt_buffer.engine import create_buffer_engine
from kkt_buffer.migrate import current, upgrade
from kkt_buffer.repository import ReceiptRepository

RECEIPTS_PER_SHIFT = 60
KILL_AFTER = 40

# Whole kopecks; names as they are met in shops: quotes, runs of spaces, a trailing space that belongs to the value.
_GOODS = (
    ("Хлеб «Дарницкий» 700 г", 6490),
    ('Сыр "Российский" 45% ', 79900),
    ("АИ-95-К5                      ТРК 4", 6135),
    ("Вода пит. негаз. 0,5Л", 4500),
    ("Услуги связи, л/с №0042", 35000),
    ("Пакет-майка", 900),
    ("Яйцо С1 10ШТ", 12990),
    ("Перевозка, зона 2\u00a0→\u00a03", 8200),
)
_WEIGHED = ("Картофель мытый вес.", 5499)


def sample_receipts(count: int, *, seed: int = 54) -> Iterator[dict[str, Any]]:
    """ФФД 1.2 documents in the JSON form that operators exchange: every shape that a shop sends, 1 to 77 items."""
    chance = random.Random(seed)  # noqa: S311 (samples, not secrets)
    for number in range(1, count + 1):
        size = chance.choice((1, 1, 1, 2, 3, 5, 8, 77))
        items = [_item(chance) for _ in range(size)]
        total = sum(item["sum"] for item in items)
        cash = chance.choice((0, total, total // 2))
        document: dict[str, Any] = {
            "code": 3,
            "dateTime": f"2026-03-{1 + number % 28:02d}T{8 + number % 14:02d}:{number % 60:02d}:00",
            "fiscalDocumentFormatVer": 4,
            "fiscalDocumentNumber": 48_000 + number,
            "fiscalDriveNumber": "9960440301000042",
            "fiscalSign": chance.randrange(2**32),
            "kktRegId": "0000000001000042    ",
            "operationType": chance.choice((1, 1, 1, 1, 2, 3, 4)),
            "operator": "Кассир Иванова А.А.",
            "requestNumber": number,
            "shiftNumber": 212,
            "taxationType": chance.choice((1, 2, 32)),
            "user": 'ООО "Ромашка"',
            "userInn": "7700000042  ",
            "items": items,
            "totalSum": total,
            "cashTotalSum": cash,
            "ecashTotalSum": total - cash,
            "prepaidSum": 0,
            "creditSum": 0,
            "provisionSum": 0,
        }
        if chance.random() < 0.2:
            document |= {"internetSign": 1, "buyerPhoneOrAddress": "+79000000000", "fnsUrl": "www.nalog.gov.ru"}
        if chance.random() < 0.1:
            document["propertiesUser"] = {"propertyName": "Заказ", "propertyValue": f"№ {number}/\u0416"}
        yield document


def _item(chance: random.Random) -> dict[str, Any]:
    kind = chance.random()
    if kind < 0.15:
        quantity = round(chance.uniform(0.05, 5), 3)
        name, price = _WEIGHED
        return {
            "name": name,
            "price": price,
            "quantity": quantity,
            "sum": round(price * quantity),
            "nds": 2,
            "paymentType": 4,
            "productType": 1,
            "itemsQuantityMeasure": 11,
        }
    name, price = chance.choice(_GOODS)
    quantity = chance.randint(1, 6)
    item: dict[str, Any] = {
        "name": name,
        "price": price,
        "quantity": quantity,
        "sum": price * quantity,
        "nds": chance.choice((1, 2, 6)),
        "paymentType": 4,
        "productType": chance.choice((1, 4, 33)),
    }
    if item["productType"] == 33:
        serial = "".join(chance.choices("ABCdef0123456789!\"%&'()*+,-./_", k=13))
        item["productCodeData"] = {
            "productIdType": 6,
            "gtin": 4_600_000_000_000 + chance.randrange(10**10),
            "rawProductCode": f"010460000000000021{serial}\u001d93dGVz",
            "sernum": serial,
        }
    return item


def _sell(path: str, documents: list[dict[str, Any]], acknowledge: Callable[[str], None]) -> None:
    """The till's process: put each receipt into the buffer, and only then go on to the next customer."""
    engine = create_buffer_engine(path)
    repository = ReceiptRepository(engine)
    for document in documents:
        acknowledge(repository.insert_receipt({"id": uuid.uuid4(), "pos_id": "till-1", "fiscal_doc": document}))
    engine.dispose()


def _till(path: str, documents: list[dict[str, Any]], pipe: Connection) -> None:
    _sell(path, documents, pipe.send)
    pipe.send(None)


def run(path: Path, say: Callable[[str], None] = print) -> None:
    """Play the shift on the buffer at `path`, which is made if it is not there, and tell what happens."""
    say("A shift at the till. The buffer, the files and the kill are real; only the operator (ОФД) is simulated.\n")
    engine = create_buffer_engine(path)
    upgrade(engine)
    repository = ReceiptRepository(engine)
    say(f"1. The buffer is {path}, its schema is {current(engine)}.")
    left = repository.get_buffer_status().pending
    if left:
        say(f"   {left} receipts of an earlier run are still waiting in it.")

    documents = list(sample_receipts(RECEIPTS_PER_SHIFT))
    say("2. The operator is offline. The till sells, and every receipt is on disk before the customer goes:")
    acknowledged = _sell_and_kill(str(path), documents)
    say(f"   after {len(acknowledged)} receipts its process is killed with SIGKILL, in the middle of its work.")
    missing = [receipt_id for receipt_id in acknowledged if repository.get_receipt_by_id(receipt_id) is None]
    if missing:
        raise RuntimeError(f"{len(missing)} acknowledged receipts are not in the buffer: {missing}")
    say(f"3. A new process looks: all {len(acknowledged)} acknowledged receipts are there, none is missing.")
    _sell(str(path), documents[len(acknowledged) :], acknowledged.append)
    say(f"   The till goes on and finishes the shift with {len(acknowledged)} receipts.")

    say("4. The operator is back. The receipts leave in the order in which they were made:")
    waiting = repository.get_pending_receipts(1000)
    rejected = waiting[len(waiting) // 2]
    for receipt in waiting:
        if receipt.id == rejected.id:
            repository.move_to_dlq(receipt.id, "rejected by the (simulated) operator: unknown tax rate")
        else:
            repository.mark_synced(receipt.id, int(time.time()))
    stamps = [(receipt.hlc_local_time, receipt.hlc_logical_counter) for receipt in waiting]
    in_order = all(earlier < later for earlier, later in itertools.pairwise(stamps))
    order = "in HLC order" if in_order else "OUT OF ORDER"
    say(f"   {len(waiting) - 1} delivered, {order}; 1 rejected and dead-lettered.\n")
    engine.dispose()


def _sell_and_kill(path: str, documents: list[dict[str, Any]]) -> list[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    till = context.Process(target=_till, args=(path, documents, theirs))
    till.start()
    theirs.close()
    acknowledged: list[str] = []
    while len(acknowledged) < KILL_AFTER:
        acknowledged.append(ours.recv())
    os.kill(till.pid or 0, signal.SIGKILL)
    till.join()
    # What it acknowledged before the kill fell, and we had not read yet.
    try:
        while (receipt_id := ours.recv()) is not None:
            acknowledged.append(receipt_id)
    except EOFError:
        pass
    return acknowledged
