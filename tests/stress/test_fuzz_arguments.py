"""
Nonsense in every argument: only documented errors come out, and nothing is changed.

`KKT_BUFFER_PROOF=1` tries ten thousand calls instead of three hundred.
"""

import contextlib
import inspect
import json
import time
import traceback
import uuid
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from builders import NOON, PROOF, STATUSES, a_receipt, checkouts, new_receipt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations_table import OPERATIONS

from kkt_buffer import (
    ReceiptBufferError,
    ReceiptRepository,
    create_buffer_engine,
    deliver_pending,
    upgrade,
)

CASES = 10_000 if PROOF else 300
DOCUMENTED = (ReceiptBufferError, ValueError, TypeError)

texts = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "a\0b",
            "\ud800",
            "\udfff x",
            "x" * 2001,
            "x" * 100_000,
            "NaN",
            "nan",
            "Infinity",
            "-1",
            "1e400",
            "9" * 5000,
            "٣",
            "²",
            "' OR 1=1 --",
            "%s %(x)s :x ?",
            "null",
            "[]",
            "{}",
            '{"a": NaN}',
            '{"a": 1e999}',
            '{"a": "\\ud800"}',
            '{"a":' * 100_000,
            "[" * 100_000,
            '{"a": ' + "9" * 5000 + "}",
            "pending",
            "synced",
            "failed",
            "syncing",
            "buffer_capacity",
            "receipt_added",
            "sync_started",
            "123e4567-e89b-42d3-a456-426614174000",
            "123E4567-E89B-42D3-A456-426614174000",
            "{123e4567-e89b-42d3-a456-426614174000}",
            "🧾" * 700,
        ]
    ),
    st.text(max_size=50),
)
numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**200, True, False]),
    st.builds(lambda: 10**6000),  # longer than Python writes down
    st.floats(),
    st.decimals(),
    st.integers(),
)
scalars = st.one_of(
    st.none(),
    numbers,
    texts,
    st.binary(max_size=20),
    st.builds(object),
    st.just(uuid.UUID(int=5)),
    st.just(float("nan")),
    st.just(Decimal("1.10")),
    st.just(Path("x")),
    st.just(json.loads),
    st.dates(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(st.one_of(texts, st.integers(), st.none(), st.booleans()), inner, max_size=3),
        st.frozensets(st.integers(), max_size=2),
    ),
    max_leaves=5,
)
receipts = st.one_of(
    values,
    st.fixed_dictionaries(
        {"pos_id": st.one_of(st.just("till-1"), values), "fiscal_doc": st.one_of(st.just("{}"), values)},
        optional={"id": values, "more": values},
    ),
)

# Ids that exist, so that not every case ends at "no such receipt".
KNOWN = {
    status: f"00000000-0000-4000-8000-{number:012}"
    for number, status in enumerate(("pending", "failed", "synced", "held"))
}

# What a parameter of this name gets half of the time, so that not every call ends at its first argument.
PLAUSIBLE = {
    "receipt_data": receipts,
    "many": st.lists(receipts, max_size=3),
    "receipt_id": st.sampled_from([*KNOWN.values()]),
    "fields": st.dictionaries(texts, values, min_size=1, max_size=3),
    "limit": st.integers(1, 5),
    "server_time": st.integers(0, 2**40),
    "status": st.sampled_from(STATUSES),
    **dict.fromkeys(("error", "reason", "actor", "key", "value", "lease_token", "pos_id"), st.text("xyz", min_size=1)),
}


def argument(name):
    plausible = PLAUSIBLE.get(name, values)
    return st.booleans().flatmap(lambda nonsense: values if nonsense else plausible)


def arguments_of(operation):
    """What an operation takes: strategies by position, and by keyword those that must be there and those that may."""
    positions, needed, optional = [], {}, {}
    for parameter in inspect.signature(operation).parameters.values():
        strategy = argument(parameter.name)
        if parameter.name in {"self", "repository"}:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positions.append(strategy)
        elif parameter.default is parameter.empty:
            needed[parameter.name] = strategy
        else:
            optional[parameter.name] = strategy
    return st.tuples(*positions), st.fixed_dictionaries(needed, optional=optional)


CALLS = {name: getattr(ReceiptRepository, name) for name in OPERATIONS} | {"deliver_pending": deliver_pending}
ARGUMENTS = {name: arguments_of(call) for name, call in CALLS.items() if len(inspect.signature(call).parameters) > 1}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def fuzzed(request):
    """A buffer, of SQLite in memory, with a receipt of each status, and a held one."""
    with contextlib.ExitStack() as stack:
        url = ":memory:"
        if request.param == "postgresql":
            server = request.getfixturevalue("server")
            url = server.url(schema=stack.enter_context(server.schema()))
        engine = create_buffer_engine(url)
        stack.callback(engine.dispose)
        upgrade(engine)
        yield engine, prepared(engine)


def prepared(engine):
    repository = ReceiptRepository(engine, now=lambda: NOON)
    repository.set_config("buffer_capacity", 1_000_000)
    for status in ("pending", "failed", "synced"):
        a_receipt(repository, status, id=KNOWN[status])
    repository.insert_receipt(new_receipt(id=KNOWN["held"]), hold=True)
    return repository


def changes(driver):
    """What is not the same after a change of any row: SQLite's own counts; the rows and their last transaction."""
    if hasattr(driver, "total_changes"):
        return driver.execute("PRAGMA data_version").fetchone(), driver.total_changes
    tables = ("receipts", "dlq", "config", "buffer_events")
    counts = (f"SELECT count(*), max(xmin::text::bigint) FROM {table}" for table in tables)
    found = driver.execute(" UNION ALL ".join(counts)).fetchall()
    driver.rollback()  # else the next look would see the same moment
    return found


class TestOperations:
    def judge(self, error):
        """An error of ours, or one of Python's own that we raised on purpose: not one that happened to come by."""
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not isinstance(error, ReceiptBufferError) and "kkt_buffer" not in frame.f_code.co_filename:
            pytest.fail(f"raised by accident: {error!r}"[:300])

    def attempt(self, engine, repository, name, positions, keywords):
        """Call an operation. Returns what kind of end it had; an error that is not documented goes through."""
        with contextlib.closing(engine.raw_connection()) as connection:
            before = changes(connection.driver_connection)
            try:
                CALLS[name](repository, *positions, **keywords)
            except DOCUMENTED as error:
                self.judge(error)
                if before != changes(connection.driver_connection):
                    pytest.fail("refused, and yet something was written")
                return type(error).__name__
            assert not repository.in_transaction
            return "done"

    @pytest.mark.slow
    def test_nonsense(self, fuzzed):
        """Whatever it is given, an operation does it, or refuses with a documented error and changes nothing."""
        ends = Counter()
        engine, repository = fuzzed

        @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def play(data):
            name = data.draw(st.sampled_from(sorted(ARGUMENTS)))
            positions, keywords = (data.draw(strategy) for strategy in ARGUMENTS[name])
            ends[self.attempt(engine, repository, name, positions, keywords)] += 1

        with checkouts() as in_use:
            play()
            assert [] == in_use
        print(f"nonsense: {sum(ends.values())} calls: {dict(ends.most_common())}")
        assert set(KNOWN.values()) <= {repository.get_receipt_by_id(known_id).id for known_id in KNOWN.values()}

    @pytest.mark.parametrize("fault", ["another error", "writes and refuses"])
    def test_would_be_found(self, fuzzed, fault, monkeypatch):
        """The same attempt does find an operation that is wrong."""

        def wrong(self, key):
            if fault == "writes and refuses":
                self.set_config("mine", str(uuid.uuid4()))
                raise ValueError("no")
            return {}[key]

        monkeypatch.setitem(CALLS, "get_config", wrong)
        with pytest.raises(KeyError if fault == "another error" else pytest.fail.Exception):
            self.attempt(*fuzzed, "get_config", ["x"], {})


class TestLargeDocuments:
    @pytest.mark.parametrize(
        ("document", "bytes_at_least"),
        [
            ({"text": "ж" * 5_000_000}, 10_000_000),
            ({"items": [{"name": "хлеб", "price": 6490, "quantity": 1}] * 100_000}, 4_000_000),
            ({"a": json.loads("[" * 400 + "]" * 400)}, 800),
        ],
        ids=["10 MB", "100,000 items", "400 deep"],
    )
    @pytest.mark.parametrize("as_text", [False, True])
    def test_work(self, shared_repository, document, bytes_at_least, as_text):
        """Documents a hundred times larger than real ones are kept to the letter."""
        given_document = json.dumps(document, ensure_ascii=False) if as_text else document
        began = time.monotonic()
        receipt_id = shared_repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": given_document})
        found = shared_repository.get_receipt_by_id(receipt_id)
        print(f"{len(found.fiscal_doc.encode())} bytes stored and read in {time.monotonic() - began:.2f} s")
        assert len(found.fiscal_doc.encode()) >= bytes_at_least
        assert document == found.document
        if as_text:
            assert given_document == found.fiscal_doc

    @pytest.mark.parametrize("deep", [100_000, 1_000_000])
    @pytest.mark.parametrize("as_text", [False, True])
    def test_too_deep(self, shared_repository, deep, as_text):
        """What no JSON reader could read back is refused."""
        if as_text:
            document = '{"a":' * deep + "1" + "}" * deep
        else:
            document = {}
            for _ in range(deep):
                document = {"a": document}
        with pytest.raises(ValueError, match=r"fiscal_doc: .*too deeply"):
            shared_repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": document})
        assert shared_repository.get_buffer_status().total_receipts == 0

    def test_too_long(self, shared_repository):
        with pytest.raises(ValueError, match="fiscal_doc: at most 67108864 characters"):
            shared_repository.insert_receipt({"pos_id": "till-1", "fiscal_doc": '{"a":"' + "x" * 2**26 + '"}'})
