"""What a sharded model says of given tokens, without gradients: logprobs of a policy, scalars of a critic."""

from collections.abc import Sequence

import torch

from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.heads import next_tokens, shift_to_tokens, token_logprobs, token_values
from glm_rlhf.parallel.packing import PackedTokens, share
from glm_rlhf.parallel.schedule import collect_rows, run_micro_batches
from glm_rlhf.parallel.topology import Topology


def score_tokens(
    chunks: Sequence[GLMModel],
    micro_batches: Sequence[PackedTokens],
    *,
    topology: Topology,
    wanted: Sequence[torch.Tensor] | None = None,
    temperature: float = 1.0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return log p(token t | tokens before t) and the entropy of the distribution it was drawn from.

    All ranks that share these micro-batches (the pipeline, tensor- and context-parallel groups) call
    this together; data-parallel ranks need not.

    Args:
        chunks: this rank's chunks of a policy or reference.
        micro_batches: whole sequences, on the rank's device; none is answered with none.
        topology: layout and groups.
        wanted: bool [T] a micro-batch: whose results are wanted; the others cost no head and are 0. All
            but each sequence's first when None.
        temperature: divides the logits.

    Returns:
        A micro-batch: (logprobs [T], entropy [T]) fp32, the same on every rank that called.
    """
    if not micro_batches:
        return []
    targets = [
        next_tokens(packed, None if wanted is None else wanted[index])
        for index, packed in enumerate(micro_batches)
    ]

    def step(model: GLMModel, hidden_TD: torch.Tensor, index: int) -> tuple[None, torch.Tensor]:
        mine = share(micro_batches[index], cp_rank=topology.cp_rank, cp_size=topology.layout.cp)
        logprobs, entropy = token_logprobs(
            model, hidden_TD, mine.take(targets[index]), temperature=temperature
        )
        return None, torch.stack((logprobs, entropy), dim=1)

    outputs = run_micro_batches(chunks, micro_batches, step, topology=topology, forward_only=True)
    rows = collect_rows(outputs, micro_batches, 2, topology=topology)
    return [tuple(shift_to_tokens(row).unbind(dim=1)) for row in rows]


def score_rows(
    chunks: Sequence[GLMModel], micro_batches: Sequence[PackedTokens], *, topology: Topology
) -> list[torch.Tensor]:
    """Return the scalar that a critic or reward model reads off the hidden state after each token.

    A reward model's score of a sequence is the row of its last token. A critic's value of the state in
    which token t is chosen is row t - 1: `heads.shift_to_tokens` gives it to token t.

    All ranks that share these micro-batches call this together.

    Returns:
        fp32 [T] a micro-batch, the same on every rank that called.

    Raises:
        ValueError: the model has no scalar head.
    """

    def step(model: GLMModel, hidden_TD: torch.Tensor, _index: int) -> tuple[None, torch.Tensor]:
        return None, token_values(model, hidden_TD).unsqueeze(1)

    outputs = run_micro_batches(chunks, micro_batches, step, topology=topology, forward_only=True)
    rows = collect_rows(outputs, micro_batches, 1, topology=topology)
    return [row.squeeze(1) for row in rows]
