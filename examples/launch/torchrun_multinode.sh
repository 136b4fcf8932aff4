#!/usr/bin/env bash
# One node's part of a training run over several nodes: start the same line on each, with another NODE_RANK.
#
#   export NNODES=2 NODE_RANK=0 MASTER_ADDR=node0.cluster    # on the other node NODE_RANK=1
#   export RECIPE=examples/recipes/qwen3-32b_16xh100.args
#   bash examples/launch/torchrun_multinode.sh --model CHECKPOINT --rollouts rollouts.jsonl --save out --resume  # GPU only
#
# `--dry-run` as the first argument prints the command and starts nothing.
#
#   NNODES        nodes of the run                         needed
#   NODE_RANK     this node, from 0; Slurm's SLURM_NODEID and Kubernetes' JOB_COMPLETION_INDEX are known   needed
#   MASTER_ADDR   name or address of node 0                needed
#   MASTER_PORT   of the rendezvous on node 0              29500
#   NPROC         processes of this node                   gpu: as many as it has GPUs
#   RECIPE        file with flags, before those that are typed; # starts a comment   none
#   RUN_ID        the same on all nodes, another for each run that MASTER_ADDR hosts   megatron-prefix
#   START_SECONDS nodes wait so long for one another       900
#   PROGRAM       what torchrun starts                     -m megatron_prefix train
#   PYTHON        interpreter                              python3
#
# SIGTERM, SIGINT and SIGUSR1 make `train` save after the step that it is in; further ones are ignored while it does.
# Exit code 0: done. 75: stopped by such a signal, the same line goes on. 2: a setting is missing. Else: it failed.
set -euo pipefail

dry_run=""
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi

NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-}}}"
bad=()
[[ "${NNODES:-}" =~ ^[1-9][0-9]*$ ]] || bad+=("NNODES '${NNODES:-}': set it to the number of nodes, 1 or more")
[[ "$NODE_RANK" =~ ^[0-9]+$ ]] || bad+=("NODE_RANK '$NODE_RANK': set it to the number of this node, from 0")
[ -n "${MASTER_ADDR:-}" ] || bad+=("MASTER_ADDR '': set it to the name or address of node 0")
[ -z "${RECIPE:-}" ] || [ -r "$RECIPE" ] || bad+=("RECIPE '$RECIPE': there is no such file, or it cannot be read")
if [ "${#bad[@]}" -eq 0 ] && [ "$NODE_RANK" -ge "$NNODES" ]; then
    bad+=("NODE_RANK '$NODE_RANK': NNODES is $NNODES, so set it to at most $((NNODES - 1))")
fi
if [ "${#bad[@]}" -gt 0 ]; then
    printf 'torchrun_multinode.sh: %s\n' "${bad[@]}" >&2
    exit 2
fi

recipe=()
if [ -n "${RECIPE:-}" ]; then
    while read -r line || [ -n "$line" ]; do
        read -ra words <<<"${line%%#*}"
        recipe+=(${words[@]+"${words[@]}"})
    done <"$RECIPE"
fi
read -ra program <<<"${PROGRAM:--m megatron_prefix train}"

# The rendezvous numbers the nodes itself; which one hosts it is said here, since a host may not know its own name.
seconds="${START_SECONDS:-900}"
host=false
[ "$NODE_RANK" -ne 0 ] || host=true
command=(
    "${PYTHON:-python3}" -m torch.distributed.run
    --nnodes "$NNODES"
    --nproc-per-node "${NPROC:-gpu}"
    --rdzv-backend c10d
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-id "${RUN_ID:-megatron-prefix}"
    --rdzv-conf "is_host=$host,read_timeout=$seconds,join_timeout=$seconds"
    "${program[@]}" ${recipe[@]+"${recipe[@]}"} "$@"
)
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

say() {
    echo "== node $NODE_RANK of $NNODES: $*" >&2
}

stopped_by=""
agent=""
interrupted="" # by a signal, which ends `wait` early

# Once, and to the workers: torchrun would kill them 30 seconds after its own signal, and a second one ends `train` at
# once. torchrun has its own session, so that a signal to the process group (Ctrl-C, Slurm) comes here only.
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {
    interrupted=1
    [ -z "$stopped_by" ] || return 0
    stopped_by="$1"
    [ -n "$agent" ] || return 0
    local workers
    workers="$(cat "/proc/$agent/task/"*/children 2>/dev/null || true)"
    say "$1: the run saves after its step and stops"
    # shellcheck disable=SC2086 # one word for each process; torchrun itself where it has not started any
    kill -TERM ${workers:-$agent} 2>/dev/null || true
}
for name in TERM INT USR1; do
    # shellcheck disable=SC2064 # the name of this turn
    trap "stop SIG$name" "$name"
done

# Megatron's overlap of communication and products relies on one connection to the GPU.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
setsid "${command[@]}" &
agent=$!
while :; do
    interrupted=""
    status=0
    wait "$agent" || status=$?
    [ -n "$interrupted" ] || break
done
if [ -n "$stopped_by" ]; then
    if [ "$status" -eq 0 ]; then
        say "stopped by $stopped_by, saved; the same line goes on"
    else
        say "stopped by $stopped_by without a save (torchrun's exit code $status); the same line goes on from the last" \
            "checkpoint"
    fi
    exit 75
fi
if [ "$status" -ne 0 ]; then
    say "failed, torchrun's exit code $status. The first error, here or on another node, says why; with --save and" \
        "--resume the same line goes on from the last checkpoint"
fi
exit "$status"
