#!/usr/bin/env bash
# Trains with dense DDP and with top-Q gradients and compares them; --help lists the options.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up train
exec "$venv_python" "$root/launch/compare.py" "$@"
