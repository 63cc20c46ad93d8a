"""Reference, critic and reward model score answers that have ended, in idle turns of generation's pipeline.

While answers are generated every pipeline stage works on another group of them; towards the end groups run
dry, and a stage waits where it would compute theirs. A small micro-batch of answers that have ended fits in
there: its way through the stages takes about as long as a turn's, and no stage waits for those behind it, for
what the last one finds is reported when all have ended. With one stage no turn is idle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import PackedTokens, pack
from glm_rlhf.parallel.pipeline.scoring import DeferredScores
from glm_rlhf.parallel.runtime.spans import span
from glm_rlhf.parallel.runtime.topology import Topology

MICRO_BATCH_TOKENS = 256
"""About as many as a GPU computes in the time in which a decode step reads the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlappedScores:
    """What one model said of some sequences of this rank's rollouts."""

    sequences: frozenset[int]
    """Which, by number from 0."""
    found_T: torch.Tensor
    """What `score_tokens` gives as logprobs, or `score_rows`, fp32 [T]; 0 at other sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Some answers as one micro-batch."""

    indices: tuple[int, ...]
    """Their places among the answers of all data-parallel ranks."""
    packed: PackedTokens
    answers_T: torch.Tensor
    """bool, true at tokens of answers."""


class OverlappedScorer:
    """Owns the answers that have ended while one phase of generation lasts, and what was found of them."""

    def __init__(
        self, models: Mapping[str, Sequence[GLMModel]], *, temperature: float, topology: Topology
    ) -> None:
        """Take this rank's chunks by role.

        Args:
            models: of `reference` log-probabilities are scored, of others (critic, reward) scalars.
            temperature: of the rollouts.
            topology: layout and groups.
        """
        self._topology, self._temperature = topology, temperature
        self._models = {role: DeferredScores(chunks, topology=topology) for role, chunks in models.items()}
        self._ended: list[tuple[int, PromptInput, Completion]] = []
        self._due: list[tuple[str, _Batch]] = []
        self._scored: dict[str, list[_Batch]] = {role: [] for role in self._models}

    def add(self, index: int, prompt: PromptInput, done: Completion) -> None:
        """Take an answer that has ended, its place among those of all data-parallel ranks first."""
        self._ended.append((index, prompt, done))

    def work(self) -> None:
        """Let one model score one micro-batch, if any is due.

        The pipeline and tensor-parallel groups communicate: their ranks call it at the same places between
        the same answers.
        """
        if not self._due and self._ended:
            batch = self._next_batch()
            self._due = [(role, batch) for role in self._models]
        if not self._due:
            return
        role, batch = self._due.pop(0)
        with span(f"overlapped {role}"):
            if role == "reference":
                self._models[role].add_tokens(batch.packed, batch.answers_T, temperature=self._temperature)
            else:
                self._models[role].add_rows(batch.packed)
        self._scored[role].append(batch)

    def collect(self, rollouts: Rollouts) -> dict[str, OverlappedScores]:
        """Return the scores by role, on every rank of the pipeline, which communicates.

        A role in whose model memory has run out is missing.

        Args:
            rollouts: of the generation that gave the answers.
        """
        found = {role: self._collect(role, rollouts) for role in self._models}
        return {role: scores for role, scores in found.items() if scores is not None}

    def _next_batch(self) -> _Batch:
        """Return the answers that ended first, as many as fit."""
        indices, sequences, masks, room = [], [], [], MICRO_BATCH_TOKENS
        while self._ended:
            index, prompt, done = self._ended[0]
            num_tokens = len(prompt.tokens) + len(done.tokens)
            if indices and num_tokens > room:
                break
            self._ended.pop(0)
            room -= num_tokens
            indices.append(index)
            sequences.append(torch.tensor([*prompt.tokens, *done.tokens]))
            masks.append(torch.arange(num_tokens) >= len(prompt.tokens))
        device, multiple = self._topology.device, self._topology.layout.token_multiple
        packed = pack([sequence.to(device) for sequence in sequences], multiple=multiple)
        answers_T = torch.zeros(packed.num_tokens, dtype=torch.bool)
        answers_T[: packed.num_tokens - packed.num_padding] = torch.cat(masks)
        return _Batch(indices=tuple(indices), packed=packed, answers_T=answers_T.to(device))

    def _collect(self, role: str, rollouts: Rollouts) -> OverlappedScores | None:
        batches, model = self._scored[role], self._models[role]
        rows = model.collect_tokens() if role == "reference" else model.collect_rows()
        if rows is None:
            return None
        numbers = {index: number for number, index in enumerate(rollouts.indices)}
        found_T = torch.zeros(rollouts.tokens_T.shape, device=self._topology.device)
        starts, sequences = rollouts.starts, set()
        for batch, rows_T in zip(batches, rows, strict=True):
            for index, part in zip(batch.indices, batch.packed.split(rows_T), strict=True):
                number = numbers[index]
                sequences.add(number)
                found_T[starts[number] : starts[number + 1]] = part
        return OverlappedScores(sequences=frozenset(sequences), found_T=found_T)
