"""What models say of all sequences of rollouts, as streams beside their tokens."""

from collections.abc import Sequence, Set

import torch

from glm_rlhf.engine.scoring.overlapped_scores import OverlappedScores
from glm_rlhf.engine.scoring.packed_batches import PackedBatch, batches_of_rollouts
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.pipeline.scoring import score_rows, score_tokens
from glm_rlhf.parallel.runtime.topology import Topology


def stream_logprobs(
    chunks: Sequence[GLMModel],
    rollouts: Rollouts,
    batches: Sequence[PackedBatch],
    mask_T: torch.Tensor,
    *,
    topology: Topology,
    overlapped: OverlappedScores | None = None,
) -> torch.Tensor:
    """Return the logprobs of the tokens in `mask_T` at the rollouts' temperature, fp32 [T], 0 elsewhere.

    Ranks that share the sequences call this together.

    Args:
        chunks: this rank's chunks of a policy.
        rollouts: the sequences.
        batches: what to score, with the stream `mask`; what is neither in them nor in `overlapped` is 0.
        mask_T: whose logprobs are wanted, bool [T].
        topology: layout and groups.
        overlapped: what the model has scored while answers were generated.
    """
    logprobs_T = _begun(mask_T, overlapped)
    scored = score_tokens(
        chunks,
        [batch.packed for batch in batches],
        topology=topology,
        wanted=[batch.streams["mask"] for batch in batches],
        temperature=rollouts.temperature,
    )
    for batch, (found_T, _) in zip(batches, scored, strict=True):
        batch.put(found_T, logprobs_T)
    return torch.where(mask_T, logprobs_T, 0.0)


def stream_rows(
    chunks: Sequence[GLMModel],
    rollouts: Rollouts,
    *,
    max_tokens: int,
    topology: Topology,
    overlapped: OverlappedScores | None = None,
) -> torch.Tensor:
    """Return the scalar that a critic or reward model reads off after each token, fp32 [T].

    Ranks that share the sequences call this together; arguments as above.
    """
    scored = overlapped.sequences if overlapped else frozenset()
    batches = batches_of_rollouts(
        rollouts, numbers_without(rollouts, scored), max_tokens=max_tokens, topology=topology
    )
    rows_T = _begun(rollouts.tokens_T, overlapped)
    found = score_rows(chunks, [batch.packed for batch in batches], topology=topology)
    for batch, rows in zip(batches, found, strict=True):
        batch.put(rows, rows_T)
    return rows_T


def _begun(like_T: torch.Tensor, overlapped: OverlappedScores | None) -> torch.Tensor:
    """Return the stream as far as it is known."""
    return (
        torch.zeros(like_T.shape, device=like_T.device) if overlapped is None else overlapped.found_T.clone()
    )


def numbers_without(rollouts: Rollouts, excluded: Set[int]) -> list[int]:
    """Return the sequences' numbers from 0, but for some."""
    return [number for number in range(rollouts.num_sequences) if number not in excluded]
