"""`reward`: the same loss curve in every layout, equal to a plain loop over transformers' trunk."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from safetensors import safe_open
from tiny_models import make_model, save_folder
from training_curves import (
    LAYOUTS,
    curve,
    largest_difference,
    metrics_of,
    run_main,
    write_demonstrations,
    write_lines,
    write_pairs,
)
from transformers import AutoModelForSequenceClassification

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.load import load_model

STEPS = 7
BATCH = 6
LR = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return write_pairs(place / "train.jsonl", 24), write_pairs(place / "eval.jsonl", 7, 1)


def command(folder: Path, data: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [
        "reward",
        f"model.path={folder}",
        f"data.path={data[0]}",
        f"data.eval_path={data[1]}",
        f"run.output={output}",
        "observe.tensorboard=false",
        "reward.l2_coef=0.02",
        "train.dtype=fp32",
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_tokens=64",
        "train.eval_every=6",
        f"optimizer.lr={LR}",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(folder, data, tmp_path_factory):
    """The run on one rank."""
    output = tmp_path_factory.mktemp("alone")
    assert main(command(folder, data, output)) == 0
    return output


def trained(output: Path) -> Path:
    return output / "hf" / f"step_{STEPS}"


def first_head(folder: Path) -> torch.Tensor:
    """The scalar head, [1, D], that a run with the default seed begins with."""
    with open_topology(Layout()) as topology:
        chunks, created = load_model(folder, topology, role="reward", dtype=torch.float32, seed=1234)
        assert created == ("value_head.weight",)
        (weight,) = chunks[0].value_head.parameters()
        return weight.detach().clone()


def test_one_rank_equals_a_plain_loop_over_transformers(alone, folder, data):
    records = [json.loads(line) for line in data[0].open()]
    model, head = make_model("glm").model, torch.nn.Linear(48, 1, bias=False)  # transformers' own has none
    head.weight.data.copy_(first_head(folder))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    sampler = BatchSampler(len(records), BATCH, seed=1234)
    for step, line in enumerate(metrics_of(alone)[1:]):
        loss, right = torch.zeros(()), 0.0
        for number in sampler.batch(step):
            record = records[number]
            scores = [
                head(model(torch.tensor([record["prompt_tokens"] + record[answer]])).last_hidden_state[0, -1])
                for answer in ("chosen_tokens", "rejected_tokens")
            ]
            odds = 1 / (1 + torch.exp(scores[1] - scores[0]))
            loss = loss - odds.log().sum() + 0.02 * (scores[0] ** 2 + scores[1] ** 2).sum()
            right += float(scores[0] > scores[1])
        loss = loss / BATCH
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = line["reward/lr"]
        optimizer.step()
        # fp32 over a dozen steps of Adam, which divides small gradients by their own size.
        assert line["reward/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["reward/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["reward/accuracy"] == pytest.approx(right / BATCH)
    assert step == STEPS - 1
    assert curve(alone, "eval/loss")[-1] < curve(alone, "eval/loss")[0]


@pytest.mark.parametrize("layout", layout_params(LAYOUTS, quick=("pp2 vpp2 dp2",)))
def test_the_loss_curve_is_that_of_one_rank(ranks, folder, data, alone, tmp_path, layout):
    line = command(folder, data, tmp_path, *layout.split())
    assert {code for code, _ in ranks.run(run_main, line)} == {0}
    for name in ("reward/loss", "eval/loss", "reward/score_std", "reward/accuracy"):
        # Sums in another order, then twelve steps of Adam; the contract asks for 1e-4 of the loss.
        assert largest_difference(curve(tmp_path, name), curve(alone, name)) <= 1e-4, name
    assert largest_difference(curve(tmp_path, "reward/grad_norm"), curve(alone, "reward/grad_norm")) <= 1e-3
    table = json.loads((tmp_path / "calibration" / f"step_{STEPS}.json").read_text())
    assert sum(row["num_pairs"] for row in table) == 7


def test_the_checkpoint_is_a_reward_model_for_score_and_for_transformers(ranks, alone, data, tmp_path):
    form = ["data.form=pairs", "train.micro_batch_tokens=40", "train.dtype=fp32"]
    line = ["score", f"model.path={trained(alone)}", f"data.path={data[1]}", *form]
    assert main([*line, f"run.output={tmp_path / 'one'}"]) == 0
    layout = "parallel.pp=2"
    answers = ranks.run(run_main, [*line, f"run.output={tmp_path / 'four'}", layout])
    assert {code for code, _ in answers} == {0}
    found = [json.loads(text) for text in (tmp_path / "one" / "score.jsonl").open()]
    assert [record["index"] for record in found] == list(range(7))
    margins = [record["chosen_score"] - record["rejected_score"] for record in found]
    # The same weights in other micro-batches: fp32 rounding.
    assert curve(alone, "eval/margin")[-1] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert curve(alone, "eval/accuracy")[-1] == pytest.approx(sum(m > 0 for m in margins) / 7)
    for record, other in zip(found, (tmp_path / "four" / "score.jsonl").open(), strict=True):
        assert json.loads(other)["chosen_score"] == pytest.approx(record["chosen_score"], abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(trained(alone)).float().eval()
    with safe_open(trained(alone) / "model.safetensors", "pt") as file:
        assert "score.bias" not in file.keys()
    pair = json.loads(data[1].open().readline())
    ids = torch.tensor([pair["prompt_tokens"] + pair["chosen_tokens"]])
    with torch.no_grad():
        score = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    assert found[0]["chosen_score"] == pytest.approx(score, abs=1e-5)


def test_demonstrations_get_one_score(alone, tmp_path):
    data = write_demonstrations(tmp_path / "demonstrations.jsonl", 3)
    line = ["score", f"model.path={trained(alone)}", f"data.path={data}", f"run.output={tmp_path}"]
    code, said = run_main([*line, "train.dtype=fp32"])
    assert (code, "scored 3 records: 3 answers" in said) == (0, True)
    assert [set(json.loads(text)) for text in (tmp_path / "score.jsonl").open()] == [{"index", "score"}] * 3


def test_training_continues_from_a_reward_model(folder, data, alone, tmp_path):
    assert main(command(trained(alone), data, tmp_path / "on", "train.steps=1")) == 0
    # Its head is kept: the first evaluation is the last one of the run it came from.
    assert curve(tmp_path / "on", "eval/loss")[0] == pytest.approx(curve(alone, "eval/loss")[-1], rel=1e-5)


def test_contradictions_and_long_winners_are_excluded_and_reported(folder, tmp_path):
    prompt = {"prompt_tokens": [5, 6]}
    a, b, c = [10, 11, 12], [20, 21], [30]
    records = [
        {**prompt, "chosen_tokens": a, "rejected_tokens": b},
        {**prompt, "chosen_tokens": b, "rejected_tokens": a},  # the same two the other way round
        {**prompt, "chosen_tokens": a, "rejected_tokens": a},  # a tie
        {**prompt, "chosen_tokens": a, "rejected_tokens": c},  # the longer one wins by 2
        {"prompt_tokens": [9], "chosen_tokens": b, "rejected_tokens": a},  # the shorter one by 1
        {"prompt_tokens": [8], "chosen_tokens": a, "rejected_tokens": b},  # the longer one by 1
        {"prompt_tokens": [7], "chosen_tokens": a, "rejected_tokens": b},  # and again
    ]
    data = write_lines(tmp_path / "pairs.jsonl", records)
    options = ["train.steps=1", "train.global_batch_size=2", "data.balances_lengths=true"]
    assert main(command(folder, (data, data), tmp_path / "run", *options)) == 0
    report = json.loads((tmp_path / "run" / "data.json").read_text())[str(data)]
    assert report["records"]["num_records"] == 7
    assert (report["contradictions"]["num_ties"], report["contradictions"]["num_cyclic"]) == (1, 2)
    assert (report["length_balance"]["num_pairs"], report["length_balance"]["num_kept"]) == (4, 2)
    assert curve(tmp_path / "run", "reward/num_pairs") == [2.0]
    # The evaluation is on all seven as they are.
    table = json.loads((tmp_path / "run" / "calibration" / "step_0.json").read_text())
    assert sum(row["num_pairs"] for row in table) == 7

    only_ties = write_lines(tmp_path / "ties.jsonl", records[2:3] * 4)
    code, said = run_main(command(folder, (only_ties, data), tmp_path / "ties", *options[:2]))
    assert code == 2
    assert "none of its 4 pairs is left to learn from" in said


def test_identical_answers_teach_only_to_stay_near_zero(folder, tmp_path):
    record = {"prompt_tokens": [5, 6], "chosen_tokens": [7, 8], "rejected_tokens": [7, 8]}
    data = write_lines(tmp_path / "pairs.jsonl", [record] * 4)
    options = ["data.drops_contradictions=false", "train.global_batch_size=4", "reward.l2_coef=0"]
    assert main(command(folder, (data, data), tmp_path / "run", *options, "train.steps=2")) == 0
    assert curve(tmp_path / "run", "reward/loss") == pytest.approx([math.log(2)] * 2, rel=1e-6)
    # The two gradients of a pair cancel but for rounding of terms of about 1.
    assert max(curve(tmp_path / "run", "reward/grad_norm")) < 1e-5
    assert curve(tmp_path / "run", "reward/accuracy") == [0.5, 0.5]
    assert curve(tmp_path / "run", "reward/accuracy_shorter") == [None, None]


def test_an_empty_answer_is_scored_at_its_end_id(folder, tmp_path):
    tokenizer = Path(__file__).parents[3] / "examples" / "tiny_tokenizer"
    model = save_folder(tmp_path / "model", "glm", make_model("glm", vocab_size=640))
    data = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "hi", "chosen": "hello", "rejected": ""}])
    options = [f"tokenizer.path={tokenizer}", "train.global_batch_size=1", "train.steps=1"]
    assert main(command(model, (data, data), tmp_path / "run", *options)) == 0
    line = metrics_of(tmp_path / "run")[1]
    assert math.isfinite(line["reward/loss"])
    assert line["reward/accuracy_shorter"] is None


def test_a_cut_answer_is_scored_at_its_last_token_left(folder, tmp_path):
    prompt, long = [5, 6], list(range(10, 40))
    whole = {"prompt_tokens": prompt, "chosen_tokens": long, "rejected_tokens": [7, 8]}
    files = {
        "long": write_lines(tmp_path / "long.jsonl", [whole]),
        "cut": write_lines(tmp_path / "cut.jsonl", [{**whole, "chosen_tokens": long[:10]}]),
    }
    options = ["train.global_batch_size=1", "train.steps=3", "data.max_tokens=12", "data.truncates=true"]
    for name, data in files.items():
        assert main(command(folder, (data, data), tmp_path / name, *options)) == 0
        report = json.loads((tmp_path / name / "data.json").read_text())[str(data)]["records"]
        assert report["num_truncated"] == (name == "long")
    # The same tokens reach the model, so the same numbers come out to the bit.
    assert curve(tmp_path / "long", "reward/loss") == curve(tmp_path / "cut", "reward/loss")
    refused = command(folder, (files["long"],) * 2, tmp_path / "refused", *options[:-1])
    code, said = run_main(refused)
    assert code == 2
    assert re.search(r"long.jsonl:1: .*32 tokens", said), said


def test_bf16_trains_with_an_fp32_head(folder, data, alone, tmp_path):
    options = ["train.dtype=bf16", "train.steps=3"]
    assert main(command(folder, data, tmp_path, *options)) == 0
    # bf16 has 8 bits: the first steps' losses agree to a percent or so.
    assert curve(tmp_path, "reward/loss") == pytest.approx(curve(alone, "reward/loss")[:3], rel=0.05)
    (weights,) = (tmp_path / "hf" / "step_3").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert file.get_tensor("score.weight").dtype == torch.float32
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["data.form=hh-rlhf"], r"train.jsonl:1: "),
        (["reward.l2_coef=-1"], "reward.l2_coef is -1"),
        (["data.length_edges=[8, 4]"], "must ascend"),
        (["data.drops_contradictions=false", "data.drops_repeats=true"], "drops_repeats is true"),
        (["train.global_batch_size=25"], "gives 24 records"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(folder, data, tmp_path, options, sentence):
    code, said = run_main(command(folder, data, tmp_path, *options))
    assert code == 2
    assert re.search(sentence, said), said


def test_a_policy_scores_no_pairs(folder, data, tmp_path):
    line = ["score", f"model.path={folder}", f"data.path={data[0]}", f"run.output={tmp_path}"]
    code, said = run_main([*line, "data.form=pairs"])
    assert code == 2
    assert "is a policy, which scores demonstrations" in said


def test_real_pairs_train_alike_on_one_rank_and_at_tp_2_pp_2(ranks, shared_data, tmp_path):
    """A tiny random ChatGLM3 with the real vocabulary on short dialogues of hh-rlhf."""
    shape = {"vocab_size": 65024, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    folder = save_folder(tmp_path / "model", "chatglm", make_model("chatglm", **shape))
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        short = [line for line in file if len(line) < 500]
    assert len(short) > 60
    data = tmp_path / "short.jsonl"
    data.write_text("".join(short[:60]), encoding="utf-8")
    options = [
        "data.form=hh-rlhf",
        f"tokenizer.path={shared_data / 'chatglm3'}",
        "train.steps=20",
        "train.global_batch_size=4",
        "train.micro_batch_tokens=400",
        "data.eval_records=1",
        "optimizer.lr=5e-3",
    ]
    assert main(command(folder, (data, data), tmp_path / "one", *options)) == 0
    layout = ["parallel.tp=2", "parallel.pp=2"]
    answers = ranks.run(run_main, command(folder, (data, data), tmp_path / "four", *options, *layout))
    assert {code for code, _ in answers} == {0}
    found, expected = (curve(tmp_path / name, "reward/loss") for name in ("four", "one"))
    assert len(expected) == 20
    # The contract: fp32, 1e-4 over twenty steps.
    assert largest_difference(found, expected) <= 1e-4
    assert len(set(expected)) == 20
