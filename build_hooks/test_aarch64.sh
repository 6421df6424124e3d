#!/usr/bin/env bash
# Runs the kernels' tests on an emulated aarch64: qemu-user and a Python for it from Debian's
# packages, the library from the wheel that build_hooks/wheels.py has made. Takes minutes, no root.
#
#   build_hooks/test_aarch64.sh dist/topq_dist-*-manylinux2014_aarch64.whl [PYTEST_ARGUMENT ...]
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
wheel=$(realpath "$1")
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
mkdir -p apt/lists/partial apt/cache/archives/partial machine packages site

# another architecture's packages, without making it one of this machine's
foreign=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::status=/dev/null
    -o "Dir::State::lists=$scratch/apt/lists" -o "Dir::Cache=$scratch/apt/cache")
echo "fetching qemu-user and an aarch64 Python" >&2
apt-get "${foreign[@]}" update -qq 2>/dev/null
apt-get "${foreign[@]}" download -qq libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 libbz2-1.0 \
    liblzma5 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal 2>/dev/null
for package in *_arm64.deb; do
    dpkg-deb -x "$package" machine
done
apt-get download -qq qemu-user-static 2>/dev/null
dpkg-deb -x qemu-user-static*.deb .
"$python" -m pip install --quiet --target site --python-version 3.11 --only-binary :all: \
    --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_28_aarch64 -c "$root/constraints.txt" numpy hypothesis pytest

"$python" -m zipfile -e "$wheel" wheel
export TOPQ_NATIVE_LIBRARY=$scratch/wheel/topq_dist/compress/native/_topq_kernels.so
export PYTHONPATH=$scratch/site:$root:$root/tests PYTHONDONTWRITEBYTECODE=1
cd "$root"
# without conftest.py, which wants torch; nor has an emulated machine deadlines
"$scratch/usr/bin/qemu-aarch64-static" -L "$scratch/machine" "$scratch/machine/usr/bin/python3.11" \
    -m pytest -c /dev/null --rootdir "$root" --noconftest -p no:cacheprovider -q --hypothesis-profile=ci \
    tests/compress/native/test_native_*.py "$@"
