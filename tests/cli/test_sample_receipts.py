"""The receipts that the demo sells."""

import pytest
from builders import new_receipt

from kkt_buffer import demo


class TestSampleReceipts:
    @pytest.fixture
    def documents(self):
        """Those that the demo plays."""
        return list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT))

    @pytest.fixture
    def items(self, documents):
        return [item for document in documents for item in document["items"]]

    def test_deterministic(self, documents):
        """The same receipts each time, so that two runs can be compared; others with another seed."""
        assert documents == list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT))
        assert documents[:5] == list(demo.sample_receipts(5))
        assert documents != list(demo.sample_receipts(demo.RECEIPTS_PER_SHIFT, seed=1))

    @pytest.mark.parametrize("count", [0, 1, 10])
    def test_count(self, count):
        assert count == len(list(demo.sample_receipts(count)))

    def test_kinds(self, documents):
        """Sale, return, purchase, return of a purchase; cash, card and both; every taxation."""
        assert {1, 2, 3, 4} == {document["operationType"] for document in documents}
        assert {1, 2, 32} == {document["taxationType"] for document in documents}
        paid = {(document["cashTotalSum"] > 0, document["ecashTotalSum"] > 0) for document in documents}
        assert {(True, False), (False, True), (True, True)} == paid

    def test_sizes(self, documents):
        """From one item to as many as a big shop sells in one go."""
        assert {1, 2, 3, 5, 8, 77} == {len(document["items"]) for document in documents}

    def test_numbers(self, documents):
        """Each document has a number of its own."""
        assert len(documents) == len({document["fiscalDocumentNumber"] for document in documents})

    def test_sums(self, documents):
        """The items add up to the total, and so does what was paid; money is whole kopecks."""
        for document in documents:
            total = document["totalSum"]
            assert type(total) is int
            assert total == sum(item["sum"] for item in document["items"])
            assert total == document["cashTotalSum"] + document["ecashTotalSum"]

    def test_quantities(self, items):
        """Goods by piece and by weight; the sum of each is its price times its quantity, to the kopeck."""
        assert {int, float} == {type(item["quantity"]) for item in items}
        assert [] == [item for item in items if item["sum"] != round(item["price"] * item["quantity"])]
        assert [] == [item for item in items if item["quantity"] != round(item["quantity"], 3)]

    def test_marked(self, items):
        """Marked goods carry their code as the scanner read it, separators and all."""
        codes = [item["productCodeData"]["rawProductCode"] for item in items if "productCodeData" in item]
        assert codes
        assert [] == [code for code in codes if "\x1d" not in code]
        assert {33} == {item["productType"] for item in items if "productCodeData" in item}

    def test_texts(self, documents, items):
        """Blanks at the end that belong to the value, quotes, runs of blanks, letters beyond ASCII."""
        assert {"0000000001000042    "} == {document["kktRegId"] for document in documents}
        names = {item["name"] for item in items}
        assert 'Сыр "Российский" 45% ' in names
        assert "АИ-95-К5                      ТРК 4" in names
        assert "Перевозка, зона 2\xa0→\xa03" in names

    def test_optional_parts(self, documents):
        """Some buyers want their receipt by mail, some shops add a field of their own, most do neither."""
        assert {True, False} == {"buyerPhoneOrAddress" in document for document in documents}
        assert {True, False} == {"propertiesUser" in document for document in documents}

    def test_unchanged(self, documents, repository):
        """Each comes out of the buffer as it went in."""
        receipt_ids = [repository.insert_receipt(new_receipt(fiscal_doc=document)) for document in documents]
        assert documents == [repository.get_receipt_by_id(receipt_id).document for receipt_id in receipt_ids]
        assert documents == [receipt.document for receipt in repository.get_pending_receipts(100)]
