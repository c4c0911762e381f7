#!/bin/sh
# Make a virtual environment with this project and some of its extras in it: venv.sh PYTHON VENV CONSTRAINTS EXTRAS
set -eu
python=$1 venv=$2 constraints=$3 extras=$4

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "kkt-buffer needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    echo "Name another with: make PYTHON=/path/to/python3" >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    install="apt-get update && apt-get install -y python3-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Python has no venv here; installing it." >&2
        sh -c "$install" >&2
    else
        echo "Python has no venv here. Install it with: sudo sh -c '$install'" >&2
        exit 1
    fi
fi

echo "Setting up $venv (once; takes a minute)."
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
touch "$venv/.installed"
