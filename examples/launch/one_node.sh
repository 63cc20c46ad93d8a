#!/usr/bin/env bash
# One node, a rank for each of its GPUs:
#   GPUS=8 examples/launch/one_node.sh ppo examples/chatglm3_6b/ppo_8gpu.yaml
# DRY_RUN=1 prints the command instead of running it. RESTARTS: how often torchrun restarts all ranks.
set -euo pipefail
if (($# == 0)); then
    echo "usage: $0 COMMAND [config.yaml] [section.key=value …]" >&2
    exit 2
fi
# Seconds that torchrun leaves the ranks to save after a signal; where it does not read this, 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
launch=(torchrun --standalone --nproc-per-node="${GPUS:-8}" --max-restarts="${RESTARTS:-0}" -m glm_rlhf.engine "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
    echo "${launch[*]}"
else
    exec "${launch[@]}"
fi
