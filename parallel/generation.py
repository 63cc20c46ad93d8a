"""Generation on the training weights: groups of sequences rotate through the pipeline's stages.

Every rank of a pipeline replays the same queue, so all agree on who runs without being told. With
several stages the sequences form at least as many groups, and each stage works on another group: while
the last stage draws tokens for one, the first already embeds the next.

A turn is a group's passage through all stages (each stage's chunks one after the other). Turns come in
rounds of one a group; within a round a stage does chunk 0 of every group, then chunk 1 of every group.
The order of the queue's calls, the same everywhere: take(g) for what g drew in the last round, next(g).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from glm_rlhf.parallel.decode import chunk_decoders
from glm_rlhf.parallel.decode_batch import DecodeBatch, Plan, make_batch
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.kv_cache import KVCache
from glm_rlhf.parallel.token_draw import SamplingSettings, draw_tokens
from glm_rlhf.parallel.topology import Topology

Done = TypeVar("Done", covariant=True)

_HIDDEN, _TOKENS = 1, 2
"""Tags of messages between stages."""


class Queue(Protocol, Generic[Done]):
    """Who runs next; `engine.rollout.queue.GenerationQueue`."""

    def next(self, group: int) -> Plan | None:
        """Return what a group does now, None when it has nothing to do."""

    def take(
        self, group: int, tokens: Sequence[int], logprobs: Sequence[float], plain_logprobs: Sequence[float]
    ) -> list[Done]:
        """Take what was drawn in a group's last step and return the sequences that it completed."""

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is complete."""


@dataclass(slots=True, kw_only=True)
class TickCount:
    """How often this stage had work when its turn came, while any sequence was unfinished."""

    busy: int = 0
    """Turns with rows to compute."""
    idle: int = 0
    """Turns without."""

    @property
    def idle_fraction(self) -> float:
        """Share of turns without work; 0 before the first."""
        return self.idle / max(1, self.busy + self.idle)


@torch.no_grad()
def run_queue(
    chunks: Sequence[GLMModel],
    cache: KVCache,
    queue: Queue[Done],
    settings: SamplingSettings,
    *,
    topology: Topology,
    num_groups: int,
    ticks: TickCount | None = None,
) -> Iterator[Done]:
    """Yield sequences as they complete, until the queue is finished; on every rank the same.

    The pipeline and tensor-parallel groups communicate: all their ranks iterate to the end, over queues
    that were made alike. Data- and context-parallel ranks work on their own.

    Args:
        chunks: this rank's chunks of a policy.
        cache: pages that the queue hands out.
        queue: who runs.
        settings: the distribution.
        topology: layout and groups.
        num_groups: groups that the queue was made with, at least the number of stages.
        ticks: counted up as turns pass.

    Raises:
        ValueError: fewer groups than stages.
        FloatingPointError: a row's logits are not finite, so that no token can be drawn.
    """
    if num_groups < topology.layout.pp:
        raise ValueError(f"{num_groups} groups for {topology.layout.pp} stages: some stage would always wait")
    stage = _Stage(chunks, cache, settings, topology)
    ticks = TickCount() if ticks is None else ticks
    running: list[_Turn | None] = [None] * num_groups
    while not queue.is_finished:
        for group in range(num_groups):
            if running[group] is not None:
                yield from queue.take(group, *stage.drawn(running[group]))
            plan = queue.next(group)
            running[group] = None if plan is None else stage.start(plan)
            ticks.busy += plan is not None
            ticks.idle += plan is None
            if plan is not None:
                stage.advance(running[group], 0)
        for chunk in range(1, len(chunks)):
            for turn in running:
                if turn is not None:
                    stage.advance(turn, chunk)
    stage.finish()


@dataclass(slots=True, kw_only=True)
class _Turn:
    """One group's step on its way through the stages."""

    batch: DecodeBatch
    drawn: torch.Tensor | None
    """float64 [rows drawn, 3] on the last stage: token, logprob, plain logprob."""


class _Stage:
    """This rank's part of every turn, and its messages to the other stages."""

    def __init__(
        self, chunks: Sequence[GLMModel], cache: KVCache, settings: SamplingSettings, topology: Topology
    ) -> None:
        self.decoders = chunk_decoders(chunks, cache)
        self.cache, self.settings, self.topology = cache, settings, topology
        self.hidden_size = chunks[0].glm.hidden_size
        self.dtype = chunks[0].config.params_dtype
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    def start(self, plan: Plan) -> _Turn:
        """Copy the pages that a step asks for and put its rows on the device."""
        self.cache.copy_pages(plan.copies)
        batch = make_batch(plan, page_size=self.cache.page_size, device=self.topology.device)
        return _Turn(batch=batch, drawn=None)

    def advance(self, turn: _Turn, chunk: int) -> None:
        """Run one of this stage's chunks: receive, compute, send on or draw."""
        place, decoder = self.topology, self.decoders[chunk]
        is_first = place.pp_rank == 0 and chunk == 0
        is_last = place.is_last_stage and chunk + 1 == len(self.decoders)
        hidden_TD = None if is_first else self._receive_hidden(turn.batch)
        output = decoder.forward(turn.batch, hidden_TD)
        if not is_last:
            self._send(output, (place.pp_rank + 1) % place.layout.pp, place.pp_group, _HIDDEN)
            return
        if not turn.batch.num_drawn:
            return
        group = place.tp_group if place.layout.tp > 1 else None
        samples = draw_tokens(
            decoder.logits(output), turn.batch.seeds_B, turn.batch.steps_B, self.settings, group=group
        )
        turn.drawn = torch.stack([part.double() for part in samples], dim=1)
        if place.layout.pp > 1:
            turn.drawn = turn.drawn.cpu()
            for stage in range(place.layout.pp - 1):
                self._send(turn.drawn, stage, place.pp_host_group, _TOKENS)

    def drawn(self, turn: _Turn) -> tuple[list[int], list[float], list[float]]:
        """Return what the last stage drew in a turn: tokens, logprobs, plain logprobs."""
        place, num_drawn = self.topology, turn.batch.num_drawn
        if num_drawn == 0:  # a part of a prompt, and nothing else, went through
            return [], [], []
        if turn.drawn is None:
            turn.drawn = torch.empty(num_drawn, 3, dtype=torch.float64)
            source = dist.get_global_rank(place.pp_host_group, place.layout.pp - 1)
            dist.recv(turn.drawn, source, group=place.pp_host_group, tag=_TOKENS)
        tokens, logprobs, plain_logprobs = turn.drawn.t().tolist()
        if -1.0 in tokens:
            raise FloatingPointError(
                f"{tokens.count(-1.0)} of {len(tokens)} rows have no token that could be drawn: their logits "
                "are not finite, or every id is masked"
            )
        return [int(token) for token in tokens], logprobs, plain_logprobs

    def finish(self) -> None:
        """Wait until the other stages have what was sent to them."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _receive_hidden(self, batch: DecodeBatch) -> torch.Tensor:
        place = self.topology
        shape = (len(batch.tokens_T), self.hidden_size)
        hidden_TD = torch.empty(shape, dtype=self.dtype, device=place.device)
        source = dist.get_global_rank(place.pp_group, (place.pp_rank - 1) % place.layout.pp)
        dist.recv(hidden_TD, source, group=place.pp_group, tag=_HIDDEN)
        return hidden_TD

    def _send(self, tensor: torch.Tensor, stage: int, group: dist.ProcessGroup, tag: int) -> None:
        """Send without waiting; the tensor is kept until it has left."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dist.get_global_rank(group, stage), group=group, tag=tag)
        self._sent.append((work, tensor))
