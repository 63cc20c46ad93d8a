"""Orphans: a rank asks itself to save when its torchrun has been killed, and is ended if it does not."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from machine_load import slowdown

from glm_rlhf.parallel.runtime import orphans

RANK = """
    import pathlib, signal, sys, time
    from glm_rlhf.parallel.runtime import orphans
    saves, folder = sys.argv[1] == "saves", pathlib.Path(sys.argv[2])
    requests = []
    signal.signal(signal.SIGTERM, lambda *_: requests.append(0))
    orphans.POLL_S = 0.1
    orphans.end_orphan.__kwdefaults__.update(poll_s=0.1, grace_s=600.0 if saves else 0.5)
    orphans.watch_launcher()
    orphans.watch_launcher()
    (folder / "runs").touch()
    while not (requests and saves):
        time.sleep(0.02)
    (folder / "saved").touch()
"""
LAUNCHER = """
    import os, subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env={**os.environ, "TORCHELASTIC_RUN_ID": "1"})
    time.sleep(600)
"""


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 60 * slowdown()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _kill_the_launcher(kind: str, folder: Path) -> str:
    """Return what a rank says whose launcher is killed while it runs."""
    with (folder / "said").open("w") as said:
        program = [sys.executable, "-c", textwrap.dedent(LAUNCHER), textwrap.dedent(RANK), kind, str(folder)]
        launcher = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL)
    _wait_until((folder / "runs").exists)
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.read() == b""  # at its end: the rank, which holds the pipe too, has ended
    launcher.stdout.close()
    return (folder / "said").read_text()


def test_an_orphan_saves_and_ends(tmp_path):
    said = _kill_the_launcher("saves", tmp_path)
    assert said == "[rank 0] torchrun has ended without its ranks: this one saves if it can, and exits\n"
    assert (tmp_path / "saved").exists()


def test_an_orphan_that_cannot_save_is_ended(tmp_path):
    said = _kill_the_launcher("hangs", tmp_path)
    assert "still running 0.5 s after torchrun has ended: it exits without a save" in said
    assert not (tmp_path / "saved").exists()


def test_an_orphan_has_ended_after_a_minute():
    assert orphans.POLL_S + orphans.GRACE_S < 60


def test_without_torchrun_nobody_watches(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(orphans, "_watched_pid", None)
    orphans.watch_launcher()
    assert orphans._watched_pid is None
    assert os.getppid() > 0
