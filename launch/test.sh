#!/usr/bin/env bash
# Checks style, types and import direction, then runs the tests, three files of them for two cores
# and up to four at a time; arguments go to pytest, -n 0 among them for all in one process.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up train ps test

run_from_root() {
    echo "+ $*" >&2
    (cd "$root" && "$venv_python" -m "$@")
}

run_from_root ruff check
run_from_root ruff format --check
echo "+ lint-imports" >&2
(cd "$root" && "$venv_python" "$venv/bin/lint-imports")
# beside the first tests: it takes one core, and minutes the first time
echo "+ mypy" >&2
(cd "$root" && exec "$venv_python" -m mypy) &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
# in the order of their names: the files with the longest tests come first, many short ones last
tests=0
# more than there are cores, since some wait for a link, a lease or a clock
run_from_root pytest -n $((($(nproc) * 3 + 1) / 2)) --maxprocesses 4 --dist loadgroup --no-loadscope-reorder "$@" ||
    tests=$?
wait "$types" || { echo "mypy has found errors: see above" >&2 && exit 1; }
exit "$tests"
