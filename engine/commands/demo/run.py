"""The command `demo`: a tiny ChatGLM3 is aligned from the first step to the last, in minutes on a CPU.

Demonstrations of mixed quality teach it sums and a mistake; preferences between its own answers make a reward
model; PPO follows that model alone. Then held-out prompts show what came of it. Nothing is made for the
demo: each stage is the command of its name, and its config lies in its folder, to be run again.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from glm_rlhf.engine.commands.demo.checks import (
    LAYOUTS,
    DemoCheck,
    check_layout,
    check_transformers,
    export_for_transformers,
)
from glm_rlhf.engine.commands.demo.measure import HeldOutAnswers, Results, answer_held_out, compare
from glm_rlhf.engine.commands.demo.report import (
    RESULTS_NAME,
    RewardFacts,
    figure_rows,
    write_page,
    write_results,
)
from glm_rlhf.engine.commands.demo.toy_task import TaskSet, toy_tasks
from glm_rlhf.engine.commands.demo.training import ask, pairs_of, train_ppo, train_reward, train_sft
from glm_rlhf.engine.config.load import save_config
from glm_rlhf.engine.config.tools import DemoConfig
from glm_rlhf.engine.observe.timer import Timer
from glm_rlhf.parallel.runtime.launch import read_launch
from glm_rlhf.parallel.storage.durable_io import replace_text
from glm_rlhf.parallel.storage.writer_lock import one_writer

_FOLDERS = ("model", "data", "answers", "sft", "reward", "ppo", "convert", "hf", "layouts")
_NUM_THREADS = 2  # more only wait for each other: no matrix here has a thousand rows and columns
_NUM_CHECKED = 32


def run(config: DemoConfig) -> int:
    """Return 0 when the policy answers alike everywhere, 1 when it does not; one process calls it.

    Raises:
        ValueError: a launch of several processes, or a run folder that another command has used.
    """
    if read_launch().world_size > 1:
        raise ValueError("demo is one process, which launches others itself: start it without torchrun")
    folder = Path(config.run.output)
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder, is_inside=True):
        return _run(config, _claim(folder))


def _run(config: DemoConfig, folder: Path) -> int:
    save_config(config, folder)
    clock = Timer()
    with _threads(_NUM_THREADS):
        tasks = toy_tasks(num_held_out=config.demo.num_held_out, seed=config.run.seed)
        _say(
            f"1. SFT: a tiny ChatGLM3 imitates {len(tasks.sums)} sums, many of them careless, and "
            f"{len(tasks.canaries)} numbers said backwards"
        )
        sft = train_sft(config, tasks)
        clock.split("sft")
        before = answer_held_out(config, tasks, sft, name="sft")
        clock.split("measure")
        _say("2. preference pairs from its own answers, right above wrong")
        asked = tasks.sums[: config.demo.num_pair_prompts]
        pairs = pairs_of(asked, ask(config, sft, asked, name="sft_pairs", temperature=1.0))
        held_out_pairs = pairs_of(tasks.held_out_sums, before.sampled_sums)
        clock.split("pairs")
        _say(f"3. a reward model learns {len(pairs)} pairs")
        reward, pair_accuracy = train_reward(config, sft, pairs, held_out_pairs)
        facts = RewardFacts(
            num_pairs=len(pairs), num_held_out_pairs=len(held_out_pairs), pair_accuracy=pair_accuracy
        )
        clock.split("reward")
        _say(
            f"   it orders {pair_accuracy:.0%} of {len(held_out_pairs)} held-out pairs rightly\n"
            f"4. PPO for {config.demo.ppo_steps} iterations; the reward is the reward model alone"
        )
        ppo = train_ppo(config, tasks, sft, reward)
        clock.split("ppo")
        _say("5. held-out prompts, before and after")
        after = answer_held_out(config, tasks, ppo, name="ppo")
        results = compare(config, tasks, sft, before, after)
        clock.split("measure")
        _show(tasks, before, after, results)
        _say("6. the policy after PPO elsewhere")
        checks = _check(config, folder, ppo, after)
        clock.split("checks")
    page = write_page(
        folder, tasks=tasks, before=before, after=after, reward=facts, results=results, checks=checks
    )
    figures = write_results(
        folder,
        seed=config.run.seed,
        reward=facts,
        results=results,
        checks=checks,
        timing_s=clock.splits | {"all": clock.total_s},
    )
    _say(f"{clock.total_s:.0f} s; report: {page}; figures: {figures}; the policy: {folder / 'hf'}")
    return 0 if all(check.is_alike for check in checks) else 1


def _claim(folder: Path) -> Path:
    """Return the run folder without what an earlier demo left there.

    Raises:
        ValueError: it has folders of these names that are no demo's.
    """
    mine = folder / RESULTS_NAME
    taken = [name for name in _FOLDERS if (folder / name).exists()]
    if taken and not mine.exists():
        raise ValueError(
            f"{folder} holds {', '.join(taken)} which no demo made: give run.output another folder"
        )
    replace_text(mine, "{}\n")  # so that what a broken run leaves is known as a demo's
    for name in taken:
        shutil.rmtree(folder / name)
    return folder


def _check(config: DemoConfig, folder: Path, policy: Path, answers: HeldOutAnswers) -> list[DemoCheck]:
    """Return the checks that can be made here, each printed as soon as it is made."""
    lines = [line for (line,) in answers.greedy_sums[:_NUM_CHECKED]]
    checks = []
    found = check_transformers(export_for_transformers(folder, policy), lines)
    if found is None:
        _say("   transformers is not installed: the export was not loaded")
    else:
        checks.append(found)
        _say(f"   transformers: {found.num_same} of {found.num_asked} greedy answers the same")
    for name, (num_ranks, _) in LAYOUTS.items() if config.demo.checks_layouts else ():
        if torch.cuda.is_available() and torch.cuda.device_count() < num_ranks:
            _say(f"   {name}: not checked, it takes {num_ranks} CUDA devices")
            continue
        check = check_layout(name, folder, policy, lines)
        checks.append(check)
        _say(
            f"   {name}: {check.num_same} of {check.num_asked} greedy answers the same, logprobs differ by "
            f"{check.logprob_gap:.1e}"
        )
    return checks


def _show(tasks: TaskSet, before: HeldOutAnswers, after: HeldOutAnswers, results: Results) -> None:
    for task, (old,), (new,) in list(
        zip(tasks.held_out_sums, before.greedy_sums, after.greedy_sums, strict=True)
    )[:8]:
        _say(f"   {task.prompt:<24} {old['text'].strip():>4} → {new['text'].strip():<4} ({task.answer})")
    for name, sft, ppo in [("", "SFT", "PPO"), *figure_rows(results)]:
        _say(f"   {name:<30}  {sft:<24}{ppo}")
    _say("   a clear win" if results.is_clear_win else "   NO CLEAR WIN")


@contextlib.contextmanager
def _threads(most: int) -> Iterator[None]:
    """Return, as a context manager, torch with at most so many threads."""
    former = torch.get_num_threads()
    torch.set_num_threads(min(most, former))
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
