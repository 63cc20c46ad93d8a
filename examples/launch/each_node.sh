#!/usr/bin/env bash
# For several nodes, run it on each of them; they meet at HOST:PORT, where HOST is one of them:
#   NODES=8 HOST=node0 examples/launch/each_node.sh ppo examples/glm4_9b/ppo_64gpu.yaml
# DRY_RUN=1 prints the command instead of running it. RESTARTS: how often torchrun restarts all ranks.
set -euo pipefail
if (($# == 0)) || [[ -z "${NODES:-}" || -z "${HOST:-}" ]]; then
    echo "usage: NODES=N HOST=NAME [GPUS=8] [PORT=29500] [RUN_ID=glm-rlhf] $0 COMMAND [config.yaml] …" >&2
    exit 2
fi
# Seconds that torchrun leaves the ranks to save after a signal; where it does not read this, 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
launch=(
    torchrun --nnodes="$NODES" --nproc-per-node="${GPUS:-8}" --max-restarts="${RESTARTS:-0}"
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:${PORT:-29500}" --rdzv-id="${RUN_ID:-glm-rlhf}"
    -m glm_rlhf.engine "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
    echo "${launch[*]}"
else
    exec "${launch[@]}"
fi
