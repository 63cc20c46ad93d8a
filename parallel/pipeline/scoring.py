"""Scores of given tokens by a sharded model, without gradients: logprobs of a policy, scalars of a critic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens, share
from glm_rlhf.parallel.model.token_outputs import next_tokens, shift_to_tokens, token_logprobs, token_values
from glm_rlhf.parallel.pipeline.oom import OomGuard, OutOfMemory
from glm_rlhf.parallel.pipeline.oom_retry import run_with_oom_retry
from glm_rlhf.parallel.pipeline.schedule import collect_rows, run_micro_batches
from glm_rlhf.parallel.runtime.topology import Topology


def score_tokens(
    chunks: Sequence[GLMModel],
    micro_batches: Sequence[PackedTokens],
    *,
    topology: Topology,
    wanted: Sequence[torch.Tensor] | None = None,
    temperature: float = 1.0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return log p(token t | tokens before t) and the entropy of the distribution at that position.

    All ranks that share these micro-batches (the pipeline, tensor- and context-parallel groups) call
    this together; data-parallel ranks need not. If memory runs out in a micro-batch, it is split.

    Args:
        chunks: this rank's chunks of a policy or reference.
        micro_batches: whole sequences, on the rank's device; may be empty.
        topology: layout and groups.
        wanted: per micro-batch bool [T], tokens to score; the others skip the head and are 0. All but each
            sequence's first when None.
        temperature: divides the logits.

    Returns:
        Per micro-batch: (logprobs [T], entropy [T]) fp32, equal on all calling ranks.

    Raises:
        ValueError: a single sequence does not fit in memory.
    """
    if not micro_batches:
        return []
    masks = [None] * len(micro_batches) if wanted is None else wanted
    rows = _score(_token_step(topology, temperature), chunks, micro_batches, masks, 2, topology)
    return [tuple(shift_to_tokens(row).unbind(dim=1)) for row in rows]


def score_rows(
    chunks: Sequence[GLMModel], micro_batches: Sequence[PackedTokens], *, topology: Topology
) -> list[torch.Tensor]:
    """Return the scalar of a critic or reward model for the hidden state after each token.

    A reward model's score of a sequence is the row of its last token. A critic's value of the state in
    which token t is chosen is row t - 1: `token_outputs.shift_to_tokens` moves it to token t.

    All ranks that share these micro-batches call this together.

    Returns:
        Per micro-batch fp32 [T], equal on all calling ranks.

    Raises:
        ValueError: the model has no scalar head, or a single sequence does not fit in memory.
    """
    if not micro_batches:
        return []
    rows = _score(_row_step, chunks, micro_batches, [None] * len(micro_batches), 1, topology)
    return [row.squeeze(1) for row in rows]


class DeferredScores:
    """Owns the last stage's results for micro-batches scored one by one, until all ranks collect them.

    No stage waits for later stages before `collect_tokens` or `collect_rows`.
    """

    def __init__(self, chunks: Sequence[GLMModel], *, topology: Topology) -> None:
        """Start without micro-batches, with this rank's chunks of a model."""
        self._chunks, self._topology = chunks, topology
        self._micro_batches: list[PackedTokens] = []
        self._outputs: list[torch.Tensor] = []
        self._guards: list[OomGuard] = []

    def add_tokens(self, packed: PackedTokens, wanted_T: torch.Tensor, *, temperature: float) -> None:
        """Run a micro-batch through the model for `collect_tokens`; ranks as for `score_tokens`."""
        self._add(_token_step(self._topology, temperature), packed, wanted_T)

    def add_rows(self, packed: PackedTokens) -> None:
        """Run a micro-batch through the model for `collect_rows`; ranks as for `score_rows`."""
        self._add(_row_step, packed, None)

    def collect_tokens(self) -> list[torch.Tensor] | None:
        """Return the logprobs of `score_tokens`, on every rank; None if memory ran out in a micro-batch."""
        rows = self._collect(2)
        return rows and [shift_to_tokens(row[:, 0]) for row in rows]

    def collect_rows(self) -> list[torch.Tensor] | None:
        """Return the results of `score_rows`, on every rank; None if memory ran out in a micro-batch."""
        rows = self._collect(1)
        return rows and [row[:, 0] for row in rows]

    def _add(self, step: "_Step", packed: PackedTokens, wanted_T: torch.Tensor | None) -> None:
        part = _Part(packed=packed, wanted_T=wanted_T, micro_batch=0)
        self._outputs += run_micro_batches(
            self._chunks,
            [packed],
            lambda model, hidden_TD, _: (None, step(model, hidden_TD, part)),
            topology=self._topology,
            forward_only=True,
            deferred=self._guards,
        )
        self._micro_batches.append(packed)

    def _collect(self, num_columns: int) -> list[torch.Tensor] | None:
        try:
            for oom in self._guards:
                oom.raise_if_failed(forward_only=True)
        except OutOfMemory:
            return None
        if not self._micro_batches:
            return []
        return collect_rows(self._outputs, self._micro_batches, num_columns, topology=self._topology)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some sequences of a micro-batch."""

    packed: PackedTokens
    """Their tokens."""
    wanted_T: torch.Tensor | None
    """Bool [T], tokens to score; None for all."""
    micro_batch: int
    """Index of their micro-batch."""

    def split_in_two(self, multiple: int) -> tuple["_Part", ...]:
        """Return the sequences in two parts; this part if it cannot be split."""
        parts = []
        for packed, tokens, _ in self.packed.split_in_two(multiple):
            wanted_T = self.wanted_T
            if wanted_T is not None:
                wanted_T = torch.nn.functional.pad(wanted_T[tokens], (0, packed.num_padding))
            parts.append(_Part(packed=packed, wanted_T=wanted_T, micro_batch=self.micro_batch))
        return tuple(parts) or (self,)


_Step = Callable[[GLMModel, torch.Tensor, _Part], torch.Tensor]
"""Returns the results for the final hidden states, one row per token."""


def _token_step(topology: Topology, temperature: float) -> _Step:
    def step(model: GLMModel, hidden_TD: torch.Tensor, part: _Part) -> torch.Tensor:
        mine = share(part.packed, cp_rank=topology.cp_rank, cp_size=topology.layout.cp)
        targets_T = next_tokens(part.packed, part.wanted_T)
        logprobs, entropy = token_logprobs(model, hidden_TD, mine.take(targets_T), temperature=temperature)
        return torch.stack((logprobs, entropy), dim=1)

    return step


def _row_step(model: GLMModel, hidden_TD: torch.Tensor, _: _Part) -> torch.Tensor:
    return token_values(model, hidden_TD).unsqueeze(1)


def _score(
    step: _Step,
    chunks: Sequence[GLMModel],
    micro_batches: Sequence[PackedTokens],
    wanted: Sequence[torch.Tensor | None],
    num_columns: int,
    topology: Topology,
) -> list[torch.Tensor]:
    """Return the results of `step` for the rows of each micro-batch, fp32 [T, num_columns], on every rank."""

    def run(parts: Sequence[_Part]) -> list[torch.Tensor]:
        outputs = run_micro_batches(
            chunks,
            [part.packed for part in parts],
            lambda model, hidden_TD, index: (None, step(model, hidden_TD, parts[index])),
            topology=topology,
            forward_only=True,
        )
        return collect_rows(outputs, [part.packed for part in parts], num_columns, topology=topology)

    batches = [
        _Part(packed=packed, wanted_T=wanted_T, micro_batch=index)
        for index, (packed, wanted_T) in enumerate(zip(micro_batches, wanted, strict=True))
    ]
    rows, parts = run_with_oom_retry(
        run, batches, lambda _: "one sequence", models=[chunks], topology=topology, forward_only=True
    )
    per_batch = []
    for index, packed in enumerate(micro_batches):
        scored = [
            (part.packed, row) for part, row in zip(parts, rows, strict=True) if part.micro_batch == index
        ]
        if len(scored) > 1:
            pieces = [row[: part.boundaries[-1]] for part, row in scored]
            per_batch.append(torch.nn.functional.pad(torch.cat(pieces), (0, 0, 0, packed.num_padding)))
        else:
            per_batch.append(scored[0][1])
    return per_batch
