#!/bin/sh
# What LocalAI starts: run.sh --addr HOST:PORT. Uses the environment that make sets up in this repository.
set -eu
here=$(dirname "$(readlink -f "$0")")
python="$here/../../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$here/backend.py" "$@"
