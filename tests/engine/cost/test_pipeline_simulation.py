"""Simulated schedules: bubbles known in closed form, hand-computed rounds."""

import pytest

from glm_rlhf.engine.cost.pipeline_simulation import is_padding, simulate_generation, simulate_passes
from glm_rlhf.parallel.spec.layout import Layout


def seconds(forward: float, backward: float):
    return lambda _stage, one: forward if one.kind == "forward" else backward


@pytest.mark.parametrize(("pp", "count"), [(1, 3), (2, 4), (4, 4), (4, 13)])
def test_one_forward_one_backward_has_its_known_bubble(pp, count):
    """(M + p - 1)(f + b), of which each stage computes M (f + b)."""
    simulated = simulate_passes(Layout(pp=pp), count, seconds(1.0, 2.0), hop_s=0.0)
    assert simulated.seconds == pytest.approx((count + pp - 1) * 3.0)
    assert simulated.busy_s == pytest.approx((count * 3.0,) * pp)
    assert simulated.idle_fraction == pytest.approx((pp - 1) / (count + pp - 1))


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_interleaving_divides_the_bubble(pp, vpp, count):
    """(M v + p - 1)(f + b) with chunks that take f / v each (Narayanan et al. 2021, section 2.2)."""
    simulated = simulate_passes(Layout(pp=pp, vpp=vpp), count, seconds(1.0, 2.0), hop_s=0.0)
    assert simulated.seconds == pytest.approx((count * vpp + pp - 1) * 3.0)


def test_forward_alone_fills_and_drains_once():
    simulated = simulate_passes(Layout(pp=3), 5, seconds(2.0, 0.0), hop_s=0.5, forward_only=True)
    assert simulated.seconds == pytest.approx((5 + 2) * 2.0 + 2 * 0.5)


def test_a_stage_waits_for_the_hop():
    """Two stages, one micro-batch: f, hop, f, b, hop, b."""
    simulated = simulate_passes(Layout(pp=2), 1, seconds(1.0, 2.0), hop_s=0.25)
    assert simulated.seconds == pytest.approx(1 + 0.25 + 1 + 2 + 0.25 + 2)


def test_a_slow_stage_sets_the_pace():
    simulated = simulate_passes(
        Layout(pp=2),
        20,
        lambda stage, one: (1.0 + stage) * (1 if one.kind == "forward" else 2),
        hop_s=0.0,
    )
    assert simulated.seconds == pytest.approx(1 + 20 * 6 + 2)


def test_padding_comes_first_and_costs_nothing():
    layout = Layout(pp=2, vpp=2)

    def duration(_stage, one):
        return 0.0 if is_padding(layout, 3, one) else 1.0

    simulated = simulate_passes(layout, 3, duration, hop_s=0.0)
    assert sum(simulated.busy_s) == pytest.approx(3 * 2 * 2 * 2)


def test_rotating_groups_keep_every_stage_busy():
    """As many groups as stages: after the first turn no stage waits; each round takes groups × step."""
    simulated = simulate_generation([1.0, 1.0], num_groups=2, num_rounds=10, hop_s=0.0, back_s=0.0)
    assert simulated.seconds == pytest.approx(2 * 10 + 1)
    assert simulated.busy_s == pytest.approx((20.0, 20.0))


def test_one_group_over_two_stages_leaves_each_idle_half_the_time():
    simulated = simulate_generation([1.0, 1.0], num_groups=1, num_rounds=10, hop_s=0.25, back_s=0.5)
    assert simulated.seconds == pytest.approx(10 * (1 + 0.25 + 1 + 0.5))


def test_nothing_to_do_takes_no_time():
    assert simulate_generation([1.0], num_groups=1, num_rounds=0, hop_s=0.0, back_s=0.0).idle_fraction == 0.0
