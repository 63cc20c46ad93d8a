"""One writer per place: a second one is refused and names the first, a dead one's lock is taken over."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from glm_rlhf.parallel.storage import writer_lock
from glm_rlhf.parallel.storage.writer_lock import WriterError, one_writer

HOLD = """
import sys
from pathlib import Path
from glm_rlhf.parallel.storage.writer_lock import one_writer
with one_writer(Path(sys.argv[1]), is_inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold():
    """Return a function that lets another process hold a lock, and returns that process."""
    processes = []

    def start(target, where: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(target), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | environment,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_the_second_writer_is_refused_and_the_first_is_named(tmp_path, hold, where):
    target = tmp_path / "target"
    if where == "inside":
        target.mkdir()
    first = hold(target, where)
    with pytest.raises(WriterError) as refused, one_writer(target, is_inside=where == "inside"):
        pytest.fail("the block ran")
    named = (
        rf"process {first.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    )
    assert re.match(rf"{re.escape(str(target))} is being written by {named}: ", str(refused.value))
    first.communicate("\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["target"] if where == "inside" else [])
    with one_writer(target, is_inside=where == "inside") as is_held:
        assert is_held


def test_a_killed_writers_lock_is_taken_over(tmp_path, hold):
    first = hold(tmp_path / "out", "beside")
    first.kill()
    first.wait()
    assert (tmp_path / ".out.lock").exists()
    with one_writer(tmp_path / "out") as is_held:
        assert is_held
        assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_lost_its_torchrun_is_waited_for(tmp_path, hold, caplog):
    """Its parent is then another process than the one that it recorded."""
    first = hold(tmp_path / "out", "beside", TORCHELASTIC_RUN_ID="none")
    with pytest.raises(WriterError), one_writer(tmp_path / "out"):
        pytest.fail("its launcher is alive")
    path = tmp_path / ".out.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"launcher": 2**22}))
    with pytest.raises(WriterError), one_writer(tmp_path / "out", wait_s=0.3):
        pytest.fail("the wait has an end")
    threading.Timer(0.5, first.communicate, ["\n"]).start()
    with one_writer(tmp_path / "out", wait_s=60) as is_held:
        assert is_held
    assert "about to end: waiting up to 60 s" in caplog.text


def test_ranks_that_torchrun_restarted_wait_for_those_before(tmp_path, hold, monkeypatch):
    first = hold(tmp_path / "out", "beside")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    threading.Timer(0.3, first.communicate, ["\n"]).start()
    with one_writer(tmp_path / "out", wait_s=60) as is_held:
        assert is_held
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "one")
    hold(tmp_path / "out", "beside")
    with pytest.raises(WriterError), one_writer(tmp_path / "out"):
        pytest.fail("the block ran")


NOBODY = {
    "empty": b"",
    "a list": b"[1]",
    "binary": b"\xff",
    "no number": b'{"pid": "x"}',
    "deep": b"[" * 4000,
}


@pytest.mark.parametrize("content", NOBODY.values(), ids=NOBODY)
def test_a_lock_that_names_nobody_still_locks(tmp_path, content):
    path = tmp_path / ".out.lock"
    path.write_bytes(content)
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WriterError, match="is being written by another process"):
            with one_writer(tmp_path / "out"):
                pytest.fail("the block ran")
    with one_writer(tmp_path / "out") as is_held:
        assert is_held


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".out.lock")
    with (
        pytest.raises(WriterError, match="not a regular file, a lock needs one"),
        one_writer(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    (tmp_path / ".other.lock").mkdir()
    with pytest.raises(OSError, match=r"\.other\.lock"), one_writer(tmp_path / "other"):
        pytest.fail("the block ran")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writer_lock.fcntl, "flock", refuse)
    with one_writer(tmp_path / "out") as is_held:
        assert not is_held
    assert "no file locks here (No locks available)" in caplog.text
