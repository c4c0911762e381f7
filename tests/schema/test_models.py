"""What the models say of their rows."""

import pytest
from builders import a_receipt
from sqlalchemy import text

from kkt_buffer import Receipt, metadata
from kkt_buffer.columns import ONLY_ON
from kkt_buffer.documents import digest_of


class TestIntact:
    # The digest of the empty JSON object, from another program (`printf '{}' | sha256sum`).
    DIGEST = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

    @pytest.mark.parametrize(
        ("document", "digest", "is_intact"),
        [("{}", DIGEST, True), ("{ }", DIGEST, False), ("{}", None, True), ("{}", "", False)],
    )
    def test_digest(self, document, digest, is_intact):
        """By the digest of the UTF-8 bytes; a receipt without one counts as intact."""
        assert is_intact is Receipt(fiscal_doc=document, digest=digest).is_intact

    def test_cyrillic(self):
        document = '{"user": "Ромашка"}'
        assert digest_of(document) == digest_of(document.encode())
        assert Receipt(fiscal_doc=document, digest=digest_of(document)).is_intact

    def test_to_dict(self, repository):
        """The columns of the first schema, and no others."""
        columns = (
            "id pos_id created_at hlc_local_time hlc_logical_counter hlc_server_time fiscal_doc status retry_count"
        )
        assert [*columns.split(), "last_error", "synced_at"] == list(a_receipt(repository).to_dict())


class TestMetadata:
    def test_tables(self, memory_engine):
        """Every table of a buffer is in it, the version table too."""
        with memory_engine.connect() as connection:
            found = connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")).all()
        here = {name for name, table in metadata.tables.items() if table.info.get(ONLY_ON) != "postgresql"}
        assert here == {name for name in found if not name.startswith("sqlite_")}
