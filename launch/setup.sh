# Sourced by train.sh and test.sh: `set_up train test` leaves $venv_python, a Python of .venv with
# those extras of the project installed, at once where that was done before. PYTHON names the
# interpreter that makes .venv (python3).

# what is installed is compiled when it is first imported, half a minute sooner than all of it, and
# kept for the processes that follow
unset PYTHONDONTWRITEBYTECODE
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
venv_python=$venv/bin/python

set_up() {
    make_venv
    # the folder is part of it, since an editable install points there, and so are the kernels' C
    # and whether it is compiled
    local wanted
    wanted=$(printf '%s\n' "$root" "${TOPQ_NATIVE:-}" | cat - "$root/pyproject.toml" \
        "$root/constraints.txt" "$root"/build_hooks/*.py \
        "$root"/topq_dist/compress/native/*.[ch] | cksum)
    local extra missing=()
    for extra in "$@"; do
        if [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" != "$wanted" ]; then
            missing+=("$extra")
        fi
    done
    if [ ${#missing[@]} -eq 0 ]; then
        return
    fi
    local extras
    extras=$(IFS=, && printf '%s' "$*")
    echo "installing topq-dist[$extras] into $venv (once; torch alone is some hundred MB)" >&2
    "$venv_python" "$root/build_hooks/compile_kernels.py" --describe
    "$venv_python" -m pip install --quiet --disable-pip-version-check \
        --no-compile -c "$root/constraints.txt" -e "$root[$extras]"
    for extra in "$@"; do
        printf '%s\n' "$wanted" >"$venv/.installed-$extra"
    done
}

make_venv() {
    if "$venv_python" -m pip --version >/dev/null 2>&1; then
        check_version "$venv_python" "remove $venv, then set PYTHON to a newer interpreter"
        return
    fi
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        give_up "$python: not found: expected Python 3.11 or newer (sudo apt install python3)"
    check_version "$python" "set PYTHON to a newer interpreter"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        give_up "$python has no venv module: sudo apt install python3-venv"
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
}

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        give_up "$1 is $("$1" --version 2>&1): expected Python 3.11 or newer; $2"
}

give_up() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}
