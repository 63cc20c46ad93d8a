"""Scores of whole answers by a reward model."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.batching import deal_by_tokens, pack_by_tokens
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.pipeline.scoring import score_rows
from glm_rlhf.parallel.runtime.topology import Topology


def score_sequences(
    chunks: Sequence[GLMModel],
    sequences: Sequence[Sequence[int]],
    *,
    topology: Topology,
    max_tokens: int,
    records: Sequence[int],
) -> list[float]:
    """Return the score of each sequence, read at its last token, the same on every rank.

    Every rank of the topology calls this with the same sequences; each copy of the model takes a share, and
    the data-parallel group adds up 8 bytes a sequence.

    Args:
        chunks: this rank's chunks of a reward model.
        sequences: ids of prompt and answer, at least one each.
        topology: layout and groups.
        max_tokens: of a micro-batch; a longer sequence is one of its own.
        records: the record of each sequence by its index in the file, for the message of an error.

    Raises:
        ValueError: a score is NaN or Inf; on every rank, the message names its record.
    """
    lengths = [len(sequence) for sequence in sequences]
    mine = deal_by_tokens(lengths, topology.dp)[topology.dp_rank]
    groups = pack_by_tokens([lengths[i] for i in mine], max_tokens=max_tokens)
    micro_batches = [
        pack([torch.tensor(sequences[mine[i]]) for i in group], multiple=topology.layout.token_multiple)
        for group in groups
    ]
    scores_B = torch.zeros(len(sequences), dtype=torch.float64, device=topology.device)
    if micro_batches:
        rows = score_rows(chunks, [packed.to(topology.device) for packed in micro_batches], topology=topology)
        for group, packed, row_T in zip(groups, micro_batches, rows, strict=True):
            last_B = torch.tensor(packed.boundaries[1:]) - 1
            scores_B[[mine[i] for i in group]] = row_T[last_B.to(row_T.device)].double()
    if topology.dp > 1:
        dist.all_reduce(scores_B, group=topology.dp_group)
    scores = scores_B.tolist()
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(
                f"the reward model's score of an answer to record {records[index]} is {score}: its "
                "weights may be damaged, or overflow at this precision"
            )
    return scores
