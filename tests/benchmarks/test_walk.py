"""The walk through a command counts its files and the changes between them."""

from pathlib import Path

from tiny_models import make_model, save_folder
from tiny_ppo_line import ppo_line

from benchmarks import walk
from benchmarks.walk import Called, count_text


def test_a_file_counts_once_and_every_change_to_another():
    functions = [Called(Path(file), name) for file, name in (("a", "f"), ("b", "g"), ("b", "h"), ("a", "k"))]
    assert count_text(functions) == "2 files, 3 changes"


def test_a_run_of_ppo_is_counted_whole_and_from_generation_on(tmp_path, capsys):
    model = save_folder(tmp_path / "model", "glm", make_model("glm"))
    line = [*ppo_line(model, tmp_path), "train.steps=1", "generation.max_new_tokens=2"]
    assert walk.main(["--list", *line, f"run.output={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr()
    assert any(line.endswith(".generate") for line in said.out.splitlines())
    counts = said.err.splitlines()[-1]
    whole, generation = counts.split("; from ")
    assert whole.startswith("whole: ")
    assert ".generate on: " in generation
    assert counts.count(" files, ") == counts.count(" changes") == 2
