"""`generate`: transformers' tokens in every layout, whatever the cache, the batch or the company."""

import json
import re
from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from tiny_models import FAMILIES, make_model, reference_logprobs, save_folder

from glm_rlhf.engine.cli import main

LAYOUTS = (
    "parallel.tp=1",
    "parallel.tp=2",
    "parallel.tp=4",
    "parallel.tp=2 parallel.sequence_parallel=true",
    "parallel.pp=2",
    "parallel.pp=4",
    "parallel.pp=2 parallel.vpp=2",
    "parallel.tp=2 parallel.pp=2",
    "parallel.tp=2 parallel.pp=2 parallel.vpp=2 parallel.sequence_parallel=true",
    "parallel.cp=2",
)
QUICK = (LAYOUTS[0], LAYOUTS[8], LAYOUTS[9])
"""Those that `make test` runs: between them they split every axis."""
# Fewer pages than the sequences need together, parts of prompts, few sequences at once.
TIGHT = "generation.page_size=4 generation.max_batch=6 generation.max_step_tokens=9 generation.cache_bytes="
NUM_NEW = 10
DRAWS = "generation.num_samples=2"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    generator = torch.Generator().manual_seed(11)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 21, 1, 8, 30, 2, 5, 13)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_tokens": prompt}) + "\n" for prompt in ids))
    return path, ids


@pytest.fixture(scope="module")
def models(tmp_path_factory, prompts):
    """A folder a family, and transformers' greedy answers; id 2 ends an answer."""
    answers = {}
    for family in FAMILIES:
        model = make_model(family)
        folder = save_folder(tmp_path_factory.mktemp(family), family, model)
        greedy = []
        for prompt in prompts[1]:
            whole = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )
            greedy.append(whole[0, len(prompt) :].tolist())
        answers[family] = folder, greedy, model
    return answers


def cache_bytes(pages: int, layout: str) -> int:
    """Bytes of so many pages on one rank of a layout: 4 layers, 2 KV heads of 8, pages of 4, fp32."""
    sizes = dict(re.findall(r"parallel\.(\w+)=(\d)", layout))
    heads, layers = max(1, 2 // int(sizes.get("tp", 1))), 4 // int(sizes.get("pp", 1))
    return pages * 2 * layers * 4 * heads * 8 * 4


def command(folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    paths = [f"model.path={folder}", f"data.path={data}", f"run.output={output}"]
    return ["generate", *paths, "train.dtype=fp32", f"generation.max_new_tokens={NUM_NEW}", *more]


@pytest.fixture(scope="module")
def drawn_alone(models, prompts, tmp_path_factory) -> list[dict]:
    """Draws of one rank with room for all."""
    output = tmp_path_factory.mktemp("alone")
    assert main(command(models["glm"][0], prompts[0], output, DRAWS)) == 0
    return written(output)


def run_mains(lines: list[list[str]]) -> list[int]:
    return [main(line) for line in lines]


def written(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "generate.jsonl").open()]


@pytest.mark.parametrize("layout", layout_params({name: name for name in LAYOUTS}, quick=QUICK))
def test_greedy_answers_equal_transformers_with_a_cache_too_small_for_all(
    ranks, models, prompts, drawn_alone, tmp_path, layout
):
    tight = [*layout.split(), *(TIGHT + str(cache_bytes(16, layout))).split()]
    lines = [
        command(folder, prompts[0], tmp_path / family, "generation.temperature=0", *tight)
        for family, (folder, *_) in models.items()
    ]
    # Sampled too: what is drawn depends on record and sample alone, not on company or layout.
    folder = models["glm"][0]
    lines.append(command(folder, prompts[0], tmp_path / "drawn", DRAWS, *tight))
    assert ranks.run(run_mains, lines) == [[0] * len(lines)] * 4
    for family, (_, greedy, _) in models.items():
        answers = written(tmp_path / family)
        assert [line["prompt_tokens"] for line in answers] == prompts[1]
        assert [line["tokens"] for line in answers] == greedy
        for line in answers:
            ended = line["tokens"][-1] == 2
            assert line["finish_reason"] == ("stop" if ended else "length")
            assert ended or len(line["tokens"]) == NUM_NEW
    check_draws(written(tmp_path / "drawn"), models["glm"][2], drawn_alone)


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tp=2 generation.tp=1 generation.pp=4",
        "parallel.pp=2 parallel.vpp=2 generation.tp=4 generation.pp=1",
        "parallel.cp=2 generation.tp=2 generation.pp=2",
    ],
)
def test_greedy_answers_are_the_same_in_a_second_layout(ranks, models, prompts, tmp_path, layout):
    folder, greedy, _ = models["glm4"]
    line = command(folder, prompts[0], tmp_path, "generation.temperature=0", *layout.split())
    assert ranks.run(main, line) == [0] * 4
    assert [answer["tokens"] for answer in written(tmp_path)] == greedy


def check_draws(answers: list[dict], model, alone: list[dict]) -> None:
    """Answers equal those of one rank with room for all, and their logprobs those of a full forward pass."""
    names = ("index", "sample", "tokens")
    assert [[line[name] for name in names] for line in answers] == [
        [line[name] for name in names] for line in alone
    ]
    assert len({tuple(line["tokens"]) for line in answers}) > len(answers) * 0.9
    sequences = [torch.tensor(line["prompt_tokens"] + line["tokens"]) for line in answers]
    with torch.no_grad():
        expected = reference_logprobs(model, sequences)
    for line, logprobs in zip(answers, expected, strict=True):
        # The rollout's logprobs are those that training computes, in fp32.
        assert line["logprobs"] == pytest.approx(logprobs[len(line["prompt_tokens"]) :].tolist(), abs=1e-5)
        assert line["sampling_logprobs"] == pytest.approx(line["logprobs"], abs=1e-5)


def test_sampling_settings_name_their_distribution(models, prompts, tmp_path):
    folder, _, model = models["glm"]
    options = ["generation.temperature=0.7", "generation.top_k=5", "generation.top_p=0.8"]
    assert main(command(folder, prompts[0], tmp_path, *options)) == 0
    for line in written(tmp_path):
        ids = torch.tensor(line["prompt_tokens"] + line["tokens"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(line["prompt_tokens"]) - 1 : -1].double()
        plain = logits.log_softmax(-1)
        top = (logits / 0.7).topk(5)
        probs = top.values.softmax(-1)
        is_kept = probs.cumsum(-1) - probs < 0.8
        log_kept = top.values.masked_fill(~is_kept, -torch.inf).log_softmax(-1)
        for i, token in enumerate(line["tokens"]):
            (place,) = (top.indices[i] == token).nonzero()[0].tolist()
            assert line["sampling_logprobs"][i] == pytest.approx(log_kept[i, place].item(), abs=1e-5)
            assert line["logprobs"][i] == pytest.approx(plain[i, token].item(), abs=1e-5)


@pytest.mark.parametrize(
    "record, sentence",
    [
        ({"prompt": "hello"}, "prompts.jsonl:1: .*no tokenizer"),
        ({"prompt_tokens": []}, "prompts.jsonl:1: .*prompt_tokens"),
        ({"prompt_tokens": [1] * 512}, "prompts.jsonl:1: .*512 tokens.*no room.*512"),
        ({"prompt_tokens": [1] * 4097}, "prompts.jsonl:1: .*allows 4096"),
        ({"prompt_tokens": [96]}, "prompts.jsonl:1: .*96"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_or_counted(models, tmp_path, capsys, record, sentence):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps(record) + "\n" + json.dumps({"prompt_tokens": [3, 4]}) + "\n")
    line = command(models["glm"][0], data, tmp_path)
    assert main(line) == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])
    assert main([*line, "data.on_error=skip"]) == 0
    assert "answered 1 prompts (1 bad ones skipped)" in capsys.readouterr().err
    assert [answer["index"] for answer in written(tmp_path)] == [1]


def test_an_id_that_cannot_be_drawn_ends_no_answer(models, prompts, tmp_path, capsys):
    assert main(command(models["glm"][0], prompts[0], tmp_path, "generation.stop_ids=[5,96]")) == 2
    sentence = "generation.stop_ids holds 96, the model's vocabulary ends at 95: no answer would end so"
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_an_answer_stops_at_the_models_context(models, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt_tokens": [3] * 509}) + "\n")
    assert main(command(models["glm"][0], data, tmp_path, "generation.temperature=0")) == 0
    (answer,) = written(tmp_path)
    assert len(answer["tokens"]) <= 3
    assert len(answer["tokens"]) == 3 or answer["finish_reason"] == "stop"


def test_a_cache_without_room_for_one_sequence_is_refused(models, prompts, tmp_path, capsys):
    few = f"generation.cache_bytes={cache_bytes(3, 'parallel.tp=1')}"
    line = command(models["glm"][0], prompts[0], tmp_path, "generation.page_size=4", few)
    assert main(line) == 2
    assert "page" in capsys.readouterr().err.splitlines()[-1]
    assert main([*line[:-1], "generation.cache_bytes=10"]) == 2
    assert "a cache of 10 bytes holds no page: one takes" in capsys.readouterr().err.splitlines()[-1]
