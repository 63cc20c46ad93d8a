"""The heads of a model: vocabulary head and scalar head."""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear


class VocabularyHead(ColumnParallelLinear):
    """This rank's rows of the vocabulary head, for losses that compute logits chunk by chunk.

    Calling the module returns the weight: Megatron-core's hook that gathers weights runs on the call.
    """

    def forward(self) -> torch.Tensor:
        """Return the weight, [V / tp, D]."""
        return self.weight


class ValueHead(torch.nn.Module):
    """A linear map from hidden state to a scalar, in fp32; equal on all tensor-parallel ranks."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return values [T], fp32."""
        return torch.nn.functional.linear(hidden_TD.float(), self.weight, self.bias).squeeze(-1)
