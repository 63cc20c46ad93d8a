"""Two trees compared to the bit: what is found, what is renamed, and that no empty comparison passes."""

import json
import struct
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_bits import fork_server, names
from benchmarks.same_bits.comparison import compare, not_taken
from benchmarks.same_bits.outcome import differences, read_outcome
from benchmarks.same_bits.report import RowResult, as_markdown
from benchmarks.same_bits.rows import LAYOUTS, TableRow, all_rows, chosen_rows
from benchmarks.same_bits.trees import RunFailure, Tree
from benchmarks.same_bits.variants import Variant

METRICS = [
    {"step": 1, "actor/loss": 0.5, "eval/x": None, "timing_s/step": 1.0},
    {"step": 2, "actor/loss": 0.25},
]
WEIGHT = "step_2/model.safetensors/w"


def write_run(folder: Path, *, lines=METRICS, weight=(1.0, 2.0), moment=(0.0,), is_old: bool = False) -> Path:
    """Write a run folder with the new names of places, or with the old ones."""
    checkpoints, exports = ("resume", "checkpoints") if is_old else ("checkpoints", "hf")
    for place, name, values in ((exports, "model", weight), (checkpoints, "rank_00000", moment)):
        (folder / place / "step_2").mkdir(parents=True)
        tensor = values if torch.is_tensor(values) else torch.tensor(values)
        save_file({"w": tensor}, folder / place / "step_2" / f"{name}.safetensors")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def compared(tmp_path: Path, before: dict, after: dict) -> list[str]:
    outcomes = [
        read_outcome(write_run(tmp_path / name, **options))
        for name, options in (("before", before), ("after", after))
    ]
    return differences(*outcomes)


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(
        struct.unpack(f"{len(bits)}i", struct.pack(f"{len(bits)}I", *bits)), dtype=torch.int32
    )


def test_equal_runs_are_equal_and_what_was_compared_is_counted(tmp_path):
    outcome = read_outcome(write_run(tmp_path / "run"))
    assert differences(outcome, outcome) == []
    assert set(outcome.metrics) == {"step 1 actor/loss", "step 1 eval/x", "step 2 actor/loss"}, "no times"
    assert set(outcome.tensors) == {f"hf/{WEIGHT}", "checkpoints/step_2/rank_00000.safetensors/w"}
    assert outcome.num_bytes == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_one_flipped_bit_is_found(tmp_path, dtype):
    tensor = torch.arange(1, 9).to(dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[-tensor.element_size()] ^= 1  # the lowest bit of the last element
    (found,) = compared(tmp_path, {"weight": tensor}, {"weight": flipped})
    assert found.startswith(f"hf/{WEIGHT}: 1 of 8 elements, by "), found


def test_a_nan_is_equal_to_its_own_bits_alone(tmp_path):
    quiet, other = from_bits(0x7FC00000).view(torch.float32), from_bits(0x7FC00001).view(torch.float32)
    assert compared(tmp_path / "same", {"moment": quiet}, {"moment": quiet.clone()}) == []
    assert len(compared(tmp_path / "other", {"moment": quiet}, {"moment": other})) == 1


def test_zeros_of_two_signs_differ(tmp_path):
    lines = [{**METRICS[0], "actor/loss": 0.0}, METRICS[1]], [{**METRICS[0], "actor/loss": -0.0}, METRICS[1]]
    found = compared(tmp_path, {"lines": lines[0], "weight": (0.0,)}, {"lines": lines[1], "weight": (-0.0,)})
    assert found == ["step 1 actor/loss: 0.0 → -0.0, by 0", f"hf/{WEIGHT}: 1 of 1 elements, by 0 at most"]


def test_metrics_that_differ_are_named_with_the_size(tmp_path):
    after = [{"step": 1, "actor/loss": 0.5000001, "eval/x": 1.0}, {"step": 2, "new": 3}]
    assert compared(tmp_path, {}, {"lines": after}) == [
        "step 1 actor/loss: 0.5 → 0.5000001, by 1e-07",
        "step 1 eval/x: None → 1.0",
        "step 2 actor/loss is missing after",
        "step 2 new is missing before",
    ]


def test_another_type_or_shape_of_a_tensor_is_a_difference(tmp_path):
    weight = torch.zeros(4)
    for number, other in enumerate((weight.view(torch.int32), weight.view(2, 2))):
        assert len(compared(tmp_path / str(number), {"weight": weight}, {"weight": other})) == 1


@pytest.mark.parametrize("missing", ["metrics.jsonl", "hf", "checkpoints"])
def test_a_run_without_numbers_differs_even_from_itself(tmp_path, missing):
    run = write_run(tmp_path / "run")
    (run / missing).rename(run / "elsewhere")
    outcome = read_outcome(run)
    found = differences(outcome, outcome)
    assert len(found) == 2
    assert all("to compare" in text for text in found)


def test_old_names_are_compared_under_the_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "RENAMED_METRICS", {"a/left": "b/right", "a/*": "b/minus/*"})
    monkeypatch.setattr("benchmarks.same_bits.outcome.RENAMED_METRICS", names.RENAMED_METRICS)
    monkeypatch.setattr("benchmarks.same_bits.outcome.RENAMED_TENSORS", {"*/w": "*/weight"})
    old = [{"step": 1, "a/left": 1.0, "a/mean": 2.0}]
    new = [{"step": 1, "b/right": 1.0, "b/minus/mean": 2.0}]
    assert compared(tmp_path / "both", {"lines": old, "is_old": True}, {"lines": new}) == []
    assert len(compared(tmp_path / "size", {"lines": old}, {"lines": [{**new[0], "b/minus/mean": 3.0}]})) == 1
    with pytest.raises(ValueError, match="both b/right"):
        compared(tmp_path / "clash", {"lines": [{"step": 1, "a/left": 1.0, "b/right": 1.0}]}, {})


def test_a_key_has_the_name_that_the_tree_knows(monkeypatch):
    renamed = {"train.on_host": "train.offload", "train.offload": "train.cpu_offload"}
    monkeypatch.setattr(names, "RENAMED_KEYS", renamed)
    for known in ("train.on_host", "train.offload", "train.cpu_offload"):
        assert names.key_of("train.cpu_offload", {"train.steps", known}) == known
    assert names.key_of("train.steps", {"train.steps"}) == "train.steps"
    with pytest.raises(ValueError, match=r"train\.cpu_offload or train\.offload or train\.on_host"):
        names.key_of("train.cpu_offload", {"train.steps"})


def test_the_table_has_every_command_in_every_layout_and_no_name_twice():
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    base = {(row.command, row.layout) for row in rows if row.variant.name == ""}
    assert base == {(c, layout) for c in ("ppo", "sft", "reward", "dpo") for layout in LAYOUTS}
    for row in rows:
        assert all(run.layout.world <= 4 for run in row.runs)
    assert chosen_rows(["sft"], ["tp2"], [""]) == [row for row in rows if row.name == "sft tp2"]


def test_a_variant_whose_path_is_not_taken_is_a_difference(tmp_path):
    outcome = read_outcome(write_run(tmp_path / "run"))
    shows = Variant(name="x", shows=("actor/loss", "eval/x"))
    (found,) = not_taken(TableRow(command="sft", layout="one", variant=shows), outcome)
    assert found.startswith("eval/x is never")


def test_the_report_names_the_first_difference_and_the_end_of_a_failure():
    row = chosen_rows(["dpo"], ["tp4"], [""])[0]
    results = [
        RowResult(row=row, wall_s=1.0, num_metrics=4, num_tensors=2),
        RowResult(row=row, wall_s=1.0, differences=["step 1 x: 1 → 2, by 1", "hf/w: 1 of 2 elements"]),
        RowResult(row=row, wall_s=1.0, failure="after: the ranks ended with [1]\nrank_0: no such key"),
    ]
    text = as_markdown(results, {"before": "abc", "after": "def (with uncommitted changes)"}, 60.0)
    assert "1 of 3 rows are equal" in text
    assert "- after: def (with uncommitted changes)" in text
    assert "| dpo | tp4 |  | 4 | 2 | 0 | 1.0 | equal |" in text
    assert "DIFFERS: step 1 x: 1 → 2, by 1 (and 1 more) |" in text
    assert "FAILED: after: the ranks ended with [1] |" in text
    assert "rank_0: no such key" in text


CLI = """
import os, sys, pathlib, json, torch
from safetensors.torch import save_file

def main(argv):
    if "--help" in argv:
        print("  {key} text\\n  train.steps a number\\n  run.output a path\\n  parallel.tp a number")
        return 0
    given = dict(text.split("=", 1) for text in argv[1:])
    if given["{key}"] == "bad" and os.environ["RANK"] == "1":
        sys.stderr.write("rank 1 has had enough\\n")
        return 1
    if given["{key}"] == "foreign":
        sys.modules["glm_rlhf.foreign"] = type(sys)("foreign")
        sys.modules["glm_rlhf.foreign"].__file__ = "/elsewhere/foreign.py"
    run = pathlib.Path(given["run.output"])
    if os.environ["RANK"] == "0":
        number = {number} if given["{key}"] == "other" else 1.0
        for place in ("hf", "checkpoints"):
            (run / place / "step_1").mkdir(parents=True, exist_ok=True)
            save_file({{"w": torch.tensor([number])}}, run / place / "step_1" / "x.safetensors")
        with (run / "metrics.jsonl").open("a") as file:
            line = {{"step": file.tell(), "world": int(os.environ["WORLD_SIZE"])}}
            file.write(json.dumps(line | {{"steps": int(given["train.steps"])}}) + "\\n")
    return 0
"""


def write_tree(root: Path, cli: str) -> Path:
    """Write a tree of a command line alone."""
    for layer in ("engine", "kernels", "parallel"):
        (root / layer).mkdir(parents=True)
        (root / layer / "__init__.py").touch()
    (root / "engine" / "cli.py").write_text(cli, encoding="utf-8")
    return root


def test_two_trees_are_run_and_compared(tmp_path, monkeypatch):
    """One key has two names; with `other` a number differs, with `bad` a rank fails, which is quoted.

    With `foreign` the tree imports what is not its own.
    """
    monkeypatch.setattr(names, "RENAMED_KEYS", {"old.key": "new.key"})
    monkeypatch.setattr("benchmarks.same_bits.rows._COMMON", ("new.key=good", "train.steps=3"))
    monkeypatch.setattr("benchmarks.same_bits.rows._OF_COMMAND", {"sft": ()})
    (tmp_path / "inputs").mkdir()
    old = write_tree(tmp_path / "old", CLI.format(key="old.key", number=1.0))
    new = write_tree(tmp_path / "new", CLI.format(key="new.key", number=1.0 + 2**-23))
    with (
        Tree("before", old, tmp_path / "inputs") as before,
        Tree("after", new, tmp_path / "inputs") as after,
    ):
        same, differs, failed, foreign = (
            compare(TableRow(command="sft", layout="tp2", variant=variant), before, after, tmp_path / "runs")
            for variant in (
                Variant(name=value, options=(f"new.key={value}",), then=())
                for value in ("good", "other", "bad", "foreign")
            )
        )
    assert same.verdict == "equal", same
    assert (same.num_metrics, same.num_tensors, same.num_bytes) == (4, 2, 8)
    assert len(differs.differences) == 2
    assert "1 of 1 elements, by 1.19e-07 at most" in differs.verdict
    assert failed.verdict == "FAILED: before: the ranks ended with [0, 1]"
    assert "rank_1: rank 1 has had enough" in failed.failure
    assert "glm_rlhf.foreign is /elsewhere/foreign.py" in foreign.failure
    assert not (tmp_path / "runs").exists()


def test_a_tree_whose_modules_lie_elsewhere_is_refused(tmp_path, monkeypatch):
    elsewhere = write_tree(tmp_path / "elsewhere", "def main(argv): return 0")
    root = tmp_path / "root"
    root.mkdir()
    for layer in ("engine", "kernels", "parallel"):
        (root / layer).symlink_to(elsewhere / layer)
    with Tree("after", root, tmp_path) as tree, pytest.raises(RunFailure, match="which is not in"):
        tree.keys("sft")
    module = types.SimpleNamespace(__file__=str(elsewhere / "engine" / "cli.py"))
    monkeypatch.setattr(fork_server, "sys", types.SimpleNamespace(modules={"glm_rlhf.engine.cli": module}))
    fork_server.refuse_foreign_modules(elsewhere)
    with pytest.raises(RuntimeError, match=r"glm_rlhf\.engine\.cli is "):
        fork_server.refuse_foreign_modules(root)
