#!/usr/bin/env bash
# Checks style, types and import direction, then runs the tests, a file of them for each core and up
# to four at a time; arguments go to pytest, -n 0 among them for all in one process.
set -euo pipefail

# hundreds of processes import the same files, which are then compiled once
unset PYTHONDONTWRITEBYTECODE
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up train ps test

run_from_root() {
    echo "+ $*" >&2
    (cd "$root" && "$venv_python" -m "$@")
}

run_from_root ruff check
run_from_root ruff format --check
run_from_root mypy
echo "+ lint-imports" >&2
(cd "$root" && "$venv_python" "$venv/bin/lint-imports")
# in the order of their names: the files with the longest tests come first, many short ones last
run_from_root pytest -n "$(nproc)" --maxprocesses 4 --dist loadgroup --no-loadscope-reorder "$@"
