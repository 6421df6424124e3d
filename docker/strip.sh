#!/bin/sh
# Removes from the virtual environment $1 what nothing reads at run time: tests, C++ headers and
# torch's own tools. torch will not start without torch_shm_manager.
set -eu

site=$(echo "$1"/lib/python3*/site-packages)
rm -rf "$site"/torch/test "$site"/torch/include "$site"/torch/share
[ ! -d "$site"/torch/bin ] || find "$site"/torch/bin -type f ! -name torch_shm_manager -delete
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" -name '*.a' -delete
