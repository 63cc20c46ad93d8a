"""The report: one file, everything of the run in it, nothing of it taken for markup."""

import json
import os
import re
from pathlib import Path

import pytest

from glm_rlhf.engine.observe.report import ReportTable, try_write_report, write_report


def make_run(folder: Path) -> Path:
    lines = [
        {
            "step": step,
            "reward/minus_baseline/mean": 0.1 * step,
            "objective/kl": None if step == 2 else 0.5,
            "actor/pg_loss": -0.1,
            "response_length/mean": 8.0,
            "actor/grad_norm": 2.0,
            "timing_s/generate": 3.0,
            "timing_s/iteration": 4.0,
        }
        for step in (1, 2, 3)
    ]
    texts = [json.dumps(line) for line in lines]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(texts) + '\n{"step": 4, "critic/rew')
    (folder / "config.yaml").write_text("model: {path: /models/<x>}\n")
    return folder


def write_samples(folder: Path, name: str, samples: list[tuple[list[int], str, float]]) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    with (folder / "samples" / name).open("w") as file:
        for prompt, text, reward in samples:
            line = {"prompt_tokens": prompt, "tokens": [7], "prompt": None, "text": text, "reward": reward}
            file.write(json.dumps(line | {"is_finished": reward > 0}) + "\n")


def test_one_file_holds_curves_phases_samples_and_settings(tmp_path):
    folder = make_run(tmp_path / "run")
    write_samples(folder, "step_1.jsonl", [([5, 6], "<b>old</b>", 0.25), ([7], "alone", 0.5)])
    write_samples(folder, "step_20.jsonl", [([9], "other prompt", 1.0)])
    write_samples(folder, "after.jsonl", [([5, 6], "new", -0.75)])
    table = ReportTable(
        title="Held out", columns=("model", "accuracy"), rows=(("SFT", 0.41237), ("PPO", 1)), note="n = 64"
    )
    path = write_report(folder, tables=(table,))
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    for title in ("Reward", "KL", "Loss", "Length", "Gradient", "Phases", "Samples", "Held out"):
        assert f"<h2>{title}</h2>" in page, title
    assert page.count("<svg") == 7
    assert "<td>generate</td><td>3</td><td>3</td><td>75.0%</td>" in page
    assert "<td>5 6</td><td>&lt;b&gt;old&lt;/b&gt;</td><td>0.25</td><td>new <span" in page
    assert "alone" in page
    assert "other prompt" not in page
    assert "/models/&lt;x&gt;" in page
    assert "<td>SFT</td><td>0.4124</td>" in page
    assert "Steps 1 to 3, 12.0 s" in page
    assert "<td>reward/minus_baseline/mean</td><td>0.1</td><td>0.3</td>" in page


def test_without_answers_to_the_first_prompts_the_last_samples_are_shown(tmp_path):
    folder = make_run(tmp_path)
    write_samples(folder, "step_9.jsonl", [([5], "early", 1.0)])
    write_samples(folder, "step_10.jsonl", [([6], "late", 1.0)])
    page = write_report(folder).read_text()
    assert "<td>early</td>" in page
    assert "<td></td><td></td><td>late</td>" in page


def test_a_repeated_step_counts_once(tmp_path):
    line = '{"step": 1, "reward/minus_baseline/mean": %s, "timing_s/iteration": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(line % "5.0" + line % "6.0")
    page = write_report(tmp_path).read_text()
    assert "<td>reward/minus_baseline/mean</td><td>6</td><td>6</td><td>6</td><td>6</td>" in page
    assert "2.0 s" in page


def test_a_folder_without_metrics_is_an_error_that_does_not_end_a_finished_run(tmp_path, capsys):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path)
    try_write_report(tmp_path, title="run")
    assert "no report was written" in capsys.readouterr().err


def test_a_table_whose_rows_do_not_match_its_columns_is_refused():
    with pytest.raises(ValueError, match="3 cells for 2 columns"):
        ReportTable(title="t", columns=("a", "b"), rows=((1, 2, 3),))


def test_foreign_lines_and_files_are_skipped_and_counted(tmp_path, capsys):
    folder = make_run(tmp_path)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\n[]\nnull\n\xff\n" + b"[" * 20_000 + b'\n{"step": "x"}\n{"step": 5, "a": NaN}\n')
    write_samples(folder, "step_1.jsonl", [([5, 6], "kept", 0.25)])
    with (folder / "samples" / "step_1.jsonl").open("ab") as file:
        file.write(b"[]\n3\n{}\n\xff\n" + b"[" * 20_000 + b'\n{"prompt_tokens": [5')
    (folder / "samples" / "step_x.jsonl").write_text("mine")
    os.mkfifo(folder / "samples" / "step_2.jsonl")
    (folder / "config.yaml").unlink()
    os.mkfifo(folder / "config.yaml")
    page = write_report(folder).read_text()
    assert "Steps 1 to 3" in page
    assert "<td>kept</td>" in page
    # The line cut in `make_run` takes the first line end.
    assert (
        "metrics.jsonl: 8 lines are no metrics of a step and are not in the report" in capsys.readouterr().err
    )
    os.remove(folder / "metrics.jsonl")
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        write_report(folder)
    os.remove(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="has no metric"):
        write_report(folder)
