"""Optimizer in backward: weights of the distributed optimizer in every layout, one gradient bucket alive."""

import gc
import math
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from layout_params import layout_params
from tiny_training import (
    LENGTHS,
    READS_GRADIENT,
    Case,
    assemble,
    forward,
    gradients,
    make_batches,
    make_chunks,
    run_cases,
    train_step,
    worst_difference,
)
from torch.multiprocessing.reductions import StorageWeakRef

from glm_rlhf.parallel.optim.in_backward import InBackwardState, training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

LAYOUTS = {
    "dp4": {},
    "tp2": {"tp": 2},
    "tp4 replicas": {"tp": 4, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
}
# Steps of about the gradient's size: roundings of it stay roundings of the weights.
SETTINGS = AdamSettings(lr=0.1, betas=(0.9, 0.95), epsilon=1.0, weight_decay=0.1, clip_grad=0.0)
STEPS = {"settings": SETTINGS, "num_steps": 2, "in_backward": True}
CASES = [
    Case(**STEPS),  # one micro-batch a rank at dp 4, else several
    Case(changes={"has_tied_head": True}, **STEPS),
    # Fewer micro-batches than ranks, so that some add nothing; sizes that no group divides.
    Case(lengths=LENGTHS[:1], changes={"ffn_size": 44, "vocab_size": 68}, recomputes=True, **STEPS),
    Case(role="critic", frozen=("embedding.", "decoder.layers.1."), **STEPS),
]


def run_both_ways(axes):
    """Each case with the optimizer in backward, and with the distributed one."""
    return run_cases(axes, CASES), run_cases(axes, [replace(case, in_backward=False) for case in CASES])


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("tp2 pp2",)))
def test_weights_are_those_of_the_ordinary_optimizer(ranks, axes):
    answers = ranks.run(run_both_ways, axes)
    for index in range(len(CASES)):
        (whole, copies), (wanted, _) = (
            assemble([answer[way][index]["pieces"] for answer in answers]) for way in (0, 1)
        )
        assert copies == 0
        for name, steps in whole.items():
            assert (steps - wanted[name]).abs().max() <= 1e-6, (index, name)  # of changes up to 0.3
        assert max(steps.abs().max() for steps in whole.values()) > 0.01
        for found, expected in answers:
            assert found[index]["losses"] == pytest.approx(expected[index]["losses"], rel=1e-5)
            assert found[index]["norms"] == pytest.approx(expected[index]["norms"], rel=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]], ids=["several", "one"])
def test_bf16_weights_follow_fp32_masters(lengths):
    """Without masters, changes below half a bf16 rounding, most of these, would be lost."""
    settings = replace(SETTINGS, lr=0.003)
    case = Case(dtype=torch.bfloat16, lengths=lengths, settings=settings, num_steps=4, in_backward=True)
    found, expected = run_cases({}, [case, replace(case, in_backward=False)])
    (whole, _), (wanted, _) = (assemble([result["pieces"]]) for result in (found, expected))
    for name, steps in whole.items():
        # The remainder rounds ties away from zero, torch to even: neighbours, from 1 to 2 by 2⁻⁷ apart.
        assert (steps - wanted[name]).abs().max() <= 2**-7, name
        assert (steps != wanted[name]).float().mean() <= 0.01, name
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)


class LiveGradients:
    """Bytes of all parameter gradients that are still allocated."""

    def __init__(self, chunks) -> None:
        self.peak, self._storages = 0, {}
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter) -> None:
        storage = parameter.grad.untyped_storage()
        self._storages[storage.data_ptr(), len(self._storages)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        alive = {ref.cdata: size for ref, size in self._storages.values() if not ref.expired()}
        return sum(alive.values())


def live_bytes(axes, lengths, in_backward, changes):
    """(peak of live gradients, after the step, the largest bucket, the whole gradient), each in bytes."""
    case = Case(lengths=lengths, settings=SETTINGS, changes=changes)
    with open_topology(Layout(**axes)) as topology:
        chunks = make_chunks(case, topology)
        batches = make_batches(case, topology)
        live = LiveGradients(chunks)
        state = training_state(chunks, SETTINGS, topology=topology, in_backward=in_backward)
        buckets = defaultdict(int)
        for chunk in chunks:
            for name, parameter in chunk.named_weights():
                parts = name.split(".")
                buckets[".".join(parts[:3]) if parts[1] == "layers" else parts[0]] += 4 * parameter.numel()
        train_step(case, state, batches[topology.dp_rank :: topology.dp], topology)
        assert state.step().is_applied
        return live.peak, live.now, max(buckets.values()), sum(buckets.values())


@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_at_most_one_bucket_of_gradient_is_alive(ranks, axes):
    dp = 4 // math.prod(axes.values())
    for peak, after, bucket, whole in ranks.run(live_bytes, axes, LENGTHS[:dp], True, {}):
        assert 0 < peak <= bucket < whole / 2
        assert after == 0


def test_gradients_of_earlier_micro_batches_and_of_a_tied_head_wait(ranks):
    """The exceptions to one bucket of gradients have the documented size, and are freed after the step."""
    for peak, after, _, whole in ranks.run(live_bytes, {"tp": 2}, LENGTHS, True, {}):
        assert whole <= peak <= 1.5 * whole  # the sums of all, and a bucket's arrivals
        assert after == 0
    tied = {"has_tied_head": True, "vocab_size": 512}
    for peak, after, bucket, whole in ranks.run(live_bytes, {"pp": 2}, LENGTHS[:2], True, tied):
        assert peak < whole
        assert peak <= bucket + 4 * (whole - bucket)
        assert after == 0


LIMIT = 0.4


def clipped_steps(in_backward, num_idle_steps):
    """The gradient behind a clipped step, after `num_idle_steps` whose learning rate was 0."""
    case = Case()
    with open_topology(Layout()) as topology:
        chunks, batches = make_chunks(case, topology), make_batches(case, topology)
        settings = replace(READS_GRADIENT, clip_grad=LIMIT)
        state = training_state(chunks, settings, topology=topology, in_backward=in_backward)
        before = {name: p.detach().clone() for name, p in chunks[0].named_weights()}
        norms = []
        for index in range(num_idle_steps + 1):
            state.set_lr(float(index == num_idle_steps))
            train_step(case, state, batches, topology)
            norms.append(state.step().grad_norm)
        steps = {name: before[name] - p.detach() for name, p in chunks[0].named_weights()}
        return gradients(steps), norms


def test_each_bucket_is_clipped_by_the_newest_norms():
    plain, (norm,) = clipped_steps(False, 0)
    assert norm > 2 * LIMIT
    whole = {name: gradient * norm / LIMIT for name, gradient in plain.items()}
    first, found_norms = clipped_steps(True, 0)
    assert found_norms == pytest.approx([norm], rel=1e-6)  # of the gradient before it is clipped
    order = ["output_layer.", "decoder.final_layernorm.", *(f"decoder.layers.{i}." for i in (3, 2, 1, 0))]
    square = 0.0
    for prefix in [*order, "embedding."]:
        bucket = {name: gradient for name, gradient in whole.items() if name.startswith(prefix)}
        square += sum(float(gradient.square().sum()) for gradient in bucket.values())
        factor = min(1.0, LIMIT / math.sqrt(square))
        expected = {name: gradient * factor for name, gradient in bucket.items()}
        # The gradient is read off the weights: their rounding is 1e-5 of small ones.
        assert worst_difference({name: first[name] for name in bucket}, expected) <= 1e-3, prefix
    # The second step knows all norms of the first; they are the same, and so is the factor.
    second, _ = clipped_steps(True, 1)
    assert worst_difference(second, plain) <= 1e-3


def changes_under_faults(axes, fault):
    """Whether the step was taken, and which weights changed: of a faulty step, then of a good one."""
    case = Case()
    with open_topology(Layout(**axes)) as topology:
        chunks, batches = make_chunks(case, topology), make_batches(case, topology)
        state = InBackwardState(chunks, SETTINGS, topology=topology)
        is_faulty, answers = topology.rank == topology.world_size - 1, []
        if is_faulty and fault == "gradient":
            weight = dict(chunks[0].named_weights())["decoder.layers.1.self_attention.linear_proj.weight"]
            handle = weight.register_hook(lambda gradient: gradient * torch.nan)
        for step in range(2):
            before = {name: p.detach().clone() for name, p in chunks[0].named_weights()}
            if is_faulty and fault == "loss" and step == 0:
                with torch.no_grad():
                    saved = chunks[0].output_layer.weight[0].clone()
                    chunks[0].output_layer.weight[0] = torch.inf
            train_step(case, state, batches[topology.dp_rank :: topology.dp], topology)
            result = state.step()
            if is_faulty and fault == "loss" and step == 0:
                with torch.no_grad():
                    chunks[0].output_layer.weight[0] = saved
            if is_faulty and fault == "gradient" and step == 0:
                handle.remove()
            after = {name: p.detach() for name, p in chunks[0].named_weights()}
            changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
            answers.append((result.is_applied, changed, set(after)))
        return answers


def test_a_gradient_that_is_not_finite_stops_its_bucket_and_all_after_it_on_every_rank(ranks):
    before = ("output_layer.", "decoder.final_layernorm.", "decoder.layers.3.", "decoder.layers.2.")
    for faulty, good in ranks.run(changes_under_faults, {"tp": 2}, "gradient"):
        is_applied, changed, names = faulty
        assert not is_applied
        assert changed == {name for name in names if name.startswith(before)}
        is_applied, changed, names = good
        assert is_applied
        assert changed == names


def test_a_loss_that_is_not_finite_changes_nothing(ranks):
    for faulty, good in ranks.run(changes_under_faults, {"tp": 2}, "loss"):
        assert faulty[:2] == (False, set())
        assert good[0]
        assert good[1] == good[2]


def test_a_state_and_its_model_do_not_keep_each_other_alive():
    def train() -> weakref.ref:
        with open_topology(Layout()) as topology:
            case = Case()
            chunks, batches = make_chunks(case, topology), make_batches(case, topology)
            train_step(case, InBackwardState(chunks, SETTINGS, topology=topology), batches, topology)
            forward(case, chunks, batches, topology)  # the state is gone
            return weakref.ref(chunks[0])

    gc.collect()
    gc.disable()  # at once, not when the garbage collector runs
    try:
        assert train()() is None
    finally:
        gc.enable()


def test_whoever_reads_the_weights_is_waited_for_before_they_change():
    with open_topology(Layout()) as topology:
        case = Case()
        chunks, batches = make_chunks(case, topology), make_batches(case, topology)
        state = InBackwardState(chunks, SETTINGS, topology=topology)
        before = {name: p.detach().clone() for name, p in chunks[0].named_weights()}
        changed = []

        def note() -> None:
            weights = chunks[0].named_weights()
            changed.append({name for name, p in weights if not torch.equal(p, before[name])})

        state.wait_for_readers = note
        train_step(case, state, batches, topology)
        assert state.step().is_applied
        assert changed[0] == set()
        assert changed[-1] == {name for name in before if not name.startswith("embedding.")}


def test_what_cannot_be_combined_is_refused():
    with open_topology(Layout()) as topology:
        chunks = make_chunks(Case(), topology)
        with pytest.raises(ValueError, match=r"set overlap_communication to false"):
            training_state(chunks, SETTINGS, topology=topology, overlap_communication=True, in_backward=True)
        chunks = make_chunks(Case(dtype=torch.float16), topology)
        with pytest.raises(ValueError, match=r"float16 weights cannot be trained"):
            InBackwardState(chunks, SETTINGS, topology=topology)
