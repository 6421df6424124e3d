#!/usr/bin/env bash
# Trains with dense DDP and with top-Q gradients, by a hook or a parameter server (--mode ps), and
# compares them; --help lists the options.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up train ps
exec "$venv_python" "$root/launch/compare.py" "$@"
