"""One pipeline stage of generation: this rank's part of every step, and its messages to other stages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from glm_rlhf.parallel.inference.cuda_graph import DecodeGraphs, Record
from glm_rlhf.parallel.inference.decoder import chunk_decoders
from glm_rlhf.parallel.inference.kv_cache import KVCache
from glm_rlhf.parallel.inference.sampler import SamplingSettings, sample_tokens
from glm_rlhf.parallel.inference.step_inputs import DecodeBatch, PinnedInputs, make_batch
from glm_rlhf.parallel.inference.step_plan import StepPlan
from glm_rlhf.parallel.inference.weight_views import ChunkWeights

_HIDDEN, _TOKENS = 1, 2
"""Tags of messages between stages."""


@dataclass(slots=True, kw_only=True)
class InFlightStep:
    """One group's step between its start and its last stage."""

    num_rows: int
    """Rows of the step."""
    num_sampled: int
    """Rows whose next token is sampled."""
    batch: DecodeBatch | None
    """The rows; None for a step that replays a graph."""
    recorded: PinnedInputs | None
    """The inputs of a graph; None for a step that runs eagerly."""
    sampled: torch.Tensor | None = None
    """float64 [rows sampled, 3] on the last stage: token, logprob, untempered logprob."""


class GenerationStage:
    """Owns a stage's decoders over a cache, its recorded steps, and its messages in flight."""

    def __init__(
        self,
        chunks: Sequence[ChunkWeights],
        cache: KVCache,
        settings: SamplingSettings,
        *,
        longest: int,
        record: Record | None,
    ) -> None:
        """Build the decoders of this rank's chunks.

        Args:
            chunks: parameters of this rank's chunks of a policy.
            cache: pages that the queue allocates.
            settings: the distribution that tokens are sampled from.
            longest: largest number of positions of a sequence.
            record: records decode steps as graphs; None runs every step eagerly.
        """
        self.topology = chunks[0].topology
        self.settings = settings
        self.num_chunks = len(chunks)
        self._cache = cache
        self._decoders = chunk_decoders(chunks, cache)
        self._hidden_size, self._dtype = chunks[0].glm.hidden_size, chunks[0].dtype
        self._graphs = None
        if record is not None:
            self._graphs = DecodeGraphs(
                self._compute,
                page_size=cache.page_size,
                table_width=-(-longest // cache.page_size),
                hidden_size=self._hidden_size,
                dtype=self._dtype,
                device=self.topology.device,
                record=record,
            )
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> InFlightStep:
        """Copy the pages of a step's plan and prepare the inputs of its rows."""
        self._cache.copy_pages(plan.copies)
        if self._graphs is not None and self._graphs.can_replay(plan):
            count = len(plan.decodes)
            inputs = self._graphs.inputs(plan.decodes)
            return InFlightStep(num_rows=count, num_sampled=count, batch=None, recorded=inputs)
        batch = make_batch(plan, page_size=self._cache.page_size, device=self.topology.device)
        return InFlightStep(
            num_rows=len(batch.tokens_T), num_sampled=batch.num_sampled, batch=batch, recorded=None
        )

    @torch.inference_mode()
    def advance(self, step: InFlightStep, chunk: int) -> None:
        """Run one of this stage's chunks: receive, compute, then send or sample."""
        topology = self.topology
        is_first = topology.pp_rank == 0 and chunk == 0
        hidden_TD = None if is_first else self._receive_hidden(step.num_rows)
        if step.recorded is not None:
            output = self._graphs.run(chunk, step.recorded, step.num_rows, hidden_TD)
        else:
            output = self._compute(chunk, step.batch, hidden_TD)
        if not self._is_last(chunk):
            self._send(output, (topology.pp_rank + 1) % topology.layout.pp, topology.pp_group, _HIDDEN)
        elif step.num_sampled:
            step.sampled = output
            if topology.layout.pp > 1:
                step.sampled = output.cpu()
                for stage in range(topology.layout.pp - 1):
                    self._send(step.sampled, stage, topology.pp_host_group, _TOKENS)

    @torch.inference_mode()
    def sampled(self, step: InFlightStep) -> tuple[list[int], list[float], list[float]]:
        """Return what the last stage sampled in a step: tokens, logprobs, untempered logprobs.

        The token is -1 where none can be sampled: a logit of its row is NaN or Inf, or every id is masked.
        """
        if step.num_sampled == 0:  # the step consisted of parts of prompts only
            return [], [], []
        if step.sampled is None:
            group = self.topology.pp_host_group
            step.sampled = torch.empty(step.num_sampled, 3, dtype=torch.float64)
            source = dist.get_global_rank(group, self.topology.layout.pp - 1)
            dist.recv(step.sampled, source, group=group, tag=_TOKENS)
        tokens, logprobs, untempered_logprobs = step.sampled.t().tolist()
        return [int(token) for token in tokens], logprobs, untempered_logprobs

    def finish(self) -> None:
        """Wait until the other stages have received all messages."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _compute(self, chunk: int, batch: DecodeBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """Return the residual stream, or from the last chunk the samples; does not wait for the device."""
        decoder = self._decoders[chunk]
        output = decoder.forward(batch, hidden_TD)
        if not self._is_last(chunk) or not batch.num_sampled:
            return output
        group = self.topology.tp_group if self.topology.layout.tp > 1 else None
        samples = sample_tokens(
            decoder.logits(output), batch.seeds_B, batch.steps_B, self.settings, group=group
        )
        return torch.stack([part.double() for part in samples], dim=1)

    def _is_last(self, chunk: int) -> bool:
        return self.topology.is_last_stage and chunk + 1 == self.num_chunks

    def _receive_hidden(self, num_rows: int) -> torch.Tensor:
        topology = self.topology
        hidden_TD = torch.empty(num_rows, self._hidden_size, dtype=self._dtype, device=topology.device)
        source = dist.get_global_rank(topology.pp_group, (topology.pp_rank - 1) % topology.layout.pp)
        dist.recv(hidden_TD, source, group=topology.pp_group, tag=_HIDDEN)
        return hidden_TD

    def _send(self, tensor: torch.Tensor, stage: int, group: dist.ProcessGroup, tag: int) -> None:
        """Send without waiting; the tensor is kept alive until it is sent."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dist.get_global_rank(group, stage), group=group, tag=tag)
        self._sent.append((work, tensor))
