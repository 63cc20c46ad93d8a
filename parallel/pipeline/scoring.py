"""What a sharded model says of given tokens, without gradients: logprobs of a policy, scalars of a critic."""

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

    Where memory runs out in a micro-batch its sequences go through the model in parts.

    Returns:
        A micro-batch: (logprobs [T], entropy [T]) fp32, the same on every rank that called.

    Raises:
        ValueError: there is no room for one sequence.
    """
    if not micro_batches:
        return []
    masks = [None] * len(micro_batches) if wanted is None else wanted
    rows = _score(_token_step(topology, temperature), chunks, micro_batches, masks, 2, topology)
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
        ValueError: the model has no scalar head, or there is no room for one sequence.
    """
    if not micro_batches:
        return []
    rows = _score(_row_step, chunks, micro_batches, [None] * len(micro_batches), 1, topology)
    return [row.squeeze(1) for row in rows]


class DeferredScores:
    """Owns what the last stage has found of micro-batches that went one by one, until all ranks are told.

    No stage waits for those behind it before `collect_tokens` or `collect_rows`.
    """

    def __init__(self, chunks: Sequence[GLMModel], *, topology: Topology) -> None:
        """Take this rank's chunks of a model."""
        self._chunks, self._topology = chunks, topology
        self._micro_batches: list[PackedTokens] = []
        self._outputs: list[torch.Tensor] = []
        self._attempts: list[OomGuard] = []

    def add_tokens(self, packed: PackedTokens, wanted_T: torch.Tensor, *, temperature: float) -> None:
        """Send a micro-batch through the model for `collect_tokens`; ranks as for `score_tokens`."""
        self._add(_token_step(self._topology, temperature), packed, wanted_T)

    def add_rows(self, packed: PackedTokens) -> None:
        """Send a micro-batch through the model for `collect_rows`; ranks as for `score_rows`."""
        self._add(_row_step, packed, None)

    def collect_tokens(self) -> list[torch.Tensor] | None:
        """Return the logprobs of `score_tokens`, on every rank; None where memory has run out in one."""
        rows = self._told(2)
        return rows and [shift_to_tokens(row[:, 0]) for row in rows]

    def collect_rows(self) -> list[torch.Tensor] | None:
        """Return the results of `score_rows`, on every rank; None where memory has run out in one."""
        rows = self._told(1)
        return rows and [row[:, 0] for row in rows]

    def _add(self, step: "_Step", packed: PackedTokens, wanted_T: torch.Tensor | None) -> None:
        part = _Part(packed=packed, wanted_T=wanted_T, place=0)
        self._outputs += run_micro_batches(
            self._chunks,
            [packed],
            lambda model, hidden_TD, _: (None, step(model, hidden_TD, part)),
            topology=self._topology,
            forward_only=True,
            postponed=self._attempts,
        )
        self._micro_batches.append(packed)

    def _told(self, num_columns: int) -> list[torch.Tensor] | None:
        try:
            for attempt in self._attempts:
                attempt.agree(forward_only=True)
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
    """Bool [T]: whose results are wanted; None for all."""
    place: int
    """Which micro-batch they are of."""

    def split_in_two(self, multiple: int) -> tuple["_Part", ...]:
        """Return the sequences in two parts, or these where there is one."""
        parts = []
        for packed, tokens, _ in self.packed.split_in_two(multiple):
            wanted_T = self.wanted_T
            if wanted_T is not None:
                wanted_T = torch.nn.functional.pad(wanted_T[tokens], (0, packed.num_padding))
            parts.append(_Part(packed=packed, wanted_T=wanted_T, place=self.place))
        return tuple(parts) or (self,)


_Step = Callable[[GLMModel, torch.Tensor, _Part], torch.Tensor]
"""Makes of the last hidden states what is wanted, a row a token."""


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
    """Return what `step` gives for the rows of each micro-batch, fp32 [T, num_columns], on every rank."""

    def run(parts: Sequence[_Part]) -> list[torch.Tensor]:
        outputs = run_micro_batches(
            chunks,
            [part.packed for part in parts],
            lambda model, hidden_TD, index: (None, step(model, hidden_TD, parts[index])),
            topology=topology,
            forward_only=True,
        )
        return collect_rows(outputs, [part.packed for part in parts], num_columns, topology=topology)

    given = [
        _Part(packed=packed, wanted_T=wanted_T, place=place)
        for place, (packed, wanted_T) in enumerate(zip(micro_batches, wanted, strict=True))
    ]
    rows, parts = run_with_oom_retry(
        run, given, lambda _: "one sequence", models=[chunks], topology=topology, forward_only=True
    )
    whole = []
    for place, packed in enumerate(micro_batches):
        own = [(part.packed, row) for part, row in zip(parts, rows, strict=True) if part.place == place]
        if len(own) > 1:
            pieces = [row[: part.boundaries[-1]] for part, row in own]
            whole.append(torch.nn.functional.pad(torch.cat(pieces), (0, 0, 0, packed.num_padding)))
        else:
            whole.append(own[0][1])
    return whole
