"""A host application with its own tables and its own Alembic history in the same database."""

import re
from pathlib import Path

import pytest
from builders import a_receipt, everything, is_server, unmeasured
from schema.helpers import ROOT, alembic
from sqlalchemy import text

from kkt_buffer import check

[LINES] = re.findall(r"```python\n((?:(?!```).)*def include_object.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

# What the host adds to the env.py that `alembic init` has made, beside the lines of our README.
HOST = """
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table
host = MetaData()
Table("goods", host, Column("id", Integer, primary_key=True))
Table(
    "sales",
    host,
    Column("id", Integer, primary_key=True),
    Column("receipt_id", String, ForeignKey(kkt_buffer.Receipt.id), nullable=False),
)
target_metadata = host

def include_name(name, type_, parent_names):
    return type_ != "table" or name in host.tables

"""
OPTIONS = {
    "plain": "include_object=include_object",
    # The recipe of Alembic's documentation, with which a list of metadata proposed to create and drop our tables.
    "include_name": "include_object=include_object, include_name=include_name",
    "all else": """include_object=include_object,
        include_schemas=True, include_name=lambda name, type_, _: type_ != "schema" or name in {None, "public"},
        render_as_batch=True, compare_server_default=True""",
}


class Host:
    """The project of the host: made by `alembic init`, with the lines of our README in its env.py."""

    def __init__(self, folder: Path, buffer: str, options: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.alembic("init", "history")
        ini = folder / "alembic.ini"
        url = (buffer if is_server(buffer) else f"sqlite:///{buffer}").replace("%", "%%")
        ini.write_text(re.sub("(?m)^sqlalchemy.url = .*", f"sqlalchemy.url = {url}", ini.read_text()))
        env = folder / "history" / "env.py"
        for old, new in (
            ("target_metadata = None\n", LINES + HOST),
            ("target_metadata=target_metadata", f"target_metadata=target_metadata, {options}"),
        ):
            assert old in env.read_text()
            env.write_text(env.read_text().replace(old, new))

    def alembic(self, *arguments: str) -> str:
        # Unmeasured: the history of this project is not ours.
        done = alembic(*arguments, cwd=self.folder, within=unmeasured())
        assert done.returncode == 0, done.stdout
        return done.stdout

    def autogenerate(self) -> str:
        """What Alembic proposes to do."""
        self.alembic("revision", "--autogenerate", "-m", "shop")
        [script] = (self.folder / "history" / "versions").glob("*.py")
        return script.read_text()


@pytest.fixture
def host(tmp_path, buffer, request):
    return Host(tmp_path / "host", buffer, OPTIONS[getattr(request, "param", "plain")])


@pytest.mark.parametrize("host", OPTIONS, indirect=True)
def test_autogenerate(host, buffer, shared_engine, shared_repository):
    """Its autogenerate leaves our tables alone, and what it makes of it our receipts, up and down."""
    receipt = a_receipt(shared_repository)
    shared_engine.dispose()
    before = everything(buffer)
    written = host.autogenerate()
    assert ["goods", "sales", "sales", "goods"] == re.findall(r"op\.\w+_table\('(\w+)'", written)
    assert not re.search(r"dlq|buffer_|config|kkt_buffer_version|_table\('receipts", written)
    host.alembic("upgrade", "head")
    assert "No new upgrade operations detected" in host.alembic("check")
    assert set(before) <= set(everything(buffer))
    with shared_repository.transaction() as session:
        session.execute(text("INSERT INTO sales (receipt_id) VALUES (:id)"), {"id": receipt.id})
    check(shared_engine)
    shared_engine.dispose()
    host.alembic("downgrade", "base")
    check(shared_engine)
    assert shared_repository.get_receipt_by_id(receipt.id) is not None


def test_our_check(host, buffer):
    """Our own `alembic check` leaves the tables of the host alone."""
    host.autogenerate()
    host.alembic("upgrade", "head")
    done = alembic("-x", f"db={buffer}", "check")
    assert done.returncode == 0, done.stdout
    assert "No new upgrade operations detected" in done.stdout
