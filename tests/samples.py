"""Fiscal documents of every shape that a shop sends, the same ones each time."""

import json
import random
from collections.abc import Iterator
from typing import Any

# Whole kopecks; names as they are met in shops: quotes, runs of spaces, a trailing space that belongs to the value.
GOODS = (
    ("Хлеб «Дарницкий» 700 г", 6490),
    ('Сыр "Российский" 45% ', 79900),
    ("АИ-95-К5                      ТРК 4", 6135),
    ("Вода пит. негаз. 0,5Л", 4500),
    ("Услуги связи, л/с №0042", 35000),
    ("Пакет-майка", 900),
    ("Яйцо С1 10ШТ", 12990),
    ("Перевозка, зона 2\u00a0→\u00a03", 8200),
)
WEIGHED = ("Картофель мытый вес.", 5499)


def sample_receipts(count: int, *, seed: int = 54) -> Iterator[dict[str, Any]]:
    """ФФД 1.2 documents in the JSON form that OFDs exchange: every shape that a shop sends, 1 to 77 items."""
    chance = random.Random(seed)
    for number in range(1, count + 1):
        size = chance.choice((1, 1, 1, 2, 3, 5, 8, 77))
        items = [an_item(chance) for _ in range(size)]
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


def a_document_of(size: int, *, seed: int = 54) -> str:
    """Compact JSON text of one receipt, with as many items as it takes to reach so many bytes, and no more."""
    document = next(sample_receipts(1, seed=seed))
    chance = random.Random(seed)
    document["items"] = []
    while len(text := json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()) < size:
        document["items"].append(an_item(chance))
    return text.decode()


def an_item(chance: random.Random) -> dict[str, Any]:
    kind = chance.random()
    if kind < 0.15:
        quantity = round(chance.uniform(0.05, 5), 3)
        name, price = WEIGHED
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
    name, price = chance.choice(GOODS)
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
