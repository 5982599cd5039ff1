#!/usr/bin/env bash
# Trains on one or many nodes; run it on each node with the same arguments.
#
#   examples/llama2_7b/train.sh 7b.yaml --save /shared/zh --load /shared/zh
#
#   NNODES          nodes of the job (1), or a range such as 2:4 for an elastic one
#   GPUS_PER_NODE   processes a node (8)
#   RDZV_ENDPOINT   host:port of one of the nodes (localhost:29500)
#   MAX_RESTARTS    how often a failed job is started again from its last checkpoint (3)
#   GRACE_SECONDS   for saving after SIGTERM or SIGUSR1 (100)
#   LAUNCHER        torchrun, or another that takes its arguments, such as "ft_launcher ..."
#
# With --dry-run among the arguments the job is checked here and nothing is launched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
config=$1
shift
[ -f "$config" ] || config=$here/$config

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then
        nodes=${NNODES:-1}
        exec python -m megatron_chatflow.pretrain --config "$config" "$@" \
            --world-size $((${nodes##*:} * ${GPUS_PER_NODE:-8}))
    fi
done

# Kernels of overlapped collectives have to be scheduled in the order in which they are launched.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# Of torchrun: pass these signals on to the processes, which save and leave, and give them the time.
# Where torch is too old to know of them, SIGUSR1 ends the job at once and SIGTERM grants 30 s.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-100}

# shellcheck disable=SC2086  # a launcher may carry arguments of its own
exec ${LAUNCHER:-torchrun} \
    --nnodes "${NNODES:-1}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:29500}" \
    --rdzv-id "${RDZV_ID:-chatflow}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m megatron_chatflow.pretrain --config "$config" "$@"
