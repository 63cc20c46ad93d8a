"""What a reference makes of pairs, scored once before training and kept."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from glm_rlhf.engine.data.store.examples import Pairs
from glm_rlhf.engine.scoring.packed_batches import batches_of_records, weighted_answer_streams
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.topology import Topology

_WINDOW_BATCHES = 8  # micro-batches a data-parallel rank packs at a time: enough to fill them evenly


def score_reference(
    chunks: Sequence[GLMModel],
    records: Pairs,
    numbers: Sequence[int],
    *,
    discount: float,
    max_tokens: int,
    topology: Topology,
) -> torch.Tensor:
    """Return the (weighted) log-probabilities of answers under the reference, on the host, fp32 [n, 2].

    Row i, of record i, is sum_j discount^j · log p(token j | tokens before j) over the tokens of the chosen
    answer, and of the other; NaN for records that were not asked for. 8 bytes a pair, the same on every
    rank. Every rank of the topology calls this; the data-parallel group adds up the rows.

    Args:
        chunks: this rank's chunks of the reference, or of the policy before its first step.
        records: pairs.
        numbers: which of them to score.
        discount: in (0, 1].
        max_tokens: of a micro-batch.
        topology: layout and groups.

    Raises:
        ValueError: a log-probability is not finite; the message names the record.
    """
    scores = torch.zeros(len(records), 2, dtype=torch.float64)
    bar = tqdm(
        total=len(numbers), desc="reference", unit=" pairs", disable=None if topology.is_main_rank else True
    )
    for window in _windows(records, numbers, max_tokens * topology.dp * _WINDOW_BATCHES):
        batches = batches_of_records(
            records,
            window,
            max_tokens=max_tokens,
            topology=topology,
            streams=partial(weighted_answer_streams, discount=discount),
        )
        found = score_tokens(
            chunks,
            [batch.packed for batch in batches],
            topology=topology,
            wanted=[batch.streams["mask"] for batch in batches],
        )
        for batch, (logprobs_T, _) in zip(batches, found, strict=True):
            weighted_T = logprobs_T * batch.streams["weights"]
            sums = torch.stack([part.sum() for part in batch.packed.split(weighted_T)])
            scores[list(batch.items)] = sums.unflatten(0, (-1, 2)).cpu().double()
        bar.update(len(window))
    bar.close()
    if topology.dp > 1:
        everyone = scores.to(topology.device)
        dist.all_reduce(everyone, group=topology.dp_group)
        scores = everyone.cpu()
    for number in (~scores.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"the reference gives {records.name(number)} the log-probabilities {scores[number].tolist()}: "
            "its weights may be damaged"
        )
    is_wanted = torch.zeros(len(records), dtype=torch.bool)
    is_wanted[list(numbers)] = True
    return torch.where(is_wanted[:, None], scores, torch.nan).float()


def _windows(records: Pairs, numbers: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return `numbers` in runs of about `max_tokens` tokens."""
    windows: list[list[int]] = [[]]
    room = max_tokens
    for number in numbers:
        if room <= 0:
            windows.append([])
            room = max_tokens
        windows[-1].append(number)
        room -= int(records.lengths[number])
    return windows
