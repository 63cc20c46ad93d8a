"""Logprobs and losses over the vocabulary from hidden states, without materialising the logits.

Each op comes with its fp32 reference in plain torch.

Imports `dispatch`; `linear_ppo_loss` imports the policy loss of `rl` too.
"""
