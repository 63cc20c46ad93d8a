"""A generation phase: no leaked page, no moved weight, training's logprobs."""

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from tiny_generation import SAMPLED, TIGHT, answers, full_forward_logprobs, make_phase, make_requests
from tiny_training import Case, make_batches, make_chunks, train_step
from torch.utils._python_dispatch import TorchDispatchMode

from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rollout import generation_phase as under_test
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase, deal_by_length
from glm_rlhf.engine.rollout.scheduling.request_queue import GenerationQueue
from glm_rlhf.parallel.inference import stage
from glm_rlhf.parallel.inference.kv_cache import num_pages_within
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture
def topology():
    with open_topology(Layout()) as topology:
        yield topology


@pytest.fixture
def queues(monkeypatch):
    return keep_queues(monkeypatch.setattr)


def keep_queues(setattr_):
    made = []

    def make(*args, **options):
        made.append(GenerationQueue(*args, **options))
        return made[-1]

    setattr_(under_test, "GenerationQueue", make)
    return made


def tokens_of(completions):
    return {key: done.tokens for key, done in completions.items()}


def live_bytes():
    gc.collect()  # memory of all tensors that are referenced
    held = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(held.values())


def test_no_page_is_leaked_and_the_budget_is_kept(topology, queues):
    chunks, requests = make_chunks(Case(), topology), make_requests(12, num_samples=3)
    config, layout = chunks[0].glm, topology.layout
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    cache_bytes = 9 * 2048 + 2047  # 2048 bytes a page
    phase = GenerationPhase(
        chunks, topology=topology, batch=GenerationSection(**TIGHT, cache_bytes=cache_bytes), longest=longest
    )
    assert phase.num_pages == 9
    assert num_pages_within(cache_bytes, config, layout, page_size=4, dtype=torch.float32) == 9
    with phase:
        assert phase._cache.num_bytes <= cache_bytes
        found = answers(phase, requests)
    assert len(found) == 36
    (queue,) = queues
    assert queue.pool.num_free == phase.num_pages
    assert queue.statistics.num_preemptions > 0, "the pages were to run short"
    assert 0 < queue.statistics.peak_pages <= phase.num_pages


class Injected(RuntimeError):
    """Raised by a test in mid-run."""


@pytest.mark.parametrize("failing_draw", [1, 7])
def test_an_exception_during_a_batch_leaks_no_page(topology, queues, monkeypatch, failing_draw):
    chunks, requests = make_chunks(Case(), topology), make_requests(12, num_samples=2)
    draw, num_draws = stage.sample_tokens, 0

    def failing(*args, **options):
        nonlocal num_draws
        num_draws += 1
        if num_draws == failing_draw:
            raise Injected
        return draw(*args, **options)

    with make_phase(chunks, topology, requests) as phase:
        monkeypatch.setattr(stage, "sample_tokens", failing)
        with pytest.raises(Injected):
            answers(phase, requests)
        assert queues[0].pool.num_free == phase.num_pages
        found = answers(phase, requests)
    assert queues[1].pool.num_free == phase.num_pages
    with make_phase(chunks, topology, requests) as phase:
        assert answers(phase, requests) == found


def test_an_early_exit_leaks_no_page(topology, queues):
    chunks, requests = make_chunks(Case(), topology), make_requests(6)
    with make_phase(chunks, topology, requests) as phase:
        completions = phase.run(requests, SAMPLED)
        next(completions)
        completions.close()
    assert queues[0].pool.num_free == phase.num_pages


def test_the_memory_is_free_after_the_phase(topology):
    chunks, requests = make_chunks(Case(), topology), make_requests(6)
    with make_phase(chunks, topology, requests) as phase:
        answers(phase, requests)  # what is made once stays: tables of kernels, of positions
    del phase
    before = live_bytes()
    with make_phase(chunks, topology, requests) as phase:
        cache_bytes = phase._cache.num_bytes
        answers(phase, requests)
        assert live_bytes() >= before + cache_bytes
    assert live_bytes() == before
    with make_phase(chunks, topology, requests) as phase:
        completions = phase.run(requests, SAMPLED)
        next(completions)
        with pytest.raises(Injected):
            completions.throw(Injected)
    assert live_bytes() == before


def stop_once(state, after):
    """A check that fails once, at some call; the same on all ranks."""

    def check(_tokens):
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] == after:
            raise Injected
        return False

    return check


def run_after_failures(axes):
    """On each rank: answers of a phase in which earlier runs failed, and of one without failures."""
    with open_topology(Layout(**axes)) as topology:
        chunks, requests = make_chunks(Case(), topology), make_requests(6)
        found = []
        with make_phase(chunks, topology, requests) as phase:
            for after in (1, 9):
                with contextlib.suppress(Injected):
                    answers(phase, requests, stop_check=stop_once({}, after))
                    raise AssertionError("the check did not fail")
                completions = phase.run(requests, SAMPLED)
                next(completions)
                completions.close()
                found.append(tokens_of(answers(phase, requests)))
        with make_phase(chunks, topology, requests) as phase:
            return found, tokens_of(answers(phase, requests))


@pytest.mark.parametrize("axes", [{"pp": 2, "vpp": 2, "tp": 2}])
def test_a_run_that_ends_early_leaves_nothing_between_the_stages(ranks, axes):
    for found, expected in ranks.run(run_after_failures, axes):
        assert found == [expected] * 2


class Traffic(TorchDispatchMode):
    """Counts the collectives, and their bytes that belong to given memory."""

    def __init__(self, parameters):
        super().__init__()
        self._addresses = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.num_calls = self.weight_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.num_calls += 1
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    num_bytes = tensor.numel() * tensor.element_size()
                    self.largest_bytes = max(self.largest_bytes, num_bytes)
                    if tensor.untyped_storage().data_ptr() in self._addresses:
                        self.weight_bytes += num_bytes
        return func(*args, **(kwargs or {}))


def train_generate_train(axes):
    """On each rank: addresses of all weights at every point, and the traffic of each part of a phase."""
    case = Case(settings=AdamSettings(lr=1e-3))
    with open_topology(Layout(**axes)) as topology:
        chunks, requests = make_chunks(case, topology), make_requests(6)
        state = TrainingState(chunks, case.settings, topology=topology)
        batches = make_batches(case, topology)[topology.dp_rank :: topology.dp]
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        addresses, traffic = [], {}

        def note():
            addresses.append([parameter.data_ptr() for parameter in parameters])

        def train():
            train_step(case, state, batches, topology)
            state.step()
            state.gather_weights()

        note()
        found = []
        for _ in range(2):
            traffic["train"] = Traffic(parameters)
            with traffic["train"]:
                train()
            note()
            traffic["enter"] = Traffic(parameters)
            with traffic["enter"]:
                phase = make_phase(chunks, topology, requests).__enter__()
            traffic["generate"] = Traffic(parameters)
            completions = phase.run(requests, SAMPLED)
            with traffic["generate"]:
                found.append([next(completions)])
                note()
                found[-1] += list(completions)
            traffic["leave"] = Traffic(parameters)
            with traffic["leave"]:
                phase.__exit__(None, None, None)
            note()
        assert found[0] != found[1], "the second run has other weights"
        counts = {name: (t.num_calls, t.weight_bytes, t.largest_bytes) for name, t in traffic.items()}
        return all(point == addresses[0] for point in addresses), counts


@pytest.mark.parametrize(
    "axes",
    [
        {"tp": 2},
        pytest.param({"pp": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "pp": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
)
def test_generation_moves_no_weight(ranks, axes):
    for is_in_place, traffic in ranks.run(train_generate_train, axes):
        assert is_in_place
        assert traffic["enter"] == traffic["leave"] == (0, 0, 0)
        num_calls, weight_bytes, largest_bytes = traffic["generate"]
        assert num_calls > 0
        assert weight_bytes == 0
        # The largest message is the residual stream of a step: 9 rows of 32 numbers.
        assert largest_bytes <= 9 * 32 * 4
        if axes == {"tp": 2}:
            assert traffic["train"][1] > 0, "the count bites: weights are gathered over dp"


GLM4 = {"family": "glm4", "has_sandwich_norms": True}


@pytest.mark.parametrize(
    "axes, changes",
    [
        ({"tp": 2, "pp": 2, "vpp": 2}, GLM4),
        *(
            pytest.param(axes, changes, marks=pytest.mark.slow)
            for axes, changes in (
                ({"tp": 1}, {}),
                ({"tp": 1}, GLM4),
                ({"tp": 4}, {}),
                ({"tp": 4}, GLM4),
                ({"tp": 2, "pp": 2, "vpp": 2}, {}),
            )
        ),
    ],
)
def test_bf16_answers_have_the_training_forwards_logprobs(ranks, axes, changes):
    for largest, mean in ranks.run(bf16_distances, axes, changes):
        # Hidden states of bf16, summed in another order, through four layers: a rounding is 2^-8 of them.
        # fp32 gives 1e-6; without one layer's residual it is more than 1.
        assert largest < 0.1
        assert mean < 0.02


def bf16_distances(axes, changes):
    """On each rank: largest and mean distance of the recorded logprobs from a full forward's."""
    with open_topology(Layout(**axes)) as topology:
        chunks, requests = (
            make_chunks(Case(dtype=torch.bfloat16, changes=changes), topology),
            make_requests(12),
        )
        with make_phase(chunks, topology, requests) as phase:
            found = answers(phase, requests)
        expected = full_forward_logprobs(chunks, topology, requests, found)
    distances = [
        abs(a - b)
        for key, done in found.items()
        for a, b in zip(done.untempered_logprobs, expected[key], strict=True)
    ]
    return max(distances), sum(distances) / len(distances)


def idle_fractions(axes, num_requests, max_batch):
    """On each rank: share of turns without work, in a run of equal answers."""
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        requests = [
            replace(request, max_new_tokens=10, stop_ids=frozenset())
            for request in make_requests(num_requests, longest_prompt=6)
        ]
        with make_phase(
            chunks, topology, requests, num_pages=200, max_batch=max_batch, max_step_tokens=32
        ) as phase:
            answers(phase, requests)
            return phase.ticks.idle_fraction, phase.ticks.busy


@pytest.mark.parametrize(
    "axes", [*(pytest.param({"pp": pp}, marks=pytest.mark.slow) for pp in (2, 4)), {"pp": 2, "vpp": 2}]
)
def test_no_stage_waits_in_the_steady_state(ranks, axes):
    for idle_fraction, num_busy in ranks.run(idle_fractions, axes, 40, 8):
        assert idle_fraction <= 0.05
        assert num_busy >= 10 * axes["pp"]


def test_a_stage_without_sequences_is_counted_idle(ranks):
    for idle_fraction, _ in ranks.run(idle_fractions, {"pp": 4}, 1, 8):
        assert idle_fraction > 0.7  # one sequence in four groups: one of four turns has work


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_sequences_are_dealt_evenly_by_length(num_ranks):
    lengths = [5, 100, 7, 7, 60, 61, 3, 0, 44, 12, 9]
    shares = [deal_by_length(lengths, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in share) for share in shares]
    assert max(totals) - min(totals) <= max(lengths)


def test_requests_that_never_fit_are_refused_before_anything_runs(topology, queues):
    chunks, requests = make_chunks(Case(), topology), make_requests(4)
    too_long = replace(requests[2], prompt=(4,) * 200)
    phase = make_phase(chunks, topology, requests)
    with phase, pytest.raises(ValueError, match="record 2 has a prompt of 200 tokens"):
        answers(phase, [*requests[:2], too_long])
    assert queues == []
    with phase:
        assert answers(phase, []) == {}
