"""A run replaces its own exports, at any kill without losing one, and nobody else's."""

import json
import os
import re

import pytest

from glm_rlhf.engine.runs.exports import MARK, RunExports
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture
def make(tmp_path):
    """Return a function that makes exports of a run in `tmp_path`, whose weights are a text."""
    with open_topology(Layout()) as topology:

        def exports(run: str = "a run", weights: str = "weights") -> RunExports:
            def export(path):
                path.mkdir()
                (path / "model").write_text(weights)

            return RunExports(tmp_path, run=run, export=export, topology=topology)

        yield exports


def content(folder) -> dict[str, str]:
    return {path.name: (path / "model").read_text() for path in folder.iterdir() if path.name[0] != "."}


def test_a_run_makes_its_own_exports_again(make, tmp_path):
    make().write("step_1", step=1)
    assert make().values_of("step_1") == {"run": "a run", "step": 1}
    make(weights="newer").write("step_1", step=1)
    assert content(tmp_path / "hf") == {"step_1": "newer"}
    make().open(0)


@pytest.mark.parametrize("what", ["other run", "no mark", "junk", "deep", "file", "link", "fifo"])
def test_what_is_not_its_own_is_refused_and_stays(make, tmp_path, what):
    folder = tmp_path / "hf" / "step_4"
    make(run="another run").write("step_4", step=4)
    mark = folder / MARK
    if what == "no mark":
        mark.unlink()
    elif what in ("junk", "deep"):
        mark.write_bytes(b"\xff\xfe{" if what == "junk" else b"[" * 50_000)
    elif what == "fifo":
        mark.unlink()
        os.mkfifo(mark)
    elif what in ("file", "link"):
        folder.rename(tmp_path / "elsewhere")
        if what == "file":
            folder.write_text("mine")
        else:
            mark = tmp_path / "elsewhere" / MARK
            mark.write_text(json.dumps({"run": "a run", "step": 4}))
            folder.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    sentence = re.escape(f"{folder} exists and is no export of this run")
    with pytest.raises(ValueError, match=sentence):
        make().write("step_4", step=4)
    with pytest.raises(ValueError, match=sentence):
        make().open(3)
    assert make().values_of("step_4") is None
    make().open(4)  # it does not write that step
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_what_kills_left_is_repaired(make, tmp_path):
    hf = tmp_path / "hf"
    for name in ("step_2", "best"):
        make(weights=name).write(name, step=2)
        (hf / name).rename(hf / f".{name}.replaced")  # between two renames
    for name in (".step_3.new", "..step_3.new.partial", ".best.new", "best.new"):
        (hf / name).mkdir()
    (hf / "..best.new.lock").touch()
    (hf / "mine.new").mkdir()
    make().open(2)
    assert sorted(path.name for path in hf.iterdir()) == ["best", "mine.new", "step_2"]
    assert (hf / "best" / "model").read_text() == "best"
    # A version before this one renamed `best` to `best.old` first.
    (hf / "best").rename(hf / "best.old")
    make().open(2)
    assert (hf / "best" / "model").read_text() == "best"
    (hf / "best.old").mkdir()
    make().open(2)
    assert sorted(path.name for path in hf.iterdir()) == ["best", "mine.new", "step_2"]


def test_an_export_that_fails_leaves_the_one_before(make, tmp_path):
    make().write("best", step=1)
    exports = make()

    def fail(path):
        path.mkdir()
        raise OSError(28, "No space left on device", str(path))

    exports._export = fail
    with pytest.raises(OSError, match="No space left"):
        exports.write("best", step=2)
    assert make().values_of("best")["step"] == 1
    assert content(tmp_path / "hf")["best"] == "weights"
    make().write("best", step=3)
    assert make().values_of("best")["step"] == 3
