"""`score`: the same logprobs as transformers in every layout, and one clear sentence for wrong input."""

import contextlib
import io
import json
import re
import resource
import shutil
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
    "parallel.tp=4 parallel.sequence_parallel=true",
    "parallel.pp=2",
    "parallel.pp=4",
    "parallel.pp=2 parallel.vpp=2",
    "parallel.tp=2 parallel.pp=2",
    "parallel.tp=2 parallel.pp=2 parallel.sequence_parallel=true",
    "parallel.tp=2 parallel.pp=2 parallel.vpp=2",
    "parallel.cp=2",
    "parallel.cp=4",
    "parallel.tp=2 parallel.cp=2",
    "parallel.pp=2 parallel.cp=2",
)
QUICK = (LAYOUTS[0], LAYOUTS[4], LAYOUTS[10], LAYOUTS[13])
"""Those that `make test` runs: between them they split every axis."""


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Twelve records as ids, some far longer than others, one with a prompt of one token."""
    generator = torch.Generator().manual_seed(5)
    lengths = [
        (1, 1),
        (2, 9),
        (30, 4),
        (5, 5),
        (3, 1),
        (12, 20),
        (1, 33),
        (4, 2),
        (7, 7),
        (2, 2),
        (9, 1),
        (6, 3),
    ]
    records = [[torch.randint(0, 96, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    lines = [json.dumps({"prompt_tokens": p, "response_tokens": r}) for p, r in records]
    path.write_text("\n".join(lines) + "\n")
    return path, records


@pytest.fixture(scope="module")
def models(tmp_path_factory, demonstrations):
    """A folder a family, with transformers' logprobs of the responses."""
    _, records = demonstrations
    answers = {}
    for family in FAMILIES:
        model = make_model(family)
        folder = save_folder(tmp_path_factory.mktemp(family), family, model)
        whole = [torch.tensor(prompt + response) for prompt, response in records]
        with torch.no_grad():
            logprobs = reference_logprobs(model, whole)
        answers[family] = (
            folder,
            [part[len(prompt) :].tolist() for part, (prompt, _) in zip(logprobs, records, strict=True)],
        )
    return answers


def run_main(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue().splitlines()[-1] if said.getvalue() else ""


def run_mains(lines: list[list[str]]) -> list[tuple[int, str]]:
    return [run_main(line) for line in lines]


def command(folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    paths = [f"model.path={folder}", f"data.path={data}", f"run.output={output}"]
    return ["score", *paths, "train.dtype=fp32", "train.micro_batch_tokens=24", *more]


@pytest.mark.parametrize("layout", layout_params({name: name for name in LAYOUTS}, quick=QUICK))
def test_logprobs_equal_transformers(ranks, models, demonstrations, tmp_path, layout):
    path, records = demonstrations
    lines = [
        command(folder, path, tmp_path / family, *layout.split()) for family, (folder, _) in models.items()
    ]
    for answers in ranks.run(run_mains, lines):
        assert [code for code, _ in answers] == [0] * len(FAMILIES), answers
    for family, (_, expected) in models.items():
        written = [json.loads(line) for line in (tmp_path / family / "score.jsonl").open()]
        assert [line["index"] for line in written] == list(range(len(records)))
        assert [line["tokens"] for line in written] == [response for _, response in records]
        for line, logprobs in zip(written, expected, strict=True):
            # fp32, about as many roundings as layers: 1e-6; the contract allows 1e-4.
            assert line["logprobs"] == pytest.approx(logprobs, abs=2e-5)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_reward_model_of_transformers_gives_its_own_scores(ranks, demonstrations, tmp_path, family):
    path, records = demonstrations
    model = make_model(family, has_score=True)
    folder = save_folder(tmp_path / "model", family, model)
    for layout in ("", "parallel.tp=2 parallel.pp=2"):
        line = command(folder, path, tmp_path / "out", *layout.split())
        assert {code for code, _ in ranks.run(run_main, line)} == {0}
        written = [json.loads(line)["score"] for line in (tmp_path / "out" / "score.jsonl").open()]
        with torch.no_grad():
            scores = [model(torch.tensor([prompt + answer])).logits.item() for prompt, answer in records]
        # fp32, about as many roundings as layers, of scores near 1.
        assert written == pytest.approx(scores, abs=2e-5)
        assert max(scores) - min(scores) > 0.1


def test_a_classifier_of_several_labels_is_no_reward_model(demonstrations, tmp_path):
    folder = save_folder(tmp_path / "model", "glm", make_model("glm", has_score=True, num_labels=3))
    code, said = run_main(command(folder, demonstrations[0], tmp_path))
    assert code == 2
    assert "'score.weight' with 3 rows, a head of so many labels; a critic or reward model has one" in said


def damage(folder: Path, target: Path, fault: str) -> Path:
    """A copy of a model folder with one fault."""
    shutil.copytree(folder, target)
    if fault == "no config":
        (target / "config.json").unlink()
    elif fault == "no weights":
        (target / "model.safetensors").unlink()
    elif fault == "cut weights":
        weights = target / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config = json.loads((target / "config.json").read_text())
        config |= {"unknown type": {"model_type": "llama"}, "wrong shape": {"intermediate_size": 80}}[fault]
        (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("no config", "config.json"),
        ("no weights", "no weights|model.safetensors|no .*safetensors"),
        ("cut weights", "model.safetensors"),
        ("unknown type", "llama.*chatglm"),
        ("wrong shape", r"mlp.down_proj.* \[48, 64\] .*requires \[48, 80\]"),
    ],
)
def test_a_damaged_folder_ends_every_rank_with_one_sentence(
    ranks, models, demonstrations, tmp_path, fault, sentence
):
    folder = damage(models["glm"][0], tmp_path / "model", fault)
    check_refusal(ranks, command(folder, demonstrations[0], tmp_path, "parallel.tp=2"), sentence)


@pytest.mark.parametrize(
    "layout, sentence",
    [
        ("parallel.tp=3", "tp 3 × pp 1 × cp 1 = 3 does not divide the world of 4 ranks"),
        ("parallel.tp=8", "8 does not divide the world of 4"),
        ("parallel.pp=4 parallel.vpp=2", "num_layers 4 of the model is not a multiple of pp × vpp 8"),
    ],
)
def test_an_impossible_layout_names_its_numbers(ranks, models, demonstrations, tmp_path, layout, sentence):
    line = command(models["glm"][0], demonstrations[0], tmp_path, *layout.split())
    check_refusal(ranks, line, sentence)


def test_a_fault_that_one_rank_finds_ends_all_of_them(ranks, models, demonstrations, tmp_path):
    line = command(models["glm"][0], demonstrations[0], tmp_path)
    answers = ranks.run(run_with_a_broken_read_on_rank_2, line)
    assert [code for code, _ in answers] == [2] * 4
    assert [("only here" in said) for _, said in answers] == [False, False, True, False]


def run_with_a_broken_read_on_rank_2(arguments: list[str]) -> tuple[int, str]:
    from glm_rlhf.parallel.weights import load

    original = load.iterate_shard
    if torch.distributed.get_rank() == 2:
        load.iterate_shard = broken
    try:
        return run_main(arguments)
    finally:
        load.iterate_shard = original


def broken(*_args, **_kwargs):
    raise ValueError("only here")


def check_refusal(ranks, line: list[str], sentence: str) -> None:
    for code, said in ranks.run(run_main, line):
        assert code == 2
        assert said.startswith("[rank ") or said.startswith("glm-rlhf score: ")
        assert re.search(sentence, said), said
    assert ranks.run(run_main, ["doctor", "--help"])  # the ranks are alive and at one


@pytest.mark.parametrize(
    "record, sentence",
    [
        ({"prompt": "hello", "response_tokens": [1]}, "demonstrations.jsonl:1: .*no tokenizer"),
        ({"prompt_tokens": [1, 96], "response_tokens": [1]}, "demonstrations.jsonl:1: .*96"),
        (
            {"prompt_tokens": [1] * 41, "response_tokens": [1]},
            "demonstrations.jsonl:1: .*41 tokens.*allows 40",
        ),
        ({"prompt_tokens": [1] * 9, "response_tokens": [1] * 510}, "519 tokens.*context is 512"),
        ({"prompt_tokens": [1]}, "demonstrations.jsonl:1: .*response"),
    ],
)
def test_a_bad_record_names_file_and_line_or_is_counted(models, tmp_path, record, sentence):
    data = tmp_path / "demonstrations.jsonl"
    good = {"prompt_tokens": [3, 4], "response_tokens": [5]}
    data.write_text(json.dumps(record) + "\n" + json.dumps(good) + "\n")
    line = command(models["glm"][0], data, tmp_path, "data.max_prompt_tokens=40")
    code, said = run_main(line)
    assert code == 2
    assert re.search(sentence, said), said
    assert not (tmp_path / "score.jsonl").exists()
    code, said = run_main([*line, "data.on_error=skip"])
    assert code == 0
    assert "scored 1 records, 1 bad ones skipped" in said
    (written,) = (tmp_path / "score.jsonl").open()
    assert json.loads(written)["index"] == 1


def test_weights_that_are_not_finite_end_every_rank_and_name_the_record(ranks, demonstrations, tmp_path):
    model = make_model("glm")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 7] = torch.nan
    folder = save_folder(tmp_path / "model", "glm", model)
    line = command(folder, demonstrations[0], tmp_path, "parallel.pp=2")
    check_refusal(ranks, line, "record 0 has a logprob that is not finite.*train.dtype=fp32")
    assert not (tmp_path / "score.jsonl").exists()


def test_an_output_that_cannot_be_written_ends_every_rank(ranks, models, demonstrations, tmp_path):
    (tmp_path / "folder").mkdir()
    line = command(models["glm"][0], demonstrations[0], tmp_path, f"data.out={tmp_path / 'folder'}")
    check_refusal(ranks, line, "folder.* is a folder, lines need a file")
    line = command(models["glm"][0], demonstrations[0], tmp_path)
    answers = ranks.run(run_with_little_disk_on_rank_0, line)
    assert [code for code, _ in answers] == [2] * 4
    assert "score.jsonl.partial: File too large" in answers[0][1]
    assert all("failed on rank 0: " in said for _, said in answers[1:])
    assert not (tmp_path / "score.jsonl").exists()


def run_with_little_disk_on_rank_0(arguments: list[str]) -> tuple[int, str]:
    from glm_rlhf.engine.commands import score

    original = score.json_lines
    if torch.distributed.get_rank() == 0:
        score.json_lines = lambda path: with_little_disk(original(path))
    try:
        return run_main(arguments)
    finally:
        score.json_lines = original


@contextlib.contextmanager
def with_little_disk(lines):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the kernel then refuses as a disk does
    try:
        with lines as write:
            yield write
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
