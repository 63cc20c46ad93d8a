"""Fused kernels for RLHF on packed sequences: Triton on CUDA, fp32 torch on CPU, one signature.

These are the public functions; each is defined, with its kernels, in the module of its name.
"""

from glm_rlhf.kernels.adam.adamw import adamw
from glm_rlhf.kernels.adam.tensor_table import AdamWTable
from glm_rlhf.kernels.decoding.paged_attention import paged_attention
from glm_rlhf.kernels.decoding.paged_write import paged_write
from glm_rlhf.kernels.decoding.sampling import sample
from glm_rlhf.kernels.layers.rmsnorm import add_rms_norm, rms_norm
from glm_rlhf.kernels.layers.rope import rope, rope_qkv, rope_qkv_in_place, rope_table
from glm_rlhf.kernels.layers.swiglu import swiglu
from glm_rlhf.kernels.lm_head.linear_logprob import linear_logprob
from glm_rlhf.kernels.lm_head.linear_ppo_loss import linear_nll_loss, linear_ppo_loss
from glm_rlhf.kernels.lm_head.logprob import logprobs_from_logits
from glm_rlhf.kernels.rl.advantages import ppo_advantages, whiten
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss
from glm_rlhf.kernels.rl.value_loss import ppo_value_loss

__all__ = [
    "AdamWTable",
    "adamw",
    "add_rms_norm",
    "linear_logprob",
    "linear_nll_loss",
    "linear_ppo_loss",
    "logprobs_from_logits",
    "paged_attention",
    "paged_write",
    "ppo_advantages",
    "ppo_policy_loss",
    "ppo_value_loss",
    "rms_norm",
    "rope",
    "rope_qkv",
    "rope_qkv_in_place",
    "rope_table",
    "sample",
    "swiglu",
    "whiten",
]
