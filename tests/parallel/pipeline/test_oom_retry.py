"""After an out-of-memory error, smaller micro-batches give the same gradient and the same scores."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from little_memory import little_memory
from tiny_training import READS_GRADIENT, Case, loss_of, make_batches, make_chunks

from glm_rlhf.parallel.model.packing import PackedTokens
from glm_rlhf.parallel.optim.in_backward import InBackwardState
from glm_rlhf.parallel.optim.training_state import TrainingState
from glm_rlhf.parallel.pipeline.oom_retry import run_with_oom_retry
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.pipeline.scoring import score_rows, score_tokens
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

CASE = Case(lengths=((5, 1, 9), (8, 9), (3, 12, 2), (6, 7)))
ROOM = 12  # tokens: every micro-batch must be split, no sequence exceeds it
LAYOUTS = (
    {"pp": 2, "vpp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    *(pytest.param(axes, marks=pytest.mark.slow) for axes in ({}, {"pp": 4}, {"tp": 2}, {"cp": 2})),
)


@dataclass(frozen=True)
class Part:
    packed: PackedTokens

    def split_in_two(self, multiple: int) -> tuple["Part", ...]:
        return tuple(Part(half) for half, *_ in self.packed.split_in_two(multiple)) or (self,)


def gradient(state, topology) -> tuple[torch.Tensor, int]:
    """This rank's shard of the gradient of one step, and the final number of micro-batches."""
    mine = [Part(packed) for packed in make_batches(CASE, topology)][topology.dp_rank :: topology.dp]

    def begin(parts):
        state.zero_grad()
        return run_micro_batches(
            state.chunks,
            [part.packed for part in parts],
            lambda model, hidden_TD, index: loss_of(CASE, model, hidden_TD, parts[index].packed),
            topology=topology,
            forward_only=False,
        )

    _, parts = run_with_oom_retry(
        begin, mine, str, models=[state.chunks], topology=topology, forward_only=False
    )
    state.optimizer.prepare_grads()
    shards = [weight.grad.flatten() for weight in state.optimizer.get_parameters()]
    return torch.cat(shards).clone(), len(parts)


def run_out(axes):
    """With little memory on one stage, in forward and backward: distance of the gradient."""
    results = []
    with open_topology(Layout(**axes)) as topology:
        # One stage of one copy of the model; its tensor-parallel ranks together.
        has_little = topology.pp_rank == topology.layout.pp // 2 and topology.dp_rank == topology.dp - 1
        for in_backward in (False, True):
            state = TrainingState(make_chunks(CASE, topology), READS_GRADIENT, topology=topology)
            wanted, num_before = gradient(state, topology)
            memory = little_memory(state.bare_chunks[-1], ROOM, in_backward=in_backward)
            with memory if has_little else contextlib.nullcontext([]) as met:
                found, num_after = gradient(state, topology)
                num_met = len(met)
                again, _ = gradient(state, topology)  # with the limit that the model keeps
            assert num_after > num_before
            assert (num_met > 0) == has_little
            assert len(met) == num_met  # the model has kept the limit
            results += [float((one - wanted).norm() / wanted.norm()) for one in (found, again)]
    return results


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_the_gradient_is_that_of_the_whole_micro_batches(ranks, axes):
    for distances in ranks.run(run_out, axes):
        assert len(distances) == 4
        assert max(distances) <= 1e-6


def scores(axes):
    """Logprobs, entropies and values with enough memory, and with little memory on one stage."""
    with open_topology(Layout(**axes)) as topology:
        policy = make_chunks(CASE, topology)
        critic = make_chunks(Case(role="critic", lengths=CASE.lengths), topology)
        batches = make_batches(CASE, topology)
        wanted = [batch.tokens_T % 2 == 0 for batch in batches]

        def score():
            pairs = score_tokens(policy, batches, topology=topology, wanted=wanted)
            return [*map(torch.stack, pairs), *score_rows(critic, batches, topology=topology)]

        expected = score()
        has_little = topology.pp_rank == 0 and topology.dp_rank == 0
        with contextlib.ExitStack() as stack:
            if has_little:
                for chunks in (policy, critic):
                    stack.enter_context(little_memory(chunks[0], ROOM))
            found = score()
        num_padding = [batch.num_padding for batch in batches] * 2
        assert any(num_padding) == (topology.layout.token_multiple > 1)
        return max(
            float((a - b)[..., : a.shape[-1] - n].abs().max())
            for a, b, n in zip(found, expected, num_padding, strict=True)
        )


def test_scores_are_those_of_the_whole_micro_batches(ranks):
    for axes in ({"pp": 2}, {"tp": 2, "sequence_parallel": True}):
        assert max(ranks.run(scores, axes)) <= 1e-6


def refusal(axes):
    """The message if a sequence does not fit in one rank's memory."""
    with open_topology(Layout(**axes)) as topology:
        state = TrainingState(make_chunks(CASE, topology), READS_GRADIENT, topology=topology)
        with little_memory(state.bare_chunks[0], 4) if topology.rank == 1 else contextlib.nullcontext():
            try:
                gradient(state, topology)
            except ValueError as error:
                return str(error)


def test_a_sequence_without_room_ends_all_ranks_with_its_length(ranks):
    for said in ranks.run(refusal, {}):
        assert said.startswith("rank 1 has no memory for Part(")
        assert "by itself, 8 tokens through the policy: set train.recompute_layers to true" in said
    for said in ranks.run(refusal, {"pp": 2}):
        # Its stage holds several micro-batches at once: the longest sequence is named.
        assert "by itself, 9 tokens" in said


def test_weights_that_change_in_backward_are_not_tried_again():
    with open_topology(Layout()) as topology:
        state = InBackwardState(make_chunks(CASE, topology), READS_GRADIENT, topology=topology)
        with (
            little_memory(state.chunks[0], ROOM),
            pytest.raises(
                ValueError, match=r"rank 0 in a micro-batch of 15 tokens, .*set optimizer.in_backwa"
            ),
        ):
            gradient(state, topology)
