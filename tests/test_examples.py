"""
The examples in the documentation of the repository: each operation has one, and each runs as it is printed.

An example begins with `repository`, a buffer in memory that is new and empty, and `folder`, an empty folder. What else
it needs, it makes.
"""

import doctest

import pytest
from operations_table import public_names

from kkt_buffer import DeliveryWorker, ReceiptRepository, create_buffer_engine, upgrade


def examples(name):
    """The examples of one public name, as a test of `doctest`."""
    finder = doctest.DocTestFinder(exclude_empty=False, recurse=False)
    [found] = finder.find(vars_of(name), f"ReceiptRepository.{name}", module=False, globs={})
    return found


def vars_of(name):
    attribute = getattr(ReceiptRepository, name)
    return attribute.fget if isinstance(attribute, property) else attribute


@pytest.fixture
def fresh():
    engine = create_buffer_engine(":memory:")
    upgrade(engine)
    yield ReceiptRepository(engine)
    engine.dispose()


def test_worker(fresh):
    """The example of `DeliveryWorker`."""
    [test] = doctest.DocTestFinder(recurse=False).find(DeliveryWorker, globs={"DeliveryWorker": DeliveryWorker})
    test.globs["repository"] = fresh
    told = []
    doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    assert ([], True) == (told, bool(test.examples))


@pytest.mark.parametrize("name", sorted(public_names()))
class TestExamples:
    def test_has_one(self, name):
        assert examples(name).examples, f"{name} has no example in its documentation"

    def test_runs(self, name, fresh, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # for those that write a file
        test = examples(name)
        test.globs = {"repository": fresh, "folder": tmp_path}
        told = []
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=told.append)
        assert [] == told
