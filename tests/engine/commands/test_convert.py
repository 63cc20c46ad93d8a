"""`convert`: many ranks write what one writes, and a fault on one of them ends all."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder
from weight_folders import assert_same_bytes, load_all

from glm_rlhf.engine.cli import main
from glm_rlhf.parallel.storage.writer_lock import one_writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("chatglm"), "chatglm")


def run_main(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue().splitlines()[-1] if said.getvalue() else ""


def command(source: Path, target: Path, *more: str) -> list[str]:
    return ["convert", f"model.path={source}", f"convert.to={target}", f"run.output={target}.run", *more]


def test_ranks_write_together_what_one_process_writes(ranks, folder, tmp_path):
    more = ("convert.format=glm", "convert.dtype=bf16", "convert.max_shard_bytes=40KB")
    code, said = run_main(command(folder, tmp_path / "alone", *more))
    assert code == 0
    assert re.search(rf"converted {folder} to {tmp_path}/alone in \d+\.\d s", said)
    for code, _ in ranks.run(run_main, command(folder, tmp_path / "together", *more)):
        assert code == 0
    assert_same_bytes(load_all(tmp_path / "together"), load_all(tmp_path / "alone"))
    assert len(list((tmp_path / "together").glob("*.safetensors"))) > 1


def test_a_fault_in_one_ranks_layers_ends_every_rank(ranks, tmp_path):
    model = make_model("glm")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = 1e6  # rank 2 writes this layer
    source = save_folder(tmp_path / "model", "glm", model)
    answers = ranks.run(run_main, command(source, tmp_path / "out", "convert.dtype=fp16"))
    assert [code for code, _ in answers] == [2] * 4
    words = r"1 values of model\.layers\.2\.mlp\.down_proj\.weight do not fit torch\.float16"
    for rank, (_, said) in enumerate(answers):  # the rank that found it reports it
        assert bool(re.search(words, said)) == (rank == 2), said
    assert not (tmp_path / "out").exists()
    answers = ranks.run(run_main, command(source, tmp_path / "out"))
    assert [code for code, _ in answers] == [0] * 4, "the next attempt finds no obstacle"


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("no weights", "no weights|no .*safetensors|model.safetensors"),
        ("target exists", "exists already"),
        ("other architecture", "a chatglm model cannot become glm4"),
    ],
)
def test_what_all_ranks_see_ends_all_of_them(ranks, folder, tmp_path, fault, sentence):
    source, more = shutil.copytree(folder, tmp_path / "in"), []
    if fault == "no weights":
        (source / "model.safetensors").unlink()
    elif fault == "target exists":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").touch()
    else:
        more = ["convert.format=glm4"]
    for code, said in ranks.run(run_main, command(source, tmp_path / "out", *more)):
        assert code == 2
        assert re.search(sentence, said), said


def test_a_folder_that_another_process_writes_is_refused_on_every_rank(ranks, folder, tmp_path):
    target = tmp_path / "out"
    with one_writer(target):
        answers = ranks.run(run_main, command(folder, target))
    for rank, (code, said) in enumerate(answers):
        assert code == 2
        assert f"{target} is being written by process {os.getpid()} on " in said
        assert ("failed on rank 0" in said) == (rank != 0)
    assert not target.exists()
    assert [code for code, _ in ranks.run(run_main, command(folder, target))] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]
