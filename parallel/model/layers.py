"""The layer specification of a GLM: Megatron-core's transformer layer with our norm, attention and gate."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from glm_rlhf.kernels.layers.rmsnorm import rms_norm
from glm_rlhf.kernels.layers.swiglu import swiglu
from glm_rlhf.parallel.model.attention import GLMSelfAttention


def block_submodules(
    config: TransformerConfig, num_layers: int, *, has_sandwich_norms: bool
) -> TransformerBlockSubmodules:
    """Return the specification of Megatron-core's block with the `num_layers` layers of one model chunk."""
    add = ModuleSpec(module=ResidualAdd, params={"config": config, "has_norm": has_sandwich_norms})
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=GLMSelfAttention),
            self_attn_bda=add,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.Module):
    """x / √(mean(x²) + ε) · weight over the hidden dim, computed in fp32.

    With sequence parallelism each rank normalises its own tokens; the attribute `sequence_parallel` makes
    Megatron-core sum the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised tensor, shape and dtype of `hidden` [..., D]."""
        return rms_norm(hidden, self.weight, epsilon=self.epsilon)


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of a packed [gate | up] projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return [..., F] of [..., 2F]."""
        return swiglu(gate_up)


class ResidualAdd(torch.nn.Module):
    """residual + branch, the branch normalised first if the model has sandwich norms.

    Replaces the bias-dropout-add of Megatron-core's layer: GLM has neither bias nor dropout.
    """

    def __init__(self, config: TransformerConfig, has_norm: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else None

    def forward(self, *_training_fused: Any) -> Callable[..., torch.Tensor]:
        """Return the function that adds, called by Megatron-core's layer."""
        return self._add

    def _add(
        self, branch_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, _dropout: float
    ) -> torch.Tensor:
        branch, _ = branch_with_bias
        return residual + (branch if self.norm is None else self.norm(branch))
