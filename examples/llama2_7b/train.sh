#!/usr/bin/env bash
# Trains on one or several nodes. Run it on each node with the same arguments.
#
#   examples/llama2_7b/train.sh 7b.yaml --save /shared/zh --load /shared/zh
#
#   NNODES          number of nodes (1), or a range such as 2:4 for an elastic job
#   GPUS_PER_NODE   number of processes per node (8)
#   RDZV_ENDPOINT   host:port of one of the nodes (localhost:29500)
#   MAX_RESTARTS    how often a failed job is restarted from its last checkpoint (3)
#   GRACE_SECONDS   time for saving after SIGTERM or SIGUSR1, in seconds (100)
#   LAUNCHER        torchrun, or a launcher with the same arguments, such as "ft_launcher ..."
#
# A lost node can rejoin the job: start the script on it again. The node of RDZV_ENDPOINT hosts the
# rendezvous; if it is lost, the job ends and must be started again. If hosts have no DNS names, set
# on each node
#
#   PET_RDZV_CONF   is_host=1 on the node of RDZV_ENDPOINT, is_host=0 on the others (torchrun would
#                   otherwise compare host names to find out whether this node is the endpoint)
#   PET_LOCAL_ADDR  address of this node
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the network interface with that address
#
# With --dry-run among the arguments, the job is only checked on this machine and not launched.
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

# Overlapped collectives require kernels to be scheduled in the order of their launch.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# torchrun forwards these signals to the processes, which save and exit within the given time. Older
# versions of torch ignore these variables: SIGUSR1 then ends the job at once, and SIGTERM allows
# 30 s.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-100}

# Makes torchrun use a new store for each attempt. The default is a store shared by the agents: the
# address of the first attempt is kept, and a node that rejoins waits until the whole job ends.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# shellcheck disable=SC2086  # LAUNCHER may contain arguments
exec ${LAUNCHER:-torchrun} \
    --nnodes "${NNODES:-1}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:29500}" \
    --rdzv-id "${RDZV_ID:-chatflow}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m megatron_chatflow.pretrain --config "$config" "$@"
