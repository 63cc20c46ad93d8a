"""The pages that a user follows, run as they are, in one process, on the tiny model that they make."""

import json
import re
import sys

import pytest
from doc_pages import DOCS, blocks, commands

from glm_rlhf.engine.cli import main


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which `first_run.md` and then `python.md` were followed."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        python = blocks(DOCS / "python.md")
        for block in python:  # a page may use a file before it shows it
            if block.title.startswith("file: "):
                (folder / block.title.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        for block in [*blocks(DOCS / "first_run.md"), *python]:
            follow(block)
        yield folder
    for name in ("own_reward", "reward_server"):
        sys.modules.pop(name, None)


def follow(block) -> None:
    """Run a snippet, or the commands of a shell block."""
    if block.language == "bash":
        for words in commands(block.text):
            assert main(words) == 0, f"glm-rlhf {' '.join(words)}"
    elif block.title.startswith("run: "):
        exec(compile(block.text, block.title, "exec"), {"__name__": "snippet"})


def test_a_users_folder_goes_from_sft_to_an_export_that_transformers_loads(walked):
    """The pages' own snippets assert as they run; here is what has to be left on disk."""
    answers = (walked / "outputs/generate/generate.jsonl").read_text().splitlines()
    scores = (walked / "outputs/score/score.jsonl").read_text().splitlines()
    assert len(answers) == len(scores) == 64
    for name in ("served", "own_served"):
        config = json.loads((walked / "walk" / name / "config.json").read_text())
        assert config["architectures"] == ["GlmForCausalLM"]
    assert "win_rate" in json.loads((walked / "outputs/evaluate/evaluate.json").read_text())["figures"]
    assert (walked / "outputs/walk_dpo/hf/step_2/config.json").exists()


def test_every_metric_that_is_written_is_defined(walked):
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"^\| `([\w/@]+)` \|", page, re.MULTILINE))
    written = set()
    for path in walked.glob("outputs/*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            written |= {as_defined(name) for name in json.loads(line).keys() - {"step"}}
    assert {"actor/pg_loss", "reward/accuracy", "actor/rewards/margins"} <= written
    assert sorted(written - defined) == []


def as_defined(name: str) -> str:
    """The name under which the page defines a metric: k for a number, no end of an interval."""
    return re.sub(r"@\d+", "@k", re.sub(r"/(low|high)$", "", name))
