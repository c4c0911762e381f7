"""Processes that claim from one file."""

import contextlib

from builders import NOON, new_receipt, start_python


def test_processes(path, file_repository):
    """Four processes never hold the same receipt."""
    made = file_repository.insert_receipts(new_receipt() for _ in range(40))
    program = """
        import sys
        from kkt_buffer import ReceiptRepository, create_buffer_engine
        repository = ReceiptRepository(create_buffer_engine(sys.argv[1]), now=lambda: float(sys.argv[2]))
        sys.stdin.readline()
        while batch := repository.claim_pending(3):
            print(*(receipt.id for receipt in batch), sep="\\n")
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start_python(program, path, NOON, stdin=-1)) for _ in range(4)]
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        held = [line.strip() for worker in workers for line in worker.stdout]
    assert sorted(made) == sorted(held)
