"""From hidden states over the vocabulary to log-probabilities and losses, without a matrix of logits.

Each op stands beside its plain fp32 reference.

Imports `dispatch`; `linear_ppo_loss` imports the policy loss of `rl` too.
"""
