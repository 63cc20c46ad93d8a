"""`ppo_peers`: the rule, what a verdict says, and where TRL is missing."""

import pytest
import torch

from benchmarks.peers.ppo import Seed, gain, row_of, verdict
from benchmarks.peers.ppo_task import LOW_IDS, PROMPTS, SHAPE, TASKS, Run, draw_prompts, share_of_low_ids
from benchmarks.peers.ppo_trl import _NO_ID, _padded, _Rule


def run_of(seconds: float, *rewards: float) -> Run:
    return Run(seconds=[seconds] * len(rewards), rewards=list(rewards), lengths=[24.0] * len(rewards))


def test_both_forms_of_the_rule_agree_wherever_an_answer_ends():
    generator = torch.Generator().manual_seed(1)
    answers_BT = torch.randint(0, 2 * LOW_IDS, (4, 48), generator=generator)
    prompts_BT = torch.tensor(draw_prompts(TASKS[0], 0)[:4])
    prompts_BT[:, 5] = 3  # a low id of the prompt's does not count
    lengths: list[float] = []
    rule = _Rule(prompts_BT.shape[1], lengths)
    ids_BT = torch.cat((prompts_BT, answers_BT), dim=1)
    hidden = rule.backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).hidden_states[-1]
    scores_BT1 = rule.score(hidden)
    assert lengths == [48.0]
    assert scores_BT1.shape == (*ids_BT.shape, 1)
    for length in (1, 17, 48):
        at_end_B = scores_BT1[:, prompts_BT.shape[1] + length - 1, 0]
        for score, answer in zip(at_end_B.tolist(), answers_BT[:, :length].tolist(), strict=True):
            assert score == pytest.approx(share_of_low_ids(answer))


def test_real_lengths_have_a_long_tail_and_fit_the_model():
    task = TASKS[2]
    prompts = draw_prompts(task, 0)
    lengths = [len(prompt) for prompt in prompts]
    assert sorted(lengths) == list(task.prompt_tokens)
    assert lengths != sorted(lengths)
    assert max(lengths) + task.max_answer_tokens <= SHAPE["max_position_embeddings"]
    # A quarter of the data's mean of 120.4 and median of 92, the longest apart.
    assert sum(lengths) / PROMPTS == pytest.approx(30, abs=1.5)
    assert sorted(lengths)[PROMPTS // 2] == pytest.approx(23, abs=1.5)


def test_padding_is_on_the_left_and_no_answers():
    prompts_BT = _padded([{"input_ids": [9, 10, 11]}, {"input_ids": [12]}])["input_ids"]
    assert prompts_BT.tolist() == [[9, 10, 11], [_NO_ID, _NO_ID, 12]]
    lengths: list[float] = []
    ids_BT = torch.cat((prompts_BT, torch.tensor([[1, 9], [1, _NO_ID]])), dim=1)
    mask_BT = ids_BT != _NO_ID
    rule = _Rule(3, lengths)
    hidden = rule.backbone(input_ids=ids_BT.masked_fill(~mask_BT, 0), attention_mask=mask_BT).hidden_states[
        -1
    ]
    scores_BT1 = rule.score(hidden)
    assert lengths == [1.5]
    assert [scores_BT1[0, 4, 0].item(), scores_BT1[1, 3, 0].item()] == [0.5, 1.0]


def test_gain_is_from_the_first_to_the_mean_of_the_last_three():
    assert gain([0.1, 9.0, 0.3, 0.4, 0.5]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "engine, peer, words",
    [
        ((1.0, 0.6), (2.0, 0.5), ["2.00 × as fast (met)", "is no worse", "+0.100"]),
        ((1.1, 0.4), (2.0, 0.5), ["1.82 × as fast (missed)", "is worse", "-0.100"]),
    ],
)
def test_verdict_judges_time_and_learning(engine, peer, words):
    seeds = [
        Seed(engine=run_of(engine[0], 0.1, *[engine[1]] * 3), peer=run_of(peer[0], 0.1, *[peer[1]] * 3))
        for _ in range(3)
    ]
    for word in words:
        assert word in verdict(seeds)


def test_a_gap_within_the_spread_over_seeds_is_no_worse():
    seeds = [
        Seed(engine=run_of(1.0, 0.1, *[0.5 + shift] * 3), peer=run_of(2.0, 0.1, 0.5, 0.5, 0.5))
        for shift in (-0.1, 0.05)
    ]
    assert "Learning is no worse: the gain in reward differs by -0.025 ± 0.106" in verdict(seeds)


def test_without_trl_it_is_absent_and_nothing_is_shown():
    seeds = [Seed(engine=run_of(1.0, 0.1, 0.2, 0.3, 0.4), peer=None)]
    assert verdict(seeds).startswith("Not shown")
    engine, peer = row_of("1 thread", TASKS[1], seeds, "command").entries
    assert engine.timing.median_s == 1.0
    assert peer.timing is None
    assert peer.status == "absent: trl is not installed"
