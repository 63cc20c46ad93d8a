"""The run on real input: what its checks refuse, that its report tells, and the skip without the data."""

import math

import pytest

from benchmarks.end_to_end import real_input
from benchmarks.end_to_end.checks import check_metrics, check_samples
from benchmarks.end_to_end.report import as_markdown

SANE = {
    "reward/minus_baseline/mean": 0.1,
    "reward/minus_baseline/std": 0.2,
    "objective/kl": 0.0,
    "objective/kl_per_token": 0.0,
    "actor/first_ppo_kl": 1e-12,
    "actor/pg_clipfrac": 0.05,
    "actor/entropy": 6.0,
    "actor/grad_norm": 0.5,
    "rollout/logprob_gap": 1e-7,
}
SAMPLES = [
    {"prompt_tokens": [1] * length, "tokens": [1, 2], "prompt": "问题", "text": "answer", "reward": 0.5}
    for length in (3, 7, 9)
]


def lines(**changes) -> list[dict]:
    """Two iterations, the second with `changes`."""
    return [{"step": 1, **SANE}, {"step": 2, **SANE, "objective/kl": 0.3, **changes}]


def test_sane_metrics_pass():
    assert all(check.holds for check in check_metrics(lines(), iterations=2, num_ids=1000))


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"step": 3}, "2 iterations"),
        ({"critic/vf_loss": None}, "is finite"),
        ({"objective/kl": 1e-6}, "leaves it"),
        ({"objective/kl_per_token": 0.7}, "kl_per_token"),
        ({"actor/first_ppo_kl": 1e-7}, "first step"),
        ({"rollout/logprob_gap": 1e-4}, "logprob_gap"),
        ({"actor/entropy": 0.5}, "entropy"),
        ({"actor/entropy": math.log(1000) + 0.01}, "entropy"),
        ({"actor/pg_clipfrac": 0.6}, "clipfrac"),
        ({"actor/grad_norm": 0.0}, "grad_norm"),
        ({"reward/minus_baseline/std": 0.0}, "rewards differ"),
    ],
)
def test_each_fault_fails_its_claim(changes, claim):
    failed = [
        check.claim
        for check in check_metrics(lines(**changes), iterations=2, num_ids=1000)
        if not check.holds
    ]
    assert len(failed) == 1
    assert claim in failed[0]


def test_a_row_that_is_no_token_fails_the_samples():
    allowed = check_samples(SAMPLES, never=[True, False, False], max_new_tokens=2)
    assert all(check.holds for check in allowed)
    refused = check_samples(SAMPLES, never=[False, False, True], max_new_tokens=2)
    assert [check.figure for check in refused if not check.holds] == ["3 of 6 tokens"]


def test_the_report_has_every_iteration_and_what_does_not_hold():
    checks = [{"claim": "one", "figure": "1", "holds": True}, {"claim": "two", "figure": "2", "holds": False}]
    names = ("demonstrations", "pairs", "held_out", "prompts", "questions", "prompts_short_enough")
    config = {
        "num_layers": 2,
        "hidden_size": 8,
        "multi_query_group_num": 2,
        "padded_vocab_size": 65024,
    }
    facts = {
        "command": "python",
        "layout": "4 ranks",
        "model": {"weights": 100, "config": config},
        "records": dict.fromkeys(names, 3),
        "sft": {"loss": [11.0, 6.0]},
        "reward": [{"step": 0, "eval/accuracy": 0.5}, {"step": 9, "eval/accuracy": 0.6}],
        "metrics": lines(),
        "samples": {"before": SAMPLES, "after": SAMPLES},
        "checks": checks,
        "seconds": {"sft": 1.0},
    }
    text = as_markdown(facts, {"date": "today"})
    assert "1 of 2 claims hold" in text
    assert "| two | 2 | NO |" in text
    assert "0.500 → 0.600" in text
    assert text.count("\n| 1 | 0.1 |") == text.count("\n| 2 | 0.1 |") == 1
    assert text.count("prompt: `问题`") == 3


def test_without_the_data_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_input, "DATA", real_input.ROOT.parent / "nowhere")
    assert real_input.main(["--folder", str(tmp_path / "run")]) == 0
    assert "skipped: the real data are not beside the checkout" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
