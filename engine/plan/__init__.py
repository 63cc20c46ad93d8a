"""`glm-rlhf plan`: memory and time of PPO on a cluster, the fastest layouts, config and scripts.

Imports `cost`, `config` and below; no command.
"""
