"""The command `demo`: a tiny ChatGLM3, made and asked on this machine, answers alike in every layout.

It trains a model of half a million weights on sums in Chinese and English, writes it in ChatGLM3's form,
imports it in several layouts, and shows that they answer and score alike.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from glm_rlhf.engine.config import DemoConfig
from glm_rlhf.engine.data.arithmetic import ArithmeticTask, arithmetic_tasks
from glm_rlhf.engine.data.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tiny_tokenizer import NUM_IDS, write_tiny_tokenizer
from glm_rlhf.engine.data.tokenizer import load_tokenizer
from glm_rlhf.parallel.export import export_model
from glm_rlhf.parallel.glm import GLMModel, build_model
from glm_rlhf.parallel.glm_config import GLMConfig
from glm_rlhf.parallel.heads import next_tokens
from glm_rlhf.parallel.layout import Layout
from glm_rlhf.parallel.optimizer import AdamSettings, TrainingState
from glm_rlhf.parallel.packing import PackedTokens, pack
from glm_rlhf.parallel.schedule import run_micro_batches
from glm_rlhf.parallel.topology import Topology, topology
from glm_rlhf.parallel.vocab_loss import linear_nll_loss
from glm_rlhf.parallel.weights import randomize_weights

_BATCH_TASKS = 128
_PEAK_LR = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoLayout:
    """One way to lay the tiny model out."""

    name: str
    """What it is called in the table."""
    num_ranks: int
    """Processes, each a rank."""
    overrides: tuple[str, ...]
    """Settings of the commands."""


LAYOUTS = (
    DemoLayout(name="one rank", num_ranks=1, overrides=()),
    DemoLayout(
        name="tp 2, sequence parallel",
        num_ranks=2,
        overrides=("parallel.tp=2", "parallel.sequence_parallel=true"),
    ),
    DemoLayout(name="pp 2", num_ranks=2, overrides=("parallel.pp=2",)),
)


def run(config: DemoConfig) -> int:
    """Return 0 when all layouts agree, 1 when they do not; one process calls it."""
    folder = Path(config.run.output)
    learned, held_out = arithmetic_tasks(num_held_out=config.demo.num_prompts, seed=config.run.seed)
    tokenizer = load_tokenizer(write_tiny_tokenizer(folder / "tokenizer"))
    model = folder / "model"
    _say(f"1. a tiny GLM learns sums for {config.demo.num_steps} steps")
    _make_model(model, tokenizer, learned, config)
    _write_prompts(folder / "prompts.jsonl", held_out)
    _say(f"2. the model, in ChatGLM3's form in {model}, answers {len(held_out)} sums it never saw")
    answers = {layout.name: _answers(folder, model, layout) for layout in LAYOUTS}
    first = answers[LAYOUTS[0].name]
    _write_demonstrations(folder / "answers.jsonl", first)
    scores = {layout.name: _scores(folder, model, layout) for layout in LAYOUTS}
    return _report(held_out, answers, scores)


def _make_model(
    target: Path, tokenizer: Tokenizer, learned: list[ArithmeticTask], config: DemoConfig
) -> None:
    glm = GLMConfig(
        family="chatglm",
        num_layers=4,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        ffn_size=256,
        vocab_size=NUM_IDS + 64,  # like the real one, more rows than ids
        norm_epsilon=1e-5,
        rope_theta=10000.0,
        max_positions=256,
        init_std=0.05,
    )
    with topology(Layout(), seed=config.run.seed) as place:
        chunks = build_model(glm, place, dtype=torch.float32)
        randomize_weights(chunks, seed=config.run.seed)
        _train(chunks, _batches(tokenizer, learned), config.demo.num_steps, place)
        export_model(chunks, target, topology=place)
    for file in (target.parent / "tokenizer").iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def _train(
    chunks: list[GLMModel],
    batches: Iterator[tuple[PackedTokens, torch.Tensor]],
    num_steps: int,
    place: Topology,
) -> None:
    """Lower the mean loss of the answers' tokens by Adam, the learning rate falling to zero."""
    state = TrainingState(chunks, AdamSettings(lr=_PEAK_LR), topology=place)
    bar = tqdm(range(num_steps), desc="train", unit=" steps")
    for step in bar:
        packed, is_answer_T = next(batches)
        loss_of = partial(_next_token_loss, next_tokens(packed, is_answer_T), int(is_answer_T.sum()))
        state.zero_grad()
        (loss,) = run_micro_batches(state.chunks, [packed], loss_of, topology=place, forward_only=False)
        state.set_lr(_PEAK_LR * min(1.0, (step + 1) / 20) * (1 - step / num_steps))
        state.step()
        bar.set_postfix(loss=f"{loss:.3f}")


def _next_token_loss(
    targets_T: torch.Tensor, num_targets: int, model: GLMModel, hidden_TD: torch.Tensor, _index: int
) -> tuple[torch.Tensor, float]:
    group = model.topology.tp_group
    loss, _ = linear_nll_loss(
        hidden_TD, model.output_weight_VD, targets_T, group=group, denominator=num_targets
    )
    return loss, loss.item()


def _batches(
    tokenizer: Tokenizer, learned: list[ArithmeticTask]
) -> Iterator[tuple[PackedTokens, torch.Tensor]]:
    """Yield packed batches and which of their tokens are answers, over and over."""
    while True:
        for start in range(0, len(learned) - _BATCH_TASKS, _BATCH_TASKS):
            pairs = [
                tokenizer.render_prompt_response([Message(role="user", content=task.prompt)], task.answer)
                for task in learned[start : start + _BATCH_TASKS]
            ]
            packed = pack([torch.tensor(prompt + response) for prompt, response in pairs])
            is_answer_T = torch.zeros(packed.num_tokens, dtype=torch.bool)
            for (prompt, _), part in zip(pairs, packed.split(is_answer_T), strict=True):
                part[len(prompt) :] = True
            yield packed, is_answer_T


def _write_prompts(path: Path, tasks: list[ArithmeticTask]) -> None:
    lines = [json.dumps({"prompt": task.prompt}, ensure_ascii=False) for task in tasks]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_demonstrations(path: Path, answers: list[dict]) -> None:
    lines = [
        json.dumps({"prompt_tokens": line["prompt_tokens"], "response_tokens": line["tokens"]})
        for line in answers
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _answers(folder: Path, model: Path, layout: DemoLayout) -> list[dict]:
    sampling = ("generation.temperature=0", "generation.max_new_tokens=8")
    return _command("generate", folder, model, folder / "prompts.jsonl", layout, sampling)


def _scores(folder: Path, model: Path, layout: DemoLayout) -> list[dict]:
    return _command("score", folder, model, folder / "answers.jsonl", layout, ())


def _command(
    name: str, folder: Path, model: Path, data: Path, layout: DemoLayout, more: tuple[str, ...]
) -> list[dict]:
    """Run a command in a layout, as a user would, and return the lines it wrote."""
    out = folder / f"{name} {layout.name}.jsonl".replace(", ", "_").replace(" ", "_")
    launcher = [sys.executable, "-m"]
    if layout.num_ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={layout.num_ranks}", "-m"]
    settings = [f"model.path={model}", f"data.path={data}", f"data.out={out}", f"run.output={folder / name}"]
    start = time.monotonic()
    subprocess.run(
        [*launcher, "glm_rlhf.engine", name, *settings, "train.dtype=fp32", *layout.overrides, *more],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL if os.environ.get("GLM_RLHF_TRACEBACK") != "1" else None,
    )
    _say(f"   {name}, {layout.name}: {time.monotonic() - start:.1f} s")
    return [json.loads(line) for line in out.open(encoding="utf-8")]


def _report(
    tasks: list[ArithmeticTask], answers: dict[str, list[dict]], scores: dict[str, list[dict]]
) -> int:
    first = answers[LAYOUTS[0].name]
    _say("3. some of the answers:")
    for task, line in list(zip(tasks, first, strict=True))[:8]:
        mark = "right" if line["text"].strip() == task.answer else f"not {task.answer}"
        _say(f"   {task.prompt:<24} {line['text'].strip():<6} {mark}")
    num_right = sum(line["text"].strip() == task.answer for task, line in zip(tasks, first, strict=True))
    _say(f"   {num_right} of {len(tasks)} right")
    _say("4. the layouts against one rank:")
    agrees = True
    for layout in LAYOUTS[1:]:
        same = [a["tokens"] == b["tokens"] for a, b in zip(first, answers[layout.name], strict=True)]
        gap = max(
            abs(x - y)
            for a, b in zip(scores[LAYOUTS[0].name], scores[layout.name], strict=True)
            for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
        )
        _say(
            f"   {layout.name:<24} {sum(same)} of {len(same)} answers the same, logprobs differ by {gap:.1e}"
        )
        agrees = agrees and all(same) and gap < 1e-4
    _say("all layouts agree" if agrees else "THE LAYOUTS DO NOT AGREE")
    return 0 if agrees else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
