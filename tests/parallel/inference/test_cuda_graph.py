"""Recorded decode steps: padded, replayed on the current weights, freed with the phase."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_generation import answers, make_phase, make_requests
from tiny_training import Case, make_chunks
from torch.utils._python_dispatch import TorchDispatchMode

from glm_rlhf.kernels.dispatch.launch import forced
from glm_rlhf.parallel.inference.cuda_graph import DecodeGraphs
from glm_rlhf.parallel.inference.kv_cache import KVCache
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.inference.stage import GenerationStage
from glm_rlhf.parallel.inference.step_inputs import make_batch
from glm_rlhf.parallel.inference.step_plan import SequenceWork, StepPlan
from glm_rlhf.parallel.inference.weight_views import chunk_weights
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

# Waits for the device, or makes a shape that the host must know.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")


MADE = []


class StandIn:
    """Records like a CUDA graph: a replay takes no arguments and overwrites the recording's output."""

    def __init__(self, work, _pool):
        self._work, self.output, self.num_replays = work, work(), 0
        MADE.append(weakref.ref(self))

    def replay(self):
        self.num_replays += 1
        self.output.copy_(self._work())


def alive():
    """Recordings that are still referenced."""
    return [recording for made in MADE if (recording := made()) is not None]


@pytest.fixture(autouse=True)
def _forget():
    MADE.clear()


@pytest.fixture
def topology():
    with open_topology(Layout()) as topology:
        yield topology


def works(lengths, page_size=4):
    """Decoding sequences of these lengths on pages of their own."""
    found, first = [], 0
    for index, length in enumerate(lengths):
        count = -(-length // page_size)
        pages = tuple(range(first, first + count))
        first += count
        found.append(
            SequenceWork(
                sequence=index,
                tokens=(3 + index,),
                start=length - 1,
                pages=pages,
                samples=True,
                seed=index * 7 - 3,
                num_generated=index,
            )
        )
    return tuple(found)


def make_stage(chunks, *, record, sampling=None, num_pages=32, longest=40):
    weights = chunk_weights(chunks)
    cache = KVCache(weights, num_pages=num_pages, page_size=4)
    generator = torch.Generator().manual_seed(0)
    cache._pools.normal_(generator=generator)
    settings = SamplingSettings() if sampling is None else sampling
    return GenerationStage(weights, cache, settings, longest=longest, record=record), cache


def one_step(stage, plan):
    turn = stage.start(plan)
    stage.advance(turn, 0)
    return stage.sampled(turn)


@pytest.mark.parametrize("case", [Case(), Case(dtype=torch.bfloat16)])
@pytest.mark.parametrize("lengths", [(5,), (9, 1, 8), (4, 17, 2, 33, 12)])
def test_a_recorded_step_draws_what_an_eager_one_draws(topology, case, lengths):
    chunks = make_chunks(case, topology)
    eager, eager_cache = make_stage(chunks, record=None)
    recorded, cache = make_stage(chunks, record=StandIn)
    plan = StepPlan(copies=(), decodes=works(lengths), prefills=())
    for _ in range(2):
        expected, found = one_step(eager, plan), one_step(recorded, plan)
        assert found[0] == expected[0]
        # The matrix products have more rows; in bf16 their sums are rounded to 8 bits.
        limit = 1e-5 if case.dtype == torch.float32 else 0.05
        assert found[1] == pytest.approx(expected[1], abs=limit)
        assert found[2] == pytest.approx(expected[2], abs=limit)
    # Padding rows, in the recording and in each replay, wrote no key: all else is unchanged.
    assert torch.allclose(cache._pools, eager_cache._pools, atol=1e-5 if limit == 1e-5 else 0.05)
    written = {(work.pages[-1], work.start % 4) for work in plan.decodes}
    same = (cache._pools == make_stage(chunks, record=None)[1]._pools).all(dim=(0, 1, 4, 5))
    assert {tuple(slot) for slot in (~same).nonzero().tolist()} == written


def test_each_batch_size_is_recorded_once_and_mixed_steps_never(topology):
    chunks = make_chunks(Case(), topology)
    requests = make_requests(13, new_tokens=20)
    with make_phase(chunks, topology, requests, num_pages=60) as phase:
        expected = answers(phase, requests)
    with make_phase(chunks, topology, requests, num_pages=60, record=StandIn) as phase:
        found = answers(phase, requests)
        sizes = sorted(len(recording.output) for recording in alive())
        assert sizes == sorted(set(sizes)), "one recording a size"
        assert {4, 8} <= set(sizes) <= {1, 2, 4, 8}, "at most 6 sequences run at once"
        num_replays = sum(recording.num_replays for recording in alive())
        again = answers(phase, requests)
        assert len(MADE) == len(sizes)
        assert sum(recording.num_replays for recording in alive()) == 2 * num_replays
    assert {key: done.tokens for key, done in found.items()} == {
        key: done.tokens for key, done in expected.items()
    }
    assert again == found


def test_recordings_see_new_weights_and_end_with_the_phase(topology):
    chunks = make_chunks(Case(), topology)
    requests = make_requests(5)

    def change():
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(1.3)

    with make_phase(chunks, topology, requests, record=StandIn) as phase:
        before = answers(phase, requests)
        num_recordings = len(MADE)
        change()
        found = answers(phase, requests)
        assert len(MADE) == num_recordings > 0
    with make_phase(chunks, topology, requests) as phase:
        expected = answers(phase, requests)
    assert {key: done.tokens for key, done in found.items()} == {
        key: done.tokens for key, done in expected.items()
    }
    assert found != before
    del phase
    gc.collect()
    assert alive() == []


@pytest.mark.parametrize("axes", [{"pp": 2}, {"tp": 2, "pp": 2, "vpp": 2}, {"tp": 4}])
def test_every_stage_and_chunk_is_recorded(ranks, axes):
    for equal, num_recordings, sizes in ranks.run(recorded_and_eager, axes):
        assert equal
        assert sizes <= {1, 2, 4}
        assert num_recordings == len(sizes) * axes.get("vpp", 1)


def recorded_and_eager(axes):
    """On each rank: whether answers agree, recordings made, and their numbers of rows."""
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(Case(), topology)
        requests = make_requests(9)
        with make_phase(chunks, topology, requests) as phase:
            expected = answers(phase, requests)
        MADE.clear()
        with make_phase(chunks, topology, requests, record=StandIn) as phase:
            found = answers(phase, requests)
            recordings = alive()
            sizes = {len(recording.output) for recording in recordings}
        equal = {k: d.tokens for k, d in found.items()} == {k: d.tokens for k, d in expected.items()}
        return equal, len(recordings), sizes


class NoWaits(TorchDispatchMode):
    """Fails on operations for which the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(),
        SamplingSettings(temperature=0.0),
        SamplingSettings(top_k=5, top_p=0.8, masked_ids_V=torch.arange(64) > 60),
    ],
)
def test_no_decode_step_waits_for_the_device(topology, sampling):
    # The kernels run in the interpreter, the code around them as on a device.
    chunks = make_chunks(Case(changes={"num_layers": 1}), topology)
    with forced("triton"), torch.inference_mode():
        stage, cache = make_stage(chunks, record=None, sampling=sampling)
        batch = make_batch(
            SimpleNamespace(decodes=works((9, 2, 5)), prefills=()), page_size=4, device=topology.device
        )
        before = cache._pools.clone()
        with NoWaits():
            samples = stage._compute(0, batch, None)
        assert not torch.equal(cache._pools, before)
    with torch.inference_mode():
        stage, _ = make_stage(chunks, record=None, sampling=sampling)
        expected = stage._compute(0, batch, None)
        # The check fails when it should: the CPU path reads the lengths.
        with pytest.raises(AssertionError, match="waits"), NoWaits():
            stage._compute(0, batch, None)
    assert torch.equal(samples[:, 0], expected[:, 0])
    assert torch.allclose(samples, expected, atol=1e-5)  # fp32, other order of sums


def test_steps_that_do_not_fit_run_eagerly():
    graphs = DecodeGraphs(
        lambda *_: pytest.fail("nothing may be computed"),
        page_size=4,
        table_width=3,
        hidden_size=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        record=StandIn,
    )
    decodes = works((12, 3))
    assert graphs.can_replay(StepPlan(copies=(), decodes=decodes, prefills=()))
    assert not graphs.can_replay(StepPlan(copies=(), decodes=decodes, prefills=decodes[:1]))
    assert not graphs.can_replay(StepPlan(copies=(), decodes=works((12, 13)), prefills=()))
    assert not graphs.can_replay(StepPlan(copies=(), decodes=works((1,) * 513), prefills=()))
    numbers = graphs.inputs(works((1,) * 400))
    assert [len(array) for array in numbers.arrays] == [512] * 7
    assert numbers.arrays[2][400:].tolist() == [-1] * 112
    assert not numbers.arrays[5][400:].any()


@pytest.mark.gpu
def test_cuda_graphs_draw_what_eager_steps_draw(topology):
    chunks = make_chunks(Case(dtype=torch.bfloat16), topology)
    requests = make_requests(30, new_tokens=40)
    room = {"max_batch": 16, "max_step_tokens": 64, "num_pages": 400}
    found = []
    for is_recorded in (False, True):
        with make_phase(chunks, topology, requests, **room) as phase:
            if not is_recorded:
                phase._record = None
            found.append(answers(phase, requests))
    eager, recorded = found
    same = sum(eager[key].tokens == recorded[key].tokens for key in eager)
    # Products of other numbers of rows round differently in bf16; a near tie may then fall the other way.
    assert same >= 0.9 * len(eager)
    memory = torch.cuda.memory_allocated()
    with make_phase(chunks, topology, requests, **room) as phase:
        answers(phase, requests)
    del phase
    gc.collect()
    assert torch.cuda.memory_allocated() <= memory * 1.01
