#!/usr/bin/env bash
# Checks style, types and import direction, then runs the tests; arguments go to pytest.
set -euo pipefail

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
run_from_root pytest "$@"
