"""Old logprobs: a sample of the sampler's is looked at, and where it is wrong all are computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.scoring import old_logprobs
from glm_rlhf.engine.scoring.old_logprobs import draw_sample
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def rollouts_of(lengths: list[int], excluded: frozenset[int] = frozenset()) -> Rollouts:
    """Rollouts of which only the lengths matter."""
    prompt = PromptInput(tokens=(3,), extra={})
    return Rollouts(
        tokens_T=torch.zeros(sum(lengths), dtype=torch.int64),
        lengths=tuple(lengths),
        prompt_lengths=(1,) * len(lengths),
        prompts=(prompt,) * len(lengths),
        is_finished=(True,) * len(lengths),
        logprobs_T=torch.zeros(sum(lengths)),
        temperature=1.0,
        indices=tuple(range(len(lengths))),
        num_global=len(lengths),
        excluded=excluded,
    )


@pytest.mark.parametrize("count, expected", [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_a_sample_is_an_eighth_rounded_up(count, expected):
    assert len(draw_sample(rollouts_of([5] * count), max_tokens=1000, seed=1)) == expected


def test_a_sample_is_drawn_anew_by_each_seed_and_the_same_by_the_same():
    rollouts = rollouts_of([5] * 64)
    samples = [draw_sample(rollouts, max_tokens=1000, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    sampled = frozenset().union(*(draw_sample(rollouts, max_tokens=1000, seed=seed) for seed in range(100)))
    assert sampled == frozenset(range(64))


def test_a_sample_has_room_in_a_micro_batch_or_is_one_sequence():
    assert len(draw_sample(rollouts_of([30] * 64), max_tokens=100, seed=1)) == 3
    assert len(draw_sample(rollouts_of([300] * 64), max_tokens=100, seed=1)) == 1


def test_excluded_answers_are_not_in_a_sample():
    rollouts = rollouts_of([5] * 9, excluded=frozenset(range(8)))
    assert draw_sample(rollouts, max_tokens=1000, seed=1) == {8}
    assert not draw_sample(rollouts_of([5], excluded=frozenset({0})), max_tokens=1000, seed=1)


def scored_with_a_gap(folder: Path) -> dict:
    """What becomes of logprobs that are right, and of those that the first data-parallel rank has wrong.

    The other one then has all its answers excluded.
    """
    passed = []

    def counted(policy, rollouts, batches, *arguments, **options):
        passed.append(sum(sum(batch.packed.lengths) for batch in batches))
        return stream_logprobs(policy, rollouts, batches, *arguments, **options)

    stream_logprobs = old_logprobs.stream_logprobs
    with open_topology(Layout(pp=2)) as topology, pytest.MonkeyPatch.context() as patch:
        patch.setattr(old_logprobs, "stream_logprobs", counted)
        engine = make_roles(folder, topology)
        right = engine.generate(prompts())
        fine = engine.make_experience(right)
        (num_sampled,) = passed
        passed.clear()
        is_wrong = topology.dp_rank == 0
        shift = 0.5 * is_wrong * right.action_mask_T
        corrected = engine.make_experience(replace(right, logprobs_T=right.logprobs_T + shift))
        # Roundings: other micro-batches, and steps of generation in place of a pass.
        torch.testing.assert_close(corrected.old_logprobs_T, right.logprobs_T, rtol=0, atol=1e-5)
        torch.testing.assert_close(corrected.advantages_T, fine.advantages_T, rtol=0, atol=1e-4)
        excluded = frozenset() if is_wrong else frozenset(range(right.num_sequences))
        alone = replace(right, logprobs_T=right.logprobs_T + shift, excluded=excluded)
        found_T, gap = old_logprobs.old_logprobs(
            engine.models["policy"],
            alone,
            alone.action_mask_T,
            max_gap=engine.algorithm.section.max_logprob_gap,
            max_tokens=engine.micro_batch_tokens,
            seed=1,
            topology=topology,
        )
        torch.testing.assert_close(
            found_T, right.logprobs_T * alone.action_mask_T, rtol=0, atol=1e-5
        )  # as above
        return {
            "is the sampler's": torch.equal(fine.old_logprobs_T, right.logprobs_T),
            "gaps": (*(one.metrics["rollout/logprob_gap"] for one in (fine, corrected)), gap),
            "passed": (num_sampled, *passed[:2]),
            "tokens": len(right.tokens_T),
        }


def test_a_gap_on_one_rank_lets_all_compute_theirs(ranks, folder):
    found = ranks.run(scored_with_a_gap, folder)
    assert len({one["gaps"] for one in found}) == 1
    for one in found:
        right, wrong, alone = one["gaps"]
        assert one["is the sampler's"]
        assert right < 1e-5
        assert 0.1 < wrong < 0.4  # half of the ranks, not half of the tokens
        assert alone == pytest.approx(0.5, abs=1e-5)  # roundings, as above
        sampled, sampled_again, others = one["passed"]
        assert 0 < sampled == sampled_again < one["tokens"] / 2
        assert sampled + others == one["tokens"]
