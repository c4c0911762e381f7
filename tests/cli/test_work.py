"""`kkt-buffer work`: a worker as a command."""

import logging
import signal
import sys

import pytest
from builders import a_receipt, is_server, shown, start_python

from kkt_buffer.rotation import backups

SHOP = """
import os, signal

class LineDown(Exception):
    pass

def send(receipt):
    if receipt.pos_id == "offline":
        os.kill(os.getpid(), signal.SIGTERM)
        raise LineDown("no route")
    return 5

async def later(receipt):
    return 5
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the module `shop`, which is the present one."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    logger = logging.getLogger("kkt_buffer")
    level = logger.level
    yield tmp_path
    logger.setLevel(level)
    sys.modules.pop("shop", None)


class TestWork:
    def test_delivers(self, shop, buffer, shared_repository, done):
        """It delivers until it is asked to stop, and does the maintenance of the day first: of a file, a backup too."""
        made = [a_receipt(shared_repository, pos_id=till).id for till in ("a", "offline", "b")]
        options = ["--outage", "shop:LineDown", "--maintenance-at", "00:00", "--concurrency", "1"]
        backup = [] if is_server(buffer) else ["--backup-to", "backups"]
        assert "" == done("work", "shop:send", "--db", buffer, *options, *backup)
        status = [shared_repository.get_receipt_by_id(one).status for one in made]
        assert ["synced", "pending", "pending"] == status
        assert 0 == shared_repository.get_receipt_by_id(made[1]).retry_count
        assert not backup or 1 == len(backups(shop / "backups"))

    def test_process(self, shop, buffer, shared_repository):
        """As a program: what it does is on stderr, and after SIGTERM its exit status is 0."""
        receipt = a_receipt(shared_repository)
        program = "import sys; from kkt_buffer.cli import main; sys.exit(main(sys.argv[1:]))"
        worker = start_python(program, "work", "shop:send", "--db", buffer, "--poll", "0.1", stderr=-1, cwd=shop)
        assert any(line.endswith(f"INFO delivering from {shown(buffer)} by shop:send\n") for line in worker.stderr)
        assert any(line.endswith(f"INFO receipt {receipt.id}: synced\n") for line in worker.stderr)
        worker.send_signal(signal.SIGTERM)
        printed, told = worker.communicate(timeout=20)
        assert (0, "") == (worker.returncode, printed)
        assert "INFO SIGTERM: the worker has stopped\n" in told

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("nowhere:send", "No module named 'nowhere'"),
            ("shop:nothing", "has no attribute 'nothing'"),
            ("sh op:send", "invalid format"),
        ],
    )
    def test_unknown(self, shop, buffer, refused, name, told):
        line = refused("work", name, "--db", buffer)
        assert line.startswith(f"error: {name}: expected MODULE:NAME of something that can be imported; ")
        assert told in line

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["shop:later"], "send: expected a plain function"),
            (["shop:send", "--outage", "shop:send"], "outage: expected a tuple of exception classes"),
            (["shop:send", "--batch", "0"], "batch: expected a whole number of 1 or more"),
            (["shop:send", "--backup-to", "b"], "backup_to: expected maintenance_at too"),
        ],
    )
    def test_wrong(self, shop, buffer, refused, arguments, told):
        assert told in refused("work", *arguments, "--db", buffer)

    def test_missing(self, shop, refused):
        """A buffer that is not there is not made."""
        refused("work", "shop:send", "--db", shop / "no.db")
        assert not (shop / "no.db").exists()
