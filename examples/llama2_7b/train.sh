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
# A node that was lost may come back: start the script on it again. The node of RDZV_ENDPOINT holds
# the rendezvous; without it the job ends and is started anew. Where hosts have no DNS names, set on
# each node
#
#   PET_RDZV_CONF   is_host=1 on the node of RDZV_ENDPOINT, is_host=0 on the others (of torchrun,
#                   which otherwise looks up by name whether the endpoint is this node)
#   PET_LOCAL_ADDR  the node's own address
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the network interface with that address
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

# Of torchrun: a store for each attempt. The agents' shared store, the default, keeps the address of
# the first attempt, and a node that comes back waits for one until the whole job ends.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# shellcheck disable=SC2086  # a launcher may carry arguments of its own
exec ${LAUNCHER:-torchrun} \
    --nnodes "${NNODES:-1}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:29500}" \
    --rdzv-id "${RDZV_ID:-chatflow}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m megatron_chatflow.pretrain --config "$config" "$@"
