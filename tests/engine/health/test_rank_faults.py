"""Failures of one rank of a PPO run: the others end soon and report where, or all save and exit together."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from faulty_run import Fault, launch, run_with_fault
from machine_load import slowdown
from safetensors.torch import load_file
from tiny_models import make_model, save_folder
from tiny_ppo_line import ppo_line
from warm_launches import WarmLaunches

from glm_rlhf.engine.cli import main

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ppo")
    return ppo_line(save_folder(folder / "model", "glm", make_model("glm")), folder)


@pytest.fixture(scope="module")
def warm_launch():
    with WarmLaunches() as launches:
        yield launches


def test_a_killed_rank_ends_the_run_and_is_named(line, tmp_path):
    fault = Fault(kind="kill", phase="update", rank=1)
    code, said, seconds = launch(fault, [*line, f"run.output={tmp_path}"], timeout_s=300)
    assert code != 0
    assert seconds < DEADLINE_S * slowdown(), said
    assert re.search(r"rank\s*: 1 ", said), said  # torchrun's summary
    assert "Signal 9 (SIGKILL) received" in said
    # The remaining rank reports the phase in which it lost the other one.
    assert re.search(r"\[rank 0\] glm-rlhf ppo: failed in phase iteration/update", said), said


def test_a_rank_that_skips_a_collective_is_found(warm_launch, line, tmp_path):
    options = [f"run.output={tmp_path}", "run.watchdog_s=5"]
    fault = Fault(kind="hang", phase="values", rank=1)
    code, said, seconds = warm_launch(fault, [*line, *options], timeout_s=300)
    assert code != 0
    assert seconds < 5 + 10 * slowdown(), said
    found = re.findall(r"\[rank (\d)\] hung for (\d+) s in phase (\S+): (.*)", said)
    assert found, said
    for rank, _, phase, where in found:
        assert phase.startswith("iteration/experience/values") or rank == "0"
        assert where.startswith("in no collective, at " if rank == "1" else "in the collective ")
    assert "most recent call first" in said  # the stacks


def test_a_restarted_run_resumes_to_the_same_bits(warm_launch, line, tmp_path):
    code, *_ = warm_launch(Fault(), [*line, f"run.output={tmp_path / 'wanted'}"], timeout_s=300)
    assert code == 0
    arguments = [*line, f"run.output={tmp_path / 'found'}", "train.save_every=1", "train.async_save=false"]
    fault = Fault(kind="kill", phase="policy", rank=1)
    code, said, _ = warm_launch(fault, arguments, timeout_s=300, num_restarts=1)
    assert code == 0, said
    assert said.count("the run resumes from") == 1
    wanted, found = (final_weights(tmp_path / name) for name in ("wanted", "found"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "hf" / "step_3").glob("*.safetensors")
    return load_file(file)


def leave_while_rewards_are_awaited(line: list[str], file: str) -> tuple[int, float, int]:
    """Return the exit code, the seconds from the signal to the end, and the exit code of the resumed run."""
    rank = torch.distributed.get_rank()
    start = time.monotonic()
    code = run_with_fault(Fault(kind="SIGTERM", phase="reward", rank=2), line, rank)
    seconds = time.monotonic() - start
    assert not Path(file).exists()
    torch.distributed.barrier()
    Path(file).touch()
    return code, seconds, main(line)


def test_a_signal_while_rewards_are_awaited_saves_at_once_and_the_run_resumes_to_the_same_bits(
    ranks, line, untouched, tmp_path
):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "may_answer"
    records = [
        {"prompt_tokens": [3 + n, 4], "wait_for": str(file)} for n in range(8)
    ]  # the prompts of `line`
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["parallel.tp=2", f"run.output={tmp_path / 'run'}", f"data.path={prompts}"]
    arguments = [*line, *options, "reward.function=reward_rules:waits_for_a_file"]
    results = ranks.run(leave_while_rewards_are_awaited, arguments, str(file))
    assert [(first, second) for first, _, second in results] == [(0, 0)] * 4
    assert max(seconds for _, seconds, _ in results) < 120.0  # the function would wait for ever
    assert (tmp_path / "run" / "checkpoints" / "step_1").exists()
    metrics = [json.loads(text)["step"] for text in (tmp_path / "run" / "metrics.jsonl").open()]
    assert metrics == [1, 2, 3]
    found = final_weights(tmp_path / "run")
    assert all(torch.equal(found[name], untouched[name]) for name in found)


def leave_and_resume(kind: str, phase: str, line: list[str]) -> tuple[int, int]:
    rank = torch.distributed.get_rank()
    return run_with_fault(Fault(kind=kind, phase=phase, rank=2), line, rank), main(line)


@pytest.fixture(scope="module")
def untouched(ranks, line, tmp_path_factory):
    output = tmp_path_factory.mktemp("untouched")
    assert ranks.run(main, [*line, "parallel.tp=2", f"run.output={output}"]) == [0] * 4
    return final_weights(output)


@pytest.mark.parametrize(
    "kind, phase, step",
    [("SIGTERM", "generate", 1), pytest.param("SIGUSR1", "critic", 2, marks=pytest.mark.slow)],
)
def test_all_ranks_save_and_exit_and_the_run_resumes_to_the_same_bits(
    ranks, line, untouched, tmp_path, kind, phase, step
):
    arguments = [*line, "parallel.tp=2", f"run.output={tmp_path}"]
    assert ranks.run(leave_and_resume, kind, phase, arguments) == [(0, 0)] * 4
    assert (tmp_path / "checkpoints" / f"step_{step}").exists()
    metrics = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").open()]
    assert metrics == [1, 2, 3]
    found = final_weights(tmp_path)
    assert found.keys() == untouched.keys()
    assert all(torch.equal(found[name], untouched[name]) for name in found)
