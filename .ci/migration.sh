#!/bin/sh
# Write the next migration, numbered, from what the models and the migrations so far differ in: migration.sh BIN MESSAGE
set -eu
bin=$1
message=$2
[ -n "$message" ] || { echo 'say what it does: make migration m="Add the colour of a receipt."' >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
last=$(ls migrations/versions | sed -n 's/^\([0-9]\{4\}\)_.*\.py$/\1/p' | sort | tail -1)
next=$(printf '%04d' $(($(echo "$last" | sed 's/^0*//') + 1)))
"$bin/alembic" -x "db=$work/buffer.db" upgrade head
"$bin/alembic" -x "db=$work/buffer.db" revision --autogenerate --rev-id "$next" -m "$message"
if [ -x "$bin/ruff" ]; then
    "$bin/ruff" format --quiet "migrations/versions/${next}_"*.py
else
    echo "There is no ruff here, so it is not formatted." >&2
fi
echo "Read it, and keep the rules at its top."
