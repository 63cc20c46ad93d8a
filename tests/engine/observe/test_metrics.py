"""Metrics: one line per step, null where undefined, nothing written by ranks that own no file."""

import errno
import json
import math
import os
import sys
import types

import pytest

from glm_rlhf.engine.observe.metrics import open_metrics


def test_each_step_is_on_disk_at_once(tmp_path):
    with open_metrics(tmp_path / "run", is_owner=True, uses_tensorboard=False) as write:
        for step in (1, 2):
            write(step, {"actor/loss": 0.5 / step, "timing_s/step": 2.0})
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == {"step": step, "actor/loss": 0.5 / step, "timing_s/step": 2.0}
    assert len(lines) == 2
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_nan_and_inf_are_null(tmp_path):
    with open_metrics(tmp_path, is_owner=True) as write:
        write(3, {"a": math.nan, "b": math.inf, "c": None, "d": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 3, "a": None, "b": None, "c": None, "d": 1.0}


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_metrics(tmp_path, is_owner=True) as write:
        write(1, {"actor/loss": 0.75, "reward/corr": None})
        write(2, {"actor/loss": 0.5, "reward/corr": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"actor/loss": [(1, 0.75), (2, 0.5)], "reward/corr": [(2, 0.25)]}


def test_other_ranks_touch_nothing(tmp_path):
    with open_metrics(tmp_path / "run", is_owner=False, wandb_project="not installed") as write:
        write(1, {"actor/loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_defined_metrics(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **options: calls.append(options["project"]) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    with open_metrics(tmp_path, is_owner=True, uses_tensorboard=False, wandb_project="glm") as write:
        write(1, {"a": 1.0, "b": math.nan})
    assert calls == ["glm", (1, {"a": 1.0}), "finished"]


def test_a_service_that_fails_is_left_alone_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(numbers, step):
        raise RuntimeError("the service is down")

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **options: types.SimpleNamespace(log=fail, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with open_metrics(tmp_path, is_owner=True, uses_tensorboard=False, wandb_project="glm") as write:
        for step in (1, 2):
            write(step, {"a": 1.0})
    assert capsys.readouterr().err.count("RuntimeError: the service is down") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_wandb_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        with open_metrics(tmp_path, is_owner=True, wandb_project="glm"):
            pass


def test_a_full_disk_ends_tensorboard_with_one_warning_and_not_the_run(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_metrics(tmp_path, is_owner=True) as write:
        write(1, {"actor/loss": 0.75})
        monkeypatch.setattr(RecordWriter, "write", full)
        monkeypatch.setattr(RecordWriter, "flush", full)
        write(2, {f"metric/{number}": 0.5 for number in range(50)})
        write(3, {f"metric/{number}": 0.5 for number in range(50)})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path / 'tensorboard'}: No space left on device") == 1, said
    assert "Traceback" not in said


FOREIGN = [
    *(
        b"\n",
        b"not JSON\n",
        b"[1, 2]\n",
        b"3\n",
        b"null\n",
        b"\xff\xfe\x00\n",
        b"{}\n",
        b"[" * 20_000 + b"\n",
    ),
    *(b'{"step": "2"}\n', b'{"step": true}\n', b'{"step": -1}\n', b'{"step": 1.5}\n', b'{"step": NaN}\n'),
    *(b'{"step": 2, "a": NaN}\n', b'{"step": 2, "a": "x"}\n', b'{"step": 2, "a": [1]}\n'),
    *(b'{"step": 2, "a": 1%s}\n' % (b"0" * 400), b'{"step": 2, "a": 1%s}\n' % (b"0" * 5000)),
    *(b'{"step": 2, "a": "%s"}\n' % (b"x" * 2**22), b'{"step": 3, "a": 0.'),
]
"""Lines that no run wrote, the last one cut."""


def test_a_resumed_run_keeps_its_lines_and_says_how_many_others_it_removed(tmp_path, capsys):
    own = [b'{"step": 0, "a": 1.0}\n', b'{"step": 1, "a": null}\n', b'{"step": 2, "a": 0.1}\n']
    again = [b'{"step": 2, "a": 0.3}\n', b'{"step": 3, "a": 0.25}\n']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([own[0], *FOREIGN[:10], *own[1:], *again, *FOREIGN[10:]]))
    with open_metrics(tmp_path, is_owner=True, uses_tensorboard=False, last_step=2) as write:
        write(3, {"a": 0.5})
    assert path.read_bytes() == b"".join([own[0], own[1], again[0], b'{"step": 3, "a": 0.5}\n'])
    assert (
        f"{path}: {len(FOREIGN)} lines are no metrics of a step and were removed" in capsys.readouterr().err
    )
    with open_metrics(tmp_path, is_owner=True, uses_tensorboard=False, last_step=3):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("last_step", [None, 2])
def test_what_is_no_file_is_refused_and_nobody_waits(tmp_path, last_step):
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder / "metrics.jsonl")
        with pytest.raises(ValueError, match=r"metrics\.jsonl is not a regular file"):
            with open_metrics(folder, is_owner=True, uses_tensorboard=False, last_step=last_step):
                pass


def raw_steps(folder) -> list[tuple[str, int]]:
    """Tag and step of every event, file after file, as a reader that purges nothing sees them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    # By the times in the files: names made in one second end in a counter, and "10" sorts before "9".
    files = [list(EventFileLoader(str(path)).Load()) for path in folder.iterdir()]
    events = (event for file in sorted(files, key=lambda file: file[0].wall_time) for event in file)
    return [(value.tag, event.step) for event in events for value in event.summary.value]


def test_no_step_is_twice_in_tensorboard(tmp_path):
    """Resumed from an earlier step, from inside the first one, killed in a write, and begun anew."""

    def write_steps(first: int, last: int, last_step: int | None) -> None:
        with open_metrics(tmp_path, is_owner=True, last_step=last_step) as write:
            for step in range(first, last + 1):
                write(step, {"a": float(step), "b": 1.0})

    folder = tmp_path / "tensorboard"
    write_steps(0, 300, None)
    (file,) = folder.iterdir()
    with file.open("ab") as events:
        events.write(b"\x18\0\0\0\0\0\0\0half")
    write_steps(201, 260, 200)
    write_steps(231, 240, 230)
    assert raw_steps(folder) == [(tag, step) for step in range(241) for tag in "ab"]
    write_steps(1, 3, 0)
    assert raw_steps(folder) == [(tag, step) for step in range(4) for tag in "ab"]
    write_steps(1, 2, None)
    assert raw_steps(folder) == [(tag, step) for step in (1, 2) for tag in "ab"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]
