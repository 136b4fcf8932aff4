#!/usr/bin/env bash
# Lint, types and tests in an own virtual environment, made on the first run and reused while its requirements stay.
#
#   bash tests/run.sh [pytest arguments]     all of it; arguments go to pytest
#   PYTHON=python3.12 bash tests/run.sh      with another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=examples/environment.sh
source examples/environment.sh
version="$(check_python "${PYTHON:-python3}")" || exit 2
venv=".venv-tests-$version"
make_environment "$venv" test,cli
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
