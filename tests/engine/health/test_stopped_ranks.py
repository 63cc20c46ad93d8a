"""Stopped ranks: the very process is killed where it is stopped, and no other one ever."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from glm_rlhf.engine.health.stopped_ranks import RankProcess, kill_stopped, rank_processes


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def state(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def stop(process: subprocess.Popen) -> RankProcess:
    start_ticks = int(state(process.pid)[19])
    process.send_signal(signal.SIGSTOP)
    while state(process.pid)[0] != "T":
        time.sleep(0.01)
    return RankProcess(rank=3, pid=process.pid, host="here", start_ticks=start_ticks)


def test_a_stopped_rank_is_killed_and_named(child):
    assert kill_stopped([stop(child)]) == [3]
    assert child.wait(timeout=60) == -signal.SIGKILL
    assert kill_stopped([RankProcess(rank=3, pid=child.pid, host="here", start_ticks=1)]) == []


def test_another_process_of_its_number_and_one_that_runs_are_left(child):
    stopped = stop(child)
    assert kill_stopped([replace(stopped, start_ticks=stopped.start_ticks - 1)]) == []
    child.send_signal(signal.SIGCONT)
    while state(child.pid)[0] == "T":
        time.sleep(0.01)
    assert kill_stopped([stopped]) == []
    assert child.poll() is None


def ranks_here() -> tuple[int, tuple[RankProcess, ...]]:
    return os.getpid(), rank_processes()


def test_every_rank_of_a_machine_is_known(ranks):
    answers = ranks.run(ranks_here)
    assert [[one.pid for one in found] for _, found in answers] == [[pid for pid, _ in answers]] * 4
    assert [one.rank for one in answers[0][1]] == [0, 1, 2, 3]


def test_without_ranks_there_is_nobody():
    assert rank_processes() == ()
