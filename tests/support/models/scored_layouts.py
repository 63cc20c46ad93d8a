"""A model folder scored and exported in several layouts, by every rank of a pool."""

from collections.abc import Sequence
from pathlib import Path

import torch

from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import load_weights


def score_and_export(
    folder: Path,
    target: Path,
    layouts: Sequence[dict],
    sequences: list[torch.Tensor],
    expected: list[torch.Tensor],
) -> list[float]:
    """Return the worst difference of a logprob in each layout; export the model of layout i to `target/i`."""
    worst = []
    expected_T = torch.cat(expected)
    for index, axes in enumerate(layouts):
        with open_topology(Layout(**axes)) as topology:
            chunks = build_model(read_config(folder), topology, dtype=torch.float32)
            load_weights(chunks, folder)
            batch = pack(sequences, multiple=topology.layout.token_multiple)
            [(logprobs_T, _)] = score_tokens(chunks, [batch], topology=topology)
            worst.append(float((logprobs_T[: len(expected_T)] - expected_T).abs().max()))
            export_model(chunks, target / str(index), topology=topology, source=folder)
    return worst
