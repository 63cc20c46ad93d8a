"""`glm-rlhf plan`: estimates of memory and time of PPO on a cluster, fastest layouts, config and scripts.

Imports `cost`, `config` and below; no command.
"""
