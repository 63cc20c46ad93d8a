"""The next-token loss that training commands run, as a step of `run_micro_batches`."""

from collections.abc import Callable, Sequence

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.model.token_outputs import next_tokens
from glm_rlhf.parallel.model.vocab_parallel_loss import linear_nll_loss
from glm_rlhf.parallel.runtime.topology import Topology


def nll_step(
    batches: Sequence[PackedTokens], denominator: float, topology: Topology
) -> Callable[[GLMModel, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the step whose loss is -logprob summed over tokens ÷ `denominator`, by the fused kernel."""
    targets = [next_tokens(batch) for batch in batches]

    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = linear_nll_loss(
            hidden_TD,
            model.output_weight_VD,
            targets[index],
            group=topology.tp_group,
            denominator=denominator,
        )
        return loss, loss.detach()

    return step
