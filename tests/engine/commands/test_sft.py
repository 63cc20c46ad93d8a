"""`sft`: the same loss curve in every layout, equal to a plain loop over transformers' model."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from tiny_models import make_model, reference_logprobs, save_folder
from training_curves import (
    LAYOUTS,
    curve,
    largest_difference,
    metrics_of,
    run_main,
    write_demonstrations,
    write_lines,
)

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.sampler import BatchSampler

STEPS = 8
BATCH = 6
LR = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return write_demonstrations(place / "train.jsonl", 16), write_demonstrations(place / "eval.jsonl", 5, 1)


def command(folder: Path, data: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [
        "sft",
        f"model.path={folder}",
        f"data.path={data[0]}",
        f"data.eval_path={data[1]}",
        f"run.output={output}",
        "observe.tensorboard=false",
        "train.dtype=fp32",
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_tokens=48",
        "train.eval_every=3",
        f"optimizer.lr={LR}",
        "optimizer.warmup_steps=3",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(folder, data, tmp_path_factory):
    """The run on one rank."""
    output = tmp_path_factory.mktemp("alone")
    assert main(command(folder, data, output)) == 0
    return output


def test_one_rank_equals_a_plain_loop_over_transformers(alone, data):
    records = [json.loads(line) for line in data[0].open()]
    model = make_model("glm")
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    sampler = BatchSampler(len(records), BATCH, seed=1234)
    lines = metrics_of(alone)[1:]
    for step, line in enumerate(lines):
        batch = [records[number] for number in sampler.batch(step)]
        total, count = torch.zeros(()), 0
        for record in batch:
            prompt, response = record["prompt_tokens"], record["response_tokens"]
            (logprobs,) = reference_logprobs(model, [torch.tensor(prompt + response)])
            total = total - logprobs[len(prompt) :].sum()
            count += len(response)
        optimizer.zero_grad()
        loss = total / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = line["actor/lr"]
        optimizer.step()
        # fp32 over a dozen steps of Adam, which divides small gradients by their own size.
        assert line["actor/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["actor/num_answer_tokens"] == count
    assert len(lines) == STEPS
    assert lines[-1]["actor/loss"] < 0.8 * lines[0]["actor/loss"]


@pytest.mark.parametrize("layout", layout_params(LAYOUTS, quick=("tp2 pp2",)))
def test_the_loss_curve_is_that_of_one_rank(ranks, folder, data, alone, tmp_path, layout):
    line = command(folder, data, tmp_path, *layout.split())
    assert {code for code, _ in ranks.run(run_main, line)} == {0}
    for name in ("actor/loss", "actor/grad_norm", "eval/loss"):
        # Sums in another order, then eight steps of Adam; the contract asks for 1e-4 of the loss.
        assert largest_difference(curve(tmp_path, name), curve(alone, name)) <= 1e-4, name
    assert len(curve(tmp_path, "actor/loss")) == STEPS
    assert [line["step"] for line in metrics_of(tmp_path) if "eval/loss" in line] == [0, 3, 6, STEPS]
    (checkpoint,) = (tmp_path / "hf").iterdir()
    assert checkpoint.name == f"step_{STEPS}"


def test_the_checkpoint_scores_as_the_evaluation_said(alone, data, tmp_path):
    line = ["score", f"model.path={alone / 'hf' / f'step_{STEPS}'}", f"data.path={data[1]}"]
    assert main([*line, f"run.output={tmp_path}", "train.dtype=fp32"]) == 0
    logprobs = [x for record in (tmp_path / "score.jsonl").open() for x in json.loads(record)["logprobs"]]
    # The same weights, other micro-batches: fp32 rounding.
    assert curve(alone, "eval/loss")[-1] == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)


def test_every_metric_has_its_name_and_the_data_its_report(alone, data):
    first, second = metrics_of(alone)[:2]
    assert first.keys() == {"step", "eval/loss", "eval/entropy", "eval/num_answer_tokens"}
    assert second.keys() == {
        "step",
        "actor/loss",
        "actor/entropy",
        "actor/num_answer_tokens",
        "actor/grad_norm",
        "actor/lr",
        "actor/is_step_skipped",
        "perf/tokens_per_s",
        "perf/tokens_per_s_per_gpu",
        "timing_s/step",
        "timing_s/data",
        "timing_s/update",
    }
    report = json.loads((alone / "data.json").read_text())
    assert report[str(data[0])]["records"]["num_records"] == 16


def test_ranks_without_records_and_overlapped_reductions_change_nothing(ranks, folder, data, tmp_path):
    one = tmp_path / "one"
    options = ["train.global_batch_size=2", "train.steps=4", "optimizer.warmup_steps=0"]
    assert main(command(folder, data, one, *options)) == 0
    lines = [
        command(folder, data, tmp_path / "dp4", *options),
        command(folder, data, tmp_path / "overlap", *options, "train.overlap_communication=true"),
        command(
            folder,
            data,
            tmp_path / "pp",
            *options,
            *LAYOUTS["pp2 vpp2 dp2"].split(),
            "train.recompute_layers=true",
        ),
    ]
    assert {code for answers in ranks.run(run_mains, lines) for code, _ in answers} == {0}
    for name in ("dp4", "overlap", "pp"):
        for metric in ("actor/loss", "actor/grad_norm", "eval/loss"):
            # fp32 sums in another order over four steps.
            assert largest_difference(curve(tmp_path / name, metric), curve(one, metric)) <= 1e-4, name


def run_mains(lines: list[list[str]]) -> list[tuple[int, str]]:
    return [run_main(line) for line in lines]


BAD_RECORD = 7


def run_with_a_bad_record(fault: str, lines: list[list[str]]) -> list[tuple[int, str]]:
    """Run commands with a loss, or its gradient, that is NaN wherever record 7 takes part."""
    from glm_rlhf.engine.training.loss import Sums
    from glm_rlhf.engine.training.record_losses import SFTLoss

    original = SFTLoss.__call__

    def broken(self, model, hidden_TD, batch, denominator):
        is_hit = BAD_RECORD in batch.items and torch.is_grad_enabled()
        if is_hit and fault == "gradient":
            hidden_TD.register_hook(lambda gradient: gradient * torch.nan)
        loss, statistics = original(self, model, hidden_TD, batch, denominator)
        if is_hit and fault == "loss":
            return loss * torch.nan, Sums(sums=statistics.sums * torch.nan)
        return loss, statistics

    SFTLoss.__call__ = broken
    try:
        return run_mains(lines)
    finally:
        SFTLoss.__call__ = original


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken_by_any_rank(ranks, folder, data, tmp_path, fault):
    layout = ["parallel.tp=2", "train.eval_every=1"]
    lines = [
        command(folder, data, tmp_path / "continues", *layout, "train.max_nonfinite_steps=100"),
        command(folder, data, tmp_path / "stops", *layout, "train.max_nonfinite_steps=1"),
    ]
    answers = ranks.run(run_with_a_bad_record, fault, lines)
    sampler = BatchSampler(16, BATCH, seed=1234)
    is_hit = [BAD_RECORD in sampler.batch(step) for step in range(STEPS)]
    first = is_hit.index(True)
    assert [answer[0][0] for answer in answers] == [0] * 4
    assert "of them not taken" in answers[0][0][1]
    assert curve(tmp_path / "continues", "actor/is_step_skipped") == list(map(float, is_hit))
    evaluated = curve(tmp_path / "continues", "eval/loss")
    for step, hit in enumerate(is_hit):
        # The weights, and so the evaluation, stay to the bit.
        assert (evaluated[step + 1] == evaluated[step]) == hit
    for _, (code, said) in answers:
        assert code == 2
        assert f"at step {first + 1}" in said
        if fault == "loss":
            assert "not finite: on rank" in said
            assert "the policy's loss on" in said
        else:
            assert "the policy's gradient has the norm nan" in said
    if fault == "loss":
        assert any(f"record {BAD_RECORD} of {data[0]}" in answer[1][1] for answer in answers)
    assert not (tmp_path / "stops" / "hf").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["train.global_batch_size=17"], "gives 16 records, train.global_batch_size is 17: lower it to 16"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.max_prompt_tokens=1"], r"train.jsonl:\d+: .*1"),
        (["data.max_tokens=13"], r"train.jsonl:\d+: .*13"),
        (["optimizer.min_lr=1.0"], "optimizer.min_lr is 1.0, above optimizer.lr"),
        (["observe.wandb=project"], "wandb is not installed"),
        (["train.steps=0"], "train.steps is 0"),
        (["model.path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(folder, data, tmp_path, options, sentence):
    code, said = run_main(command(folder, data, tmp_path, *options))
    assert code == 2
    assert said.startswith("glm-rlhf")
    assert re.search(sentence, said), said


def test_a_run_folder_with_checkpoints_is_left_alone(folder, data, alone):
    before = (alone / "metrics.jsonl").read_bytes()
    code, said = run_main(command(folder, data, alone, "run.resume=never"))
    assert code == 2
    assert f"holds step_{STEPS} of an earlier run" in said
    assert (alone / "metrics.jsonl").read_bytes() == before


def test_answers_are_cut_at_the_limit_only_when_asked_for(folder, tmp_path):
    long = write_lines(
        tmp_path / "long.jsonl",
        [
            {"prompt_tokens": [5, 6], "response_tokens": [7] * 30},
            {"prompt_tokens": [5], "response_tokens": [8]},
        ],
    )
    options = ["train.global_batch_size=2", "train.steps=1", "data.max_tokens=12"]
    code, said = run_main(command(folder, (long, long), tmp_path / "refused", *options))
    assert code == 2
    assert re.search(r"long.jsonl:1: .*32.*12", said), said
    assert main(command(folder, (long, long), tmp_path / "cut", *options, "data.truncates=true")) == 0
    # Ten tokens of the first answer fit behind its prompt, and one of the second.
    assert curve(tmp_path / "cut", "actor/num_answer_tokens") == [11.0]
    report = json.loads((tmp_path / "cut" / "data.json").read_text())
    assert report[str(long)]["records"]["num_truncated"] == 1


def test_the_loss_falls_on_real_questions_held_out(shared_data, tmp_path):
    """A tiny random model on short questions of gsm8k, with the tiny tokenizer."""
    shape = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    folder = save_folder(tmp_path / "model", "chatglm", make_model("chatglm", **shape))
    files = []
    for name, count in (("train", 160), ("test", 24)):
        records = [json.loads(line) for line in (shared_data / "gsm8k" / f"{name}.jsonl").open()]
        short = [record for record in records if len(record["question"] + record["answer"]) < 260][:count]
        assert len(short) == count
        lines = [{"prompt": record["question"], "response": record["answer"]} for record in short]
        files.append(write_lines(tmp_path / f"{name}.jsonl", lines))
    tokenizer = Path(__file__).parents[3] / "examples" / "tiny_tokenizer"
    options = ["train.steps=30", "train.global_batch_size=16", "train.micro_batch_tokens=4096"]
    options += [f"tokenizer.path={tokenizer}", "optimizer.lr=5e-3", "train.eval_every=10"]
    assert main(command(folder, tuple(files), tmp_path / "run", *options)) == 0
    losses = curve(tmp_path / "run", "eval/loss")
    assert all(later < earlier for earlier, later in pairwise(losses)), losses
    # Below log 640 = 6.46, what a model that knows nothing gets at best, and well below its own beginning.
    assert losses[-1] < 4.5 < losses[0], losses
