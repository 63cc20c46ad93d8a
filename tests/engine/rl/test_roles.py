"""PPO: first-step identities, the same numbers in every layout, weights that never move."""

import gc
import json
import math
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from little_memory import little_memory
from reward_rules import share_of_low_ids
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.rewards.function import RewardError
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

LAYOUTS = {
    "tp2": {"tp": 2},
    "tp4 sp": {"tp": 4, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
}
NUM_ITERATIONS = 3
GOLDEN = Path(__file__).with_name("golden_ppo.json")
"""Metrics of five iterations of `make_roles` on one rank, written by this file when run as a script."""
TIMED = ("timing_s/", "perf/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def iterate(engine: PPORoles, count: int = NUM_ITERATIONS) -> list[dict[str, float]]:
    metrics = []
    for _ in range(count):
        experience = engine.make_experience(engine.generate(prompts()))
        metrics.append(engine.update(experience))
    return metrics


def run_iterations(
    folder: Path, axes: dict, options: dict, count: int = NUM_ITERATIONS
) -> list[dict[str, float]]:
    with open_topology(Layout(**axes)) as topology:
        return iterate(make_roles(folder, topology, **options), count)


@pytest.fixture(scope="module")
def alone(folder):
    """Metrics of one rank, without and with a reference baseline."""
    return {
        baseline: run_iterations(folder, {}, {"uses_reference_baseline": baseline})
        for baseline in (False, True)
    }


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(None, id="alone"),
        *layout_params(LAYOUTS, quick=("tp2 pp2",)),
    ],
)
def test_five_iterations_have_their_stored_metrics_in_every_layout(ranks, folder, axes):
    """What a layout leaves of four ranks is data parallel: tp2, pp2 and cp2 run with dp 2."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if axes is None:
        results = [run_iterations(folder, {}, {}, len(golden))]
    else:
        results = ranks.run(run_iterations, folder, axes, {}, len(golden))
    for found in results:
        for one, expected in zip(found, golden, strict=True):
            timeless = {name for name in one if not name.startswith(TIMED)}
            assert timeless == expected.keys()
            for name in expected:
                # Sums in another order, grown through ten updates, and for the KL differences of logprobs:
                # both to a few 1e-6; extremes of the ratio, one token each, a little more. A wrong share
                # gives 1e-2 and more.
                rel = 3e-5 if name.startswith("actor/ratio_") else 1e-5
                # The explained variance is 1 less a ratio of about 1, which is what has this accuracy.
                least = 1e-5 if name == "critic/vf_explained_var" else 5e-6
                assert one[name] == pytest.approx(expected[name], rel=rel, abs=least), name


def test_a_reference_baseline_gives_the_metrics_of_one_rank(ranks, folder, alone):
    options = {"uses_reference_baseline": True}
    for found in ranks.run(run_iterations, folder, {"tp": 2, "pp": 2}, options):
        for one, expected in zip(found, alone[True], strict=True):
            for name in (name for name in expected if not name.startswith(TIMED)):
                # As above.
                assert one[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), name


def run_with_little_memory(folder: Path, axes: dict) -> list[dict[str, float]]:
    with open_topology(Layout(**axes)) as topology:
        roles = make_roles(folder, topology, settings={"micro_batch_tokens": 200})
        with little_memory(None, 40) as met:
            metrics = iterate(roles, 1)
        assert met
        return metrics


def test_little_memory_gives_the_metrics_of_enough(ranks, folder, alone):
    for (found,) in ranks.run(run_with_little_memory, folder, {"tp": 2, "pp": 2}):
        for name in (name for name in found if not name.startswith(TIMED)):
            # As between layouts.
            assert found[name] == pytest.approx(alone[False][0][name], rel=1e-5, abs=5e-6), name


def run_in_backward(folder: Path, axes: dict, in_backward: bool) -> list[dict[str, float]]:
    adam = AdamSettings(lr=1e-3, clip_grad=0.0)
    options = {"policy_adam": adam, "critic_adam": adam, "in_backward": in_backward}
    return run_iterations(folder, axes, options, 2)


def test_an_optimizer_in_backward_gives_the_metrics_of_the_ordinary_one(ranks, folder):
    expected = run_in_backward(folder, {}, False)
    for found in ranks.run(run_in_backward, folder, {"tp": 2, "pp": 2}, True):
        for one, wanted in zip(found, expected, strict=True):
            for name in (name for name in wanted if not name.startswith(TIMED)):
                # As between layouts.
                assert one[name] == pytest.approx(wanted[name], rel=1e-4, abs=2e-5), name


def test_first_step_identities(alone):
    first, *later = alone[False]
    assert abs(first["actor/first_ppo_kl"]) < 1e-8
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["rollout/logprob_gap"] < 1e-5
    assert first["actor/ppo_kl"] > 1e-7  # the second mini-batch and epoch see a changed policy
    assert all(abs(metrics["objective/kl"]) > 1e-4 for metrics in later)
    assert all(math.isfinite(value) for metrics in alone[False] for value in metrics.values())


def test_the_reference_baseline_starts_near_zero(alone):
    plain, with_baseline = alone[False][0], alone[True][0]
    assert plain["reward/minus_baseline/mean"] > 0.2
    assert abs(with_baseline["reward/minus_baseline/mean"]) < plain["reward/minus_baseline/mean"] / 2


def test_addresses_never_change_and_weights_do(folder):
    with open_topology(Layout()) as topology:
        engine = make_roles(folder, topology)
        weights = dict(engine.models["policy"][0].named_weights())
        addresses = {name: weight.data_ptr() for name, weight in weights.items()}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        iterate(engine)
        assert {name: weight.data_ptr() for name, weight in weights.items()} == addresses
        assert all(not torch.equal(before[name], weight) for name, weight in weights.items())
        reference = dict(engine.models["reference"][0].named_weights())
        assert all(torch.equal(before[name], reference[name]) for name in before)


def iterate_offloaded(folder: Path, axes: dict) -> tuple:
    """Metrics with all that can be offloaded, and with nothing; offloaded bytes; whether the policy stays."""
    offloads = ("optimizers", "reference", "reward")
    with open_topology(Layout(**axes)) as topology:
        reward_model, _ = load_model(folder, topology, role="reward", dtype=torch.float32, seed=8)
        engine = make_roles(folder, topology, reward_model=reward_model, offloads=offloads)
        frozen = [
            weight for model in (engine.models["reference"], reward_model) for weight in model[0].parameters()
        ]
        for weight in frozen:
            weight.data = weight.data.clone()  # numpy has read it, and would keep a CPU's memory
        addresses = [weight.data_ptr() for _, weight in engine.models["policy"][0].named_weights()]
        metrics, offloaded = [], []
        for _ in range(2):
            metrics += iterate(engine, 1)
            offloaded.append(engine.offload.offloaded_bytes)
            assert all(weight.untyped_storage().nbytes() == 0 for weight in frozen)
        stays = [weight.data_ptr() for _, weight in engine.models["policy"][0].named_weights()] == addresses
        engine.offload.before_scoring()
        plain = make_roles(folder, topology, reward_model=reward_model)
        return metrics, iterate(plain, 2), offloaded, stays


def test_offloading_changes_no_number_and_no_address_of_the_policy(ranks, folder):
    for metrics, expected, offloaded, stays in ranks.run(iterate_offloaded, folder, {"pp": 2}):
        assert stays
        assert 0 < offloaded[0] < offloaded[1]  # moments come with the first step, frozen models go with it
        for one, plain in zip(metrics, expected, strict=True):
            for name in (name for name in plain if not name.startswith(TIMED)):
                # Scored early or not: roundings of fp32, grown through updates.
                assert one[name] == pytest.approx(plain[name], rel=1e-5, abs=5e-6), name


def test_an_engine_releases_its_models_at_once(folder):
    """Not when a collector comes by: until then their memory is taken and threads of gloo poll."""

    def run() -> list[weakref.ref]:
        with open_topology(Layout()) as topology:
            engine = make_roles(folder, topology, uses_reference_baseline=True)
            iterate(engine, 1)
            return [weakref.ref(chunks[0]) for chunks in engine.models.values()]

    gc.collect()
    gc.disable()
    try:
        assert [model() for model in run()] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_reward_rises_on_an_easy_rule(folder):
    with open_topology(Layout()) as topology:
        metrics = iterate(make_roles(folder, topology, settings={"kl_coef": 0.0, "kl_target": None}), 25)
    rewards = [one["reward/minus_baseline/mean"] for one in metrics]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_another_temperature_has_logprobs_of_its_own(folder):
    with open_topology(Layout()) as topology:
        (metrics,) = iterate(make_roles(folder, topology, temperature=0.7), 1)
    assert math.isnan(metrics["rollout/logprob_gap"])
    assert abs(metrics["actor/first_ppo_kl"]) < 1e-8


def test_only_the_critic_learns_while_it_warms_up(folder):
    with open_topology(Layout()) as topology:
        engine = make_roles(folder, topology, settings={"critic_warmup_iterations": 1})
        before = [p.detach().clone() for _, p in engine.models["policy"][0].named_weights()]
        first, second = iterate(engine, 2)
    assert "actor/pg_loss" not in first
    assert "critic/vf_loss" in first
    assert "actor/pg_loss" in second
    assert any(
        not torch.equal(a, b)
        for a, (_, b) in zip(before, engine.models["policy"][0].named_weights(), strict=True)
    )


def test_an_update_stops_early_when_the_policy_moves_too_far(folder):
    with open_topology(Layout()) as topology:
        (metrics,) = iterate(make_roles(folder, topology, settings={"epochs": 50, "max_kl": 1e-6}), 1)
    assert metrics["actor/stopped_early"] == 1.0


def test_a_reward_function_judges_each_answer_once_and_some_while_others_are_generated(folder):
    judged, is_generating = [], [True]

    def rule(requests):
        judged.extend((request.response_tokens, is_generating[0]) for request in requests)
        return share_of_low_ids(requests)

    with open_topology(Layout()) as topology:
        engine = make_roles(folder, topology, function=rule)
        rollouts = engine.generate(prompts())
        is_generating[0] = False
        rewards = engine.make_experience(rollouts).rewards_B.tolist()
        again = engine.make_experience(rollouts).rewards_B.tolist()  # of answers that are not new any more
        after = make_roles(folder, topology, function=rule, reward_concurrency=0)
        expected = after.make_experience(after.generate(prompts())).rewards_B.tolist()
    answers = sorted(tuple(rollouts.answer(i).tolist()) for i in range(rollouts.num_sequences))
    assert sorted(tokens for tokens, _ in judged[: len(answers)]) == answers
    assert any(is_early for _, is_early in judged)
    assert not any(is_early for _, is_early in judged[-len(answers) :])
    assert rewards == again == expected


def broken_reward(requests) -> list[float]:
    return [float("nan")] * len(requests)


def run_with_a_broken_reward(folder: Path) -> str:
    with open_topology(Layout(tp=2)) as topology:
        engine = make_roles(folder, topology, function=broken_reward)
        rollouts = engine.generate(prompts())
        try:
            engine.make_experience(rollouts)
        except RewardError as error:
            return str(error)
    return ""


def test_a_reward_that_is_no_number_stops_every_rank(ranks, folder):
    for said in ranks.run(run_with_a_broken_reward, folder):
        assert "reward 0" in said
        assert "nan" in said


def run_with_a_broken_critic(folder: Path) -> str:
    with open_topology(Layout(pp=2)) as topology:
        engine = make_roles(folder, topology)
        rollouts = engine.generate(prompts())
        if topology.rank == 3:
            with torch.no_grad():
                engine.models["critic"][0].value_head.weight.fill_(torch.inf)
        try:
            engine.make_experience(rollouts)
        except FloatingPointError as error:
            return str(error)
    return ""


def test_a_value_that_is_no_number_stops_every_rank_and_names_the_role(ranks, folder):
    for said in ranks.run(run_with_a_broken_critic, folder):
        assert "the critic's values of answers 0, 1, 2 and 5 more" in said


if __name__ == "__main__":  # PYTHONPATH=tests/support/models python tests/engine/rl/test_roles.py
    with tempfile.TemporaryDirectory() as made:
        metrics = run_iterations(save_folder(Path(made), "glm", make_model("glm")), {}, {}, 5)
    kept = [{n: v for n, v in one.items() if not n.startswith(TIMED)} for one in metrics]
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
