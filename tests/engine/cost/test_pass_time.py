"""Costs worked by hand, and how they follow from layouts and rates."""

from dataclasses import replace

import pytest

from glm_rlhf.engine.cost.activations import RankMicroBatch
from glm_rlhf.engine.cost.hardware import GPUS, Cluster, Rates
from glm_rlhf.engine.cost.iteration_time import estimate
from glm_rlhf.engine.cost.pass_time import (
    DecodeCosts,
    PassCosts,
    all_reduce_s,
    layer_matrix_elements,
    optimizer_step,
)
from glm_rlhf.engine.cost.workload import Choice, Roles, Workload
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.shard_sizes import chunk_sizes

MODEL = preset("tiny-glm")
NOTHING = 1e-30
RATES = Rates(
    flop_per_s=1e9,
    attention_flop_per_s=1e30,
    bytes_per_s=1e30,
    node_bytes_per_s=1e6,
    network_bytes_per_s=1e6,
    node_latency_s=NOTHING,
    network_latency_s=NOTHING,
    layer_s=NOTHING,
    decode_layer_s=NOTHING,
    pass_s=NOTHING,
    turn_s=NOTHING,
    step_s=NOTHING,
    backward_factor=2.0,
    source="by hand",
)
WORK = Workload(
    max_prompt_tokens=32,
    max_new_tokens=32,
    mean_prompt_tokens=32,
    mean_new_tokens=32,
    num_prompts=16,
    num_samples=1,
    max_batch=16,
    max_step_tokens=512,
    page_size=16,
    itemsize=4,
    epochs=1,
    minibatches=1,
    recomputes_logprobs=False,
)
ROLES = Roles(policy=MODEL, critic=MODEL, reference=MODEL, reward=MODEL)


def cluster(num_gpus: int, **changes) -> Cluster:
    rates = replace(RATES, **changes)
    return Cluster(gpu=GPUS["h100"], num_gpus=num_gpus, gpus_per_node=8, rates=rates, usable_bytes=1)


def costs(layout: Layout, *, recompute_layers: bool = False, **changes) -> PassCosts:
    choice = Choice(layout=layout, micro_batch_tokens=256, recompute_layers=recompute_layers)
    return PassCosts(
        cluster=cluster(layout.num_model_ranks, **changes),
        choice=choice,
        batch=RankMicroBatch(model=MODEL, layout=layout, num_tokens=256, itemsize=4),
        length=64,
        has_scalar_head=True,
        num_targets=0,
    )


def seconds(choice: Choice, num_gpus: int, **changes) -> dict[str, float]:
    found = estimate(ROLES, WORK, choice, cluster(num_gpus, **changes), num_concurrent=16, has_baseline=False)
    return {name: phase.seconds for name, phase in found.phases.items()}


def test_a_layer_has_the_matrices_of_the_model():
    whole = chunk_sizes(MODEL, Layout(), has_scalar_head=False, stage=0, chunk=0).num_model_dtype
    vectors = MODEL.num_layers * (2 * 64 + (8 + 2 * 2) * 16) + 64
    matrices = MODEL.num_layers * layer_matrix_elements(MODEL, Layout())
    assert whole == matrices + 2 * 128 * 64 + vectors
    # With more ranks than key/value heads each rank holds one full head.
    assert layer_matrix_elements(MODEL, Layout(tp=4)) == 64 * ((2 * 8 + 2 * 4) * 16 + 3 * 96) // 4


def test_forward_is_its_products_and_backward_twice_as_many():
    one = costs(Layout())
    products = 2 * 256 * MODEL.num_layers * layer_matrix_elements(MODEL, Layout()) / 1e9
    assert one.forward(is_last=False, trains=True).total_s == pytest.approx(products)
    assert one.backward().total_s == pytest.approx(2 * products)
    assert costs(Layout(), recompute_layers=True).backward().total_s == pytest.approx(3 * products)


def test_tensor_parallel_layers_reduce_twice_each_way():
    one = costs(Layout(tp=2))
    reduction = 2 * (256 * 64 * 4) * (1 / 2) / 1e6
    assert one.forward(is_last=False, trains=True).communication_s == pytest.approx(8 * reduction)
    assert one.backward().communication_s == pytest.approx(8 * reduction)
    assert all_reduce_s(100.0, 4, 10.0, 0.5) == pytest.approx(0.5 + 2 * 100 * 3 / 4 / 10)


def test_the_vocabulary_head_takes_three_products_in_training():
    policy = replace(costs(Layout()), has_scalar_head=False, num_targets=100)
    plain = policy.forward(is_last=False, trains=True).total_s
    head = 2 * 100 * 128 * 64 / 1e9
    assert policy.forward(is_last=True, trains=False).total_s - plain == pytest.approx(head)
    assert policy.forward(is_last=True, trains=True).total_s - plain == pytest.approx(3 * head)


def test_an_optimizer_step_sums_gradients_and_gathers_weights():
    choice = Choice(layout=Layout(), micro_batch_tokens=256, recompute_layers=False)
    count = chunk_sizes(MODEL, Layout(), has_scalar_head=False, stage=0, chunk=0).num_model_dtype
    step = optimizer_step(MODEL, cluster(4), choice, itemsize=2, has_scalar_head=False)
    assert step.communication_s == pytest.approx(6 * count * 3 / 4 / 1e6)
    assert optimizer_step(MODEL, cluster(1), choice, itemsize=2, has_scalar_head=False).communication_s == 0


def test_a_decode_step_reads_weights_or_multiplies_whichever_is_longer():
    choice = Choice(layout=Layout(), micro_batch_tokens=256, recompute_layers=False)
    elements = MODEL.num_layers * layer_matrix_elements(MODEL, Layout())
    one = DecodeCosts(cluster=cluster(1, bytes_per_s=1e6), choice=choice, work=WORK, policy=MODEL)
    cached = 2 * MODEL.num_layers * 2 * 16 * 40 * 3
    read = (elements + cached) * 4 / 1e6
    assert one.step(3, context=40, is_last=False).total_s == pytest.approx(read)
    one = DecodeCosts(cluster=cluster(1), choice=choice, work=WORK, policy=MODEL)
    assert one.step(3, context=40, is_last=False).total_s == pytest.approx(2 * 3 * elements / 1e9)


def test_more_copies_take_less_time_and_stages_wait():
    alone = seconds(Choice(layout=Layout(), micro_batch_tokens=128, recompute_layers=False), 1)
    copies = seconds(
        Choice(layout=Layout(), micro_batch_tokens=128, recompute_layers=False), 2, node_bytes_per_s=1e30
    )
    for name in alone.keys() - {"score"}:  # in which each copy's policy scores a micro-batch, however many
        assert copies[name] == pytest.approx(alone[name] / 2), name
    assert alone["score"] / 2 < copies["score"] < alone["score"]
    layout = Layout(pp=2)
    found = estimate(
        replace(ROLES, policy=replace(MODEL, vocab_size=1)),
        WORK,
        Choice(layout=layout, micro_batch_tokens=128, recompute_layers=False),
        cluster(2, node_bytes_per_s=1e30),
        num_concurrent=16,
        has_baseline=False,
    )
    for name in ("train policy", "train critic"):
        phase = found.phases[name]
        # Twice eight micro-batches in one schedule of two stages, a head of next to nothing.
        assert phase.idle_s / phase.seconds == pytest.approx(1 / 17, rel=1e-2), name
    assert found.phases["generate"].idle_s < 0.05 * found.phases["generate"].seconds


def test_useful_flop_is_counted_once():
    """Layers that run again take time, and no more of what counts as work."""
    found = [
        estimate(
            ROLES,
            WORK,
            Choice(layout=Layout(), micro_batch_tokens=128, recompute_layers=again),
            cluster(1),
            num_concurrent=16,
            has_baseline=True,
        )
        for again in (False, True)
    ]
    assert found[1].total.flop == found[0].total.flop
    assert found[1].mfu(("train critic",)) == pytest.approx(found[0].mfu(("train critic",)) * 3 / 4)
    tokens = 16 * 64
    elements = MODEL.num_layers * layer_matrix_elements(MODEL, Layout())
    attention = 2 * 16 * 64**2 * MODEL.num_layers * 8 * 16
    assert found[0].phases["train critic"].flop == 3 * (2 * tokens * elements + attention)
    assert found[0].phases["baseline"].seconds > found[0].phases["generate"].seconds * 0.9
