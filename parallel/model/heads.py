"""The heads of a model: vocabulary head and scalar head."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.weight_map import has_scalar_bias, trains_scalar_bias


class VocabularyHead(ColumnParallelLinear):
    """This rank's rows of the vocabulary head, for losses that compute logits chunk by chunk.

    Calling the module returns the weight: Megatron-core's hook that gathers weights runs on the call.
    """

    def forward(self) -> torch.Tensor:
        """Return the weight, [V / tp, D]."""
        return self.weight


class ValueHead(torch.nn.Module):
    """A linear map from hidden state to a scalar, in fp32; equal on all tensor-parallel ranks."""

    def __init__(self, glm: GLMConfig, device: torch.device) -> None:
        """Take the head's form from the model's config; weight and bias are 0.

        Args:
            glm: shape of the model.
            device: of the parameters.
        """
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, glm.hidden_size, dtype=torch.float32, device=device))
        self.bias: torch.nn.Parameter | None = None
        if has_scalar_bias(glm):
            bias = torch.zeros(1, dtype=torch.float32, device=device)
            self.bias = torch.nn.Parameter(bias, requires_grad=trains_scalar_bias(glm))

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return values [T], fp32."""
        return torch.nn.functional.linear(hidden_TD.float(), self.weight, self.bias).squeeze(-1)
