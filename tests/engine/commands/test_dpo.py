"""`dpo`: the same loss curve in every layout, equal to a plain loop over transformers' model."""

import json
import math
import re
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
    write_lines,
    write_pairs,
)

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.data.sampler import BatchSampler

STEPS = 6
BATCH = 6
LR = 5e-4
BETA = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return write_pairs(place / "train.jsonl", 18), write_pairs(place / "eval.jsonl", 5, 1)


def command(folder: Path, data: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [
        "dpo",
        f"model.path={folder}",
        f"data.path={data[0]}",
        f"data.eval_path={data[1]}",
        f"run.output={output}",
        "observe.tensorboard=false",
        f"dpo.beta={BETA}",
        "train.dtype=fp32",
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_tokens=64",
        "train.eval_every=5",
        f"optimizer.lr={LR}",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(folder, data, tmp_path_factory):
    """The run on one rank."""
    output = tmp_path_factory.mktemp("alone")
    assert main(command(folder, data, output)) == 0
    return output


def answer_sum(model, record: dict, answer: str, discount: float) -> tuple[torch.Tensor, float]:
    """The weighted log-probability of an answer, and its weight, token by token."""
    prompt, tokens = record["prompt_tokens"], record[answer]
    (logprobs,) = reference_logprobs(model, [torch.tensor(prompt + tokens)])
    weights = [discount**place for place in range(len(tokens))]
    total = sum(w * p for w, p in zip(weights, logprobs[len(prompt) :], strict=True))
    return total, sum(weights)


def plain_losses(data: Path, rates: list[float], *, discount=1.0, is_normalised=False, smoothing=0.0):
    """The losses of a plain loop."""
    records = [json.loads(line) for line in data.open()]
    model, reference = make_model("glm"), make_model("glm")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    sampler = BatchSampler(len(records), BATCH, seed=1234)
    losses = []
    for step, rate in enumerate(rates):
        loss = torch.zeros(())
        for number in sampler.batch(step):
            rewards = []
            for answer in ("chosen_tokens", "rejected_tokens"):
                policy, weight = answer_sum(model, records[number], answer, discount)
                with torch.no_grad():
                    fixed, _ = answer_sum(reference, records[number], answer, discount)
                rewards.append(BETA * (policy - fixed) / (weight if is_normalised else 1.0))
            win = 1 / (1 + torch.exp(rewards[1] - rewards[0]))
            loss = loss - (1 - smoothing) * win.log() - smoothing * (1 - win).log()
        loss = loss / BATCH
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return losses


def test_one_rank_equals_a_plain_loop_over_transformers(alone, data):
    expected = plain_losses(data[0], curve(alone, "actor/lr"))
    # fp32 over ten steps of Adam, which divides small gradients by their own size.
    assert curve(alone, "actor/loss") == pytest.approx(expected, rel=1e-4)
    first, last = metrics_of(alone)[1], metrics_of(alone)[-1]
    # The policy is its own reference before the first step: only rounding tells them apart.
    assert first["actor/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["actor/rewards/margins"]) < 1e-5
    assert last["actor/loss"] < 0.6
    assert last["actor/rewards/accuracies"] > 0.9
    assert last["actor/rewards/margins"] == pytest.approx(
        last["actor/rewards/chosen"] - last["actor/rewards/rejected"], abs=1e-9
    )


def test_the_other_forms_equal_a_plain_loop_too(folder, data, tmp_path):
    options = ["dpo.length_normalised=true", "dpo.token_discount=0.8", "dpo.label_smoothing=0.1"]
    assert main(command(folder, data, tmp_path, *options, "train.steps=5")) == 0
    expected = plain_losses(
        data[0], curve(tmp_path, "actor/lr"), discount=0.8, is_normalised=True, smoothing=0.1
    )
    assert curve(tmp_path, "actor/loss") == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("layout", layout_params(LAYOUTS, quick=("cp2 dp2",)))
def test_the_loss_curve_is_that_of_one_rank(ranks, folder, data, alone, tmp_path, layout):
    line = command(folder, data, tmp_path, *layout.split())
    assert {code for code, _ in ranks.run(run_main, line)} == {0}
    for name in ("actor/loss", "eval/loss", "actor/logps/chosen"):
        # Sums in another order, then ten steps of Adam; the contract asks for 1e-4 of the loss.
        assert largest_difference(curve(tmp_path, name), curve(alone, name)) <= 1e-4, name
    assert largest_difference(curve(tmp_path, "actor/grad_norm"), curve(alone, "actor/grad_norm")) <= 1e-3
    assert len(curve(tmp_path, "actor/loss")) == STEPS
    # Before the first step all rewards are rounding, and so is which is the larger.
    accuracies = [curve(output, "eval/rewards/accuracies")[1:] for output in (tmp_path, alone)]
    assert accuracies[0] == accuracies[1]


def test_another_reference_is_scored_once(ranks, folder, data, tmp_path):
    other = save_folder(tmp_path / "other", "glm", make_model("glm", seed=1))
    line = command(
        folder, data, tmp_path / "run", f"reference.path={other}", "train.steps=1", "parallel.pp=2"
    )
    answers = ranks.run(run_main, line)
    assert {code for code, _ in answers} == {0}
    found = metrics_of(tmp_path / "run")[0]
    records = [json.loads(text) for text in data[1].open()]
    policy, reference = make_model("glm"), make_model("glm", seed=1)
    with torch.no_grad():
        ratios = [
            float(answer_sum(policy, record, "chosen_tokens", 1.0)[0])
            - float(answer_sum(reference, record, "chosen_tokens", 1.0)[0])
            for record in records
        ]
    # Sums of some dozen logprobs of about 5: fp32 leaves 1e-5.
    assert found["eval/rewards/chosen"] == pytest.approx(BETA * sum(ratios) / len(ratios), abs=1e-4)
    assert abs(found["eval/rewards/chosen"]) > 0.01


def test_identical_answers_change_nothing(folder, tmp_path):
    record = {"prompt_tokens": [5, 6], "chosen_tokens": [7, 8], "rejected_tokens": [7, 8]}
    data = write_lines(tmp_path / "pairs.jsonl", [record] * 4)
    options = ["data.drops_contradictions=false", "train.global_batch_size=4", "train.steps=2"]
    assert main(command(folder, (data, data), tmp_path / "run", *options)) == 0
    assert curve(tmp_path / "run", "actor/loss") == pytest.approx([math.log(2)] * 2, abs=1e-6)
    # The two gradients cancel but for rounding of terms of about 1.
    assert max(curve(tmp_path / "run", "actor/grad_norm")) < 1e-5


def test_an_empty_and_a_cut_answer_are_learned_from(folder, tmp_path):
    """An empty text is its end id; a cut answer is the tokens that are left."""
    tokenizer = Path(__file__).parents[3] / "examples" / "tiny_tokenizer"
    model = save_folder(tmp_path / "model", "glm", make_model("glm", vocab_size=640))
    options = [f"tokenizer.path={tokenizer}", "train.global_batch_size=1", "train.steps=2"]
    texts = write_lines(tmp_path / "texts.jsonl", [{"prompt": "hi", "chosen": "hello", "rejected": ""}])
    assert main(command(model, (texts, texts), tmp_path / "texts", *options)) == 0
    assert all(map(math.isfinite, curve(tmp_path / "texts", "actor/loss")))
    assert min(curve(tmp_path / "texts", "actor/grad_norm")) > 0

    prompt, long = [5, 6], list(range(10, 40))
    whole = {"prompt_tokens": prompt, "chosen_tokens": long, "rejected_tokens": [7, 8]}
    options = ["train.global_batch_size=1", "train.steps=2", "data.max_tokens=12", "data.truncates=true"]
    for name, record in (("long", whole), ("cut", {**whole, "chosen_tokens": long[:10]})):
        data = write_lines(tmp_path / f"{name}.jsonl", [record])
        assert main(command(folder, (data, data), tmp_path / name, *options)) == 0
    # The same tokens reach the model, so the same numbers come out to the bit.
    assert curve(tmp_path / "long", "actor/loss") == curve(tmp_path / "cut", "actor/loss")


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["dpo.beta=0"], "dpo.beta is 0"),
        (["dpo.token_discount=1.5"], "dpo.token_discount is 1.5"),
        (["reference.path=nowhere"], "nowhere"),
        (["train.global_batch_size=19"], "gives 18 records"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(folder, data, tmp_path, options, sentence):
    code, said = run_main(command(folder, data, tmp_path, *options))
    assert code == 2
    assert re.search(sentence, said), said


def test_a_reference_of_another_vocabulary_is_refused(folder, data, tmp_path):
    other = save_folder(tmp_path / "other", "glm", make_model("glm", vocab_size=128))
    code, said = run_main(command(folder, data, tmp_path / "run", f"reference.path={other}"))
    assert code == 2
    assert "reference.path has 128 rows in its vocabulary, model.path 96" in said
