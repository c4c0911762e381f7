#!/bin/sh
# Build the wheel, install it into an empty environment and use it there, away from the repository: wheel.sh PYTHON
set -eu
python=$1
here=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --no-isolation --wheel --outdir "$work/dist" "$here" >"$work/build.log" 2>&1 || {
    cat "$work/build.log" >&2
    exit 1
}
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$here/.ci/constraints.txt" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/kkt-buffer" --version
"$work/venv/bin/python" -W error -m kkt_buffer upgrade shop/buffer.db
"$work/venv/bin/python" -W error -m kkt_buffer status shop/buffer.db --json
"$work/venv/bin/python" -W error - <<'END'
import importlib.util

import kkt_buffer
from kkt_buffer import buffer

assert "site-packages" in kkt_buffer.__file__, kkt_buffer.__file__
engine = buffer.init_buffer_db("shop/buffer.db")
kkt_buffer.check(engine)
kkt_buffer.upgrade(engine)
receipt_id = buffer.insert_receipt({"pos_id": "till-1", "fiscal_doc": {"totalSum": 6490}})
assert [receipt.id for receipt in buffer.get_pending_receipts()] == [receipt_id]
buffer.close_buffer_db()
assert importlib.util.find_spec("_kkt_buffer_pytest"), "the wheel has no pytest plugin"
END
echo "wheel: upgrade, check, status and a receipt work from the wheel alone"
