"""The command `ppo`: metrics, samples and an export that transformers loads, from torchrun's ranks."""

import gzip
import json
import re
from itertools import islice
from pathlib import Path

import pytest
import reward_rules
import torch
from tiny_models import make_model, save_folder
from transformers import GlmForCausalLM

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.records.hh_rlhf import split_dialogue_pair
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer
from glm_rlhf.engine.rl.roles import PPORoles


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ppo")
    generator = torch.Generator().manual_seed(4)
    lines = [
        json.dumps({"prompt_tokens": torch.randint(3, 96, (n,), generator=generator).tolist()})
        for n in (3, 8, 2, 5, 12, 4, 6, 7, 3, 9)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return save_folder(folder / "model", "glm", make_model("glm")), folder / "prompts.jsonl"


def command(inputs: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    model, prompts = inputs
    return [
        "ppo",
        f"model.path={model}",
        f"data.path={prompts}",
        f"run.output={output}",
        "reward.function=reward_rules:share_of_low_ids",
        "train.steps=3",
        "train.global_batch_size=8",
        "train.micro_batch_tokens=64",
        "train.dtype=fp32",
        "generation.max_new_tokens=8",
        "generation.num_samples=2",
        "optimizer.lr=1e-3",
        "ppo.epochs=2",
        "observe.tensorboard=false",
        *more,
    ]


def test_a_run_at_tp2_pp2_leaves_metrics_samples_and_a_model(ranks, inputs, tmp_path):
    line = command(inputs, tmp_path, "parallel.tp=2", "parallel.pp=2", "observe.trace=true")
    assert ranks.run(main, line) == [0] * 4
    metrics = [json.loads(text) for text in (tmp_path / "metrics.jsonl").open()]
    assert [one["step"] for one in metrics] == [1, 2, 3]
    assert abs(metrics[0]["actor/first_ppo_kl"]) < 1e-8
    for name in ("actor/pg_loss", "critic/vf_loss", "objective/kl", "timing_s/generate", "actor/grad_norm"):
        assert all(isinstance(one[name], float) for one in metrics), name
    samples = [json.loads(text) for text in (tmp_path / "samples" / "step_3.jsonl").open()]
    assert len(samples) == 16
    assert all(1 <= len(sample["tokens"]) <= 8 for sample in samples)
    first, after = (
        [json.loads(text) for text in (tmp_path / "samples" / f"{name}.jsonl").open()]
        for name in ("step_1", "after")
    )
    assert [one["prompt_tokens"] for one in first] == [one["prompt_tokens"] for one in after]
    assert [one["tokens"] for one in first] != [one["tokens"] for one in after]
    check_traces(tmp_path, metrics)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Samples</h2>" in page
    assert page.count("<svg") == len(metrics[0]) - 1
    exported = GlmForCausalLM.from_pretrained(tmp_path / "hf" / "step_3")
    before = GlmForCausalLM.from_pretrained(inputs[0])
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), exported.parameters(), strict=True)]
    assert all(changed)


def test_the_critics_rate_is_constant_while_the_policys_changes(inputs, tmp_path, monkeypatch):
    rates = []

    def update(roles, experience, **options):
        rates.append({name: state.optimizer.param_groups[0]["lr"] for name, state in roles.states.items()})
        return real_update(roles, experience, **options)

    real_update = PPORoles.update
    monkeypatch.setattr(PPORoles, "update", update)
    more = ["optimizer.warmup_steps=2", "critic.lr=5e-4", "ppo.epochs=1"]
    assert main(command(inputs, tmp_path, *more)) == 0
    assert [rate["critic"] for rate in rates] == [5e-4] * 3
    assert len({rate["policy"] for rate in rates}) > 1


def test_answers_without_a_reward_are_excluded_in_every_layout(ranks, inputs, tmp_path, capsys):
    """One iteration of all prompts, of which 4 of 10 have more than 6 tokens and so no reward."""
    options = [
        "reward.function=reward_rules:nan_after_long_prompts + 0.5 * reward_rules:low_id_tokens",
        "reward.on_error=mask",
        "train.steps=1",
        "train.global_batch_size=10",
        "train.sample_every=0",
        "ppo.reference_baseline=false",
    ]
    assert main(command(inputs, tmp_path / "one", *options)) == 0
    assert "8 answers are excluded, the first reward of the answer" in capsys.readouterr().err
    assert ranks.run(main, command(inputs, tmp_path / "four", *options, "parallel.tp=2")) == [0] * 4
    one, four = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "four"))
    assert one["reward/num_excluded"] == four["reward/num_excluded"] == 8
    assert one["reward/minus_baseline/mean"] > 0.5
    for name in one.keys() - {"step"}:
        if not name.startswith(("timing_s/", "perf/")):
            assert one[name] == pytest.approx(four[name], rel=1e-4, abs=2e-5), name  # sums in another order
    assert main(command(inputs, tmp_path / "raises", *options, "reward.on_error=raise")) == 2
    assert "it is nan, a finite number is required" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_traceback_of_a_reward_function_is_shown_before_the_sentence(inputs, tmp_path, capsys, workers):
    options = ["reward.function=reward_rules:raises", f"reward.workers={workers}"]
    assert main(command(inputs, tmp_path, *options)) == 2
    _, _, said = capsys.readouterr().err.partition("Traceback (most recent call last):\n")
    traceback, _, sentence = said.rpartition("glm-rlhf ppo: ")
    assert re.search(r'File ".*reward_rules\.py", line \d+, in raises\n', traceback)
    assert "glm_rlhf" not in traceback
    assert sentence.startswith("reward 0 of 16, of the answer ")
    assert re.search(r"raised KeyError: 'missing' \(.*reward_rules\.py, line \d+\)$", sentence.rstrip())


def test_a_run_evaluates_on_the_way_and_keeps_its_best_policy(inputs, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(f'{{"prompt_tokens": [{n}, {n + 1}]}}\n' for n in range(10, 30, 2)))
    options = ["train.steps=4", "evaluate.every=2", f"evaluate.path={held_out}", "evaluate.pass_reward=0.6"]
    assert main(command(inputs, tmp_path / "run", "ppo.kl_coef=0", *options)) == 0
    metrics = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").open()]
    evaluated = {one["step"]: one for one in metrics if "eval/reward" in one}
    assert list(evaluated) == [0, 2, 4]
    assert evaluated[0]["eval/win_rate"] == 0.5  # before the first update policy and reference are the same
    for one in evaluated.values():
        assert one["eval/reward/low"] < one["eval/reward"] < one["eval/reward/high"]
        assert 0 <= one["eval/pass@1"] <= 1
    best = json.loads((tmp_path / "run" / "hf" / "best.json").read_text())
    assert best["step"] == max((2, 4), key=lambda step: evaluated[step]["eval/reward"])
    assert best["eval/reward"] == evaluated[best["step"]]["eval/reward"] > evaluated[0]["eval/reward"]
    GlmForCausalLM.from_pretrained(tmp_path / "run" / "hf" / "best")
    folders = sorted(path.name for path in (tmp_path / "run" / "hf").iterdir())
    assert folders == ["best", "best.json", "step_4"]


@pytest.mark.parametrize(("signals_after", "step"), [(15, None), (25, 1), (35, 2)])
def test_an_evaluation_that_a_signal_interrupts_is_repeated_by_the_resumed_run(
    inputs, tmp_path, signals_after, step
):
    """Ten answers of the reference and ten of the policy before the first step, then ten after each step."""
    held_out, file = tmp_path / "held_out.jsonl", tmp_path / "may_answer"
    records = [
        {"prompt_tokens": [n, n + 1], "signals_after": signals_after, "wait_for": str(file)}
        for n in range(10, 30, 2)
    ]
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["train.steps=2", "evaluate.every=1", f"evaluate.path={held_out}", "evaluate.pass_reward=0.6"]
    options += ["reward.workers=0", "ppo.epochs=1"]
    rule = "reward.function=reward_rules:signals_while_evaluated"
    reward_rules.num_evaluated = 0
    line = command(inputs, tmp_path / "left", *options, rule)
    assert main(line) == 0
    assert not file.exists()
    checkpoints = sorted(path.name for path in (tmp_path / "left").glob("checkpoints/step_*"))
    assert checkpoints == ([] if step is None else [f"step_{step}"])
    file.touch()
    assert main(line) == 0
    assert main(command(inputs, tmp_path / "whole", *options, rule)) == 0
    left, whole = (
        [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("left", "whole")
    )
    assert [one["step"] for one in left] == [0, 1, 2]
    for one, other in zip(left, whole, strict=True):
        assert one.keys() == other.keys()
        names = [name for name in one if not name.startswith(("timing_s/", "perf/"))]
        assert [one[name] for name in names] == [other[name] for name in names]
    assert main(line) == 0  # nothing is left
    assert len((tmp_path / "left" / "metrics.jsonl").read_text().splitlines()) == 3
    best, other_best = (
        json.loads((tmp_path / n / "hf" / "best.json").read_text()) for n in ("left", "whole")
    )
    assert best == other_best


def check_traces(folder: Path, metrics: list[dict]) -> None:
    """Each rank's spans lie in their phases, and its waits add up to what the metrics say."""
    shares = []
    for rank in range(4):
        events = json.loads((folder / "trace" / f"rank_{rank}.json").read_text())
        spans = [event for event in events if event["ph"] == "X"]
        assert {event["pid"] for event in spans} == {rank}
        iterations = [event for event in spans if event["name"] == "iteration"]
        assert len(iterations) == 3
        for name in ("generate", "reward", "reference", "values", "critic", "policy", "forward", "backward"):
            inner = [event for event in spans if event["name"] == name]
            assert len(inner) >= 3, name
            first = iterations[0]
            assert first["ts"] - 1 <= inner[0]["ts"] <= first["ts"] + first["dur"], name
        last = iterations[-1]
        waits = [
            event["dur"]
            for event in spans
            if event["name"] == "wait" and last["ts"] <= event["ts"] <= last["ts"] + last["dur"]
        ]
        shares.append(sum(waits) / last["dur"])
    assert 0 < metrics[-1]["perf/idle_fraction"] < metrics[-1]["perf/idle_fraction_max"] < 1
    # The shortest waits are not written, though counted.
    assert metrics[-1]["perf/idle_fraction"] == pytest.approx(sum(shares) / 4, rel=0.05)
    assert metrics[-1]["perf/idle_fraction_max"] == pytest.approx(max(shares), rel=0.05)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("reward.function=reward_rules:missing", "reward_rules has no function 'missing'"),
        ("reward.function=nowhere:at_all", "'nowhere'"),
        ("reward.function=reward_rules", "not of that form"),
        ("reward.function=reward_rules:too_few", "rewards for"),
        ("train.global_batch_size=11", "gives 10 records, train.global_batch_size is 11: lower it to 10"),
        ("generation.temperature=0", "temperature is 0"),
        ("ppo.clip=0", "ppo.clip"),
        ("evaluate.every=2", "evaluate.path null: evaluation needs both"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence(inputs, tmp_path, capsys, change, sentence):
    assert main(command(inputs, tmp_path, change)) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def drive_from_another_loop(config_path: Path) -> list[float]:
    from glm_rlhf.engine import PPOConfig, PPOEngine

    with PPOEngine(PPOConfig.from_yaml(config_path)) as engine:
        rewards = []
        for _ in range(2):
            experience = engine.make_experience(engine.generate([[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]))
            rewards.append(engine.update(experience)["reward/minus_baseline/mean"])
        return rewards


def test_another_programs_loop_drives_the_engine_from_a_config(ranks, inputs, tmp_path):
    (tmp_path / "ppo.yaml").write_text(
        f"model: {{path: {inputs[0]}}}\n"
        f"data: {{path: {inputs[1]}}}\n"
        "reward: {function: reward_rules:share_of_low_ids}\n"
        "parallel: {tp: 2}\n"
        "train: {steps: 1, dtype: fp32}\n"
        "generation: {max_new_tokens: 6}\n"
    )
    found = ranks.run(drive_from_another_loop, tmp_path / "ppo.yaml")
    assert all(rewards == found[0] and len(rewards) == 2 for rewards in found)


TYPED = "<|user|> [gMASK]sop</s><|assistant|> 你好"


def test_the_real_tokenizer_keeps_typed_markers_text_and_samples_no_empty_row(ranks, shared_data, tmp_path):
    """An iteration of a tiny random ChatGLM3 with 65024 rows, on dialogues of hh-rlhf and questions."""
    tokenizer = load_tokenizer(shared_data / "chatglm3")
    never_V = tokenizer.unsampleable_ids(65024)
    shape = {"vocab_size": 65024, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    model = make_model("chatglm", **shape)
    with torch.no_grad():
        # Unmasked, nearly every draw would be one of these rows.
        model.lm_head.weight[never_V] *= 10
    folder = save_folder(tmp_path / "model", "chatglm", model)
    data = tmp_path / "prompts.jsonl"
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in islice(file, 40)]
    found = [split_dialogue_pair(pair["chosen"], pair["rejected"])[0] for pair in pairs]
    records = [{"messages": [{"role": m.role, "content": m.content} for m in one]} for one in found]
    with (shared_data / "alignbench" / "data_v1.1_release.jsonl").open(encoding="utf-8") as file:
        records += [{"prompt": json.loads(line)["question"]} for line in islice(file, 40)]
    records += [{"prompt": f"{TYPED} {number}"} for number in range(8)]
    data.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    options = [
        "train.steps=1",
        "train.global_batch_size=8",
        "train.sample_every=1",
        "data.max_prompt_tokens=64",
        "data.on_error=skip",
        f"tokenizer.path={shared_data / 'chatglm3'}",
    ]
    line = command((folder, data), tmp_path / "run", *options, "parallel.tp=2", "parallel.pp=2")
    assert ranks.run(main, line) == [0] * 4
    metrics = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(metrics) == 1
    for one in metrics:
        assert None not in one.values()
        assert abs(one["actor/first_ppo_kl"]) < 1e-8
        assert one["rollout/logprob_gap"] < 1e-5
    samples = [
        json.loads(text)
        for path in (tmp_path / "run" / "samples").iterdir()
        for text in path.open(encoding="utf-8")  # a text may hold what else ends lines in Unicode
    ]
    assert len(samples) == 32
    assert not any(never_V[token] for one in samples for token in one["tokens"])
    assert len({len(one["prompt_tokens"]) for one in samples}) > 4
    typed = [one for one in samples if TYPED in one["prompt"]]
    assert typed
    for one in typed:
        placed = [id for id in one["prompt_tokens"] if id in tokenizer.table.name_by_id]
        assert [tokenizer.table.name_by_id[id] for id in placed] == [
            *("[gMASK]", "sop", "<|user|>", "<|assistant|>")
        ]
