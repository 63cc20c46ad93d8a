"""What models say of all sequences of rollouts, as streams beside their tokens."""

from collections.abc import Collection, Sequence

import torch

from glm_rlhf.engine.scoring.overlapped_scores import OverlappedScores
from glm_rlhf.engine.scoring.rollout_batches import StreamBatch, stream_batches
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.pipeline.scoring import score_rows, score_tokens
from glm_rlhf.parallel.runtime.topology import Topology


def batches_of(
    rollouts: Rollouts, *, max_tokens: int, topology: Topology, without: Collection[int] = ()
) -> list[StreamBatch]:
    """Return the sequences, but for those of the numbers `without`, in micro-batches of `max_tokens`."""
    return stream_batches(
        rollouts.tokens_T,
        rollouts.lengths,
        max_tokens=max_tokens,
        multiple=topology.layout.token_multiple,
        indices=[number for number in range(rollouts.num_sequences) if number not in without],
    )


def stream_logprobs(
    chunks: Sequence[GLMModel],
    rollouts: Rollouts,
    batches: Sequence[StreamBatch],
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
        batches: those that are to be scored; what is in none of them and not early is 0.
        mask_T: whose logprobs are wanted, bool [T].
        topology: layout and groups.
        early: what the model has said of others.
    """
    logprobs_T = _begun(mask_T, overlapped)
    scored = score_tokens(
        chunks,
        [batch.packed for batch in batches],
        topology=topology,
        wanted=[batch.take(mask_T) for batch in batches],
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
    scored = overlapped.sequences if overlapped else ()
    batches = batches_of(rollouts, max_tokens=max_tokens, topology=topology, without=scored)
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
