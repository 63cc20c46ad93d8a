"""A tiny random ChatGLM3 with its data, sums in words, wrong and right, for the configs in this folder.

python examples/tiny/make_tiny.py [folder, by default outputs/tiny]
"""

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_rlhf.engine.commands.demo.toy_tokenizer import NUM_IDS, write_tiny_tokenizer
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import randomize_weights

_WORDINGS = (
    "{a}加{b}等于多少？",
    "请问{a}+{b}=？",
    "What is {a} plus {b}?",
    "{a} + {b} =",
)
SEED = 1234
LARGEST = 29
"""Numbers that are added go up to it: few enough that a model this small learns them in a minute."""
NUM_HELD_OUT = 100
SHAPE = GLMConfig(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticTask:
    """One sum."""

    prompt: str
    """The question, in one of four wordings."""
    answer: str
    """The sum in digits, and nothing else."""


def make_tiny(folder: Path) -> None:
    """Write `model/`, `sft.jsonl`, `pairs.jsonl`, their `eval_*.jsonl`, and `prompts.jsonl` into a folder.

    Raises:
        ValueError: the folder holds a model already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_topology(Layout(), seed=SEED) as topology:
        chunks = build_model(SHAPE, topology, dtype=torch.float32)
        randomize_weights(chunks, seed=SEED)
        export_model(chunks, folder / "model", topology=topology)
    write_tiny_tokenizer(folder / "model")
    learned, held_out = arithmetic_tasks(num_held_out=NUM_HELD_OUT, seed=SEED, largest=LARGEST)
    for prefix, tasks in (("", learned), ("eval_", held_out)):
        _write(folder / f"{prefix}sft.jsonl", ({"prompt": t.prompt, "response": t.answer} for t in tasks))
        _write(folder / f"{prefix}pairs.jsonl", _pairs(tasks))
    _write(folder / "prompts.jsonl", ({"prompt": task.prompt} for task in learned[:512]))


def arithmetic_tasks(
    *, num_held_out: int, seed: int, largest: int = 99
) -> tuple[list[ArithmeticTask], list[ArithmeticTask]]:
    """Return (tasks to learn from, held-out tasks) over all pairs of numbers from 0 to `largest`.

    A pair of numbers is in one of the two sets in all its wordings, so a held-out sum was never seen. Both
    are in random order; the first has every pair in every wording, the second one wording a pair.

    Raises:
        ValueError: more tasks are to be held out than half of the pairs.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    if not 0 <= num_held_out <= len(pairs) // 2:
        raise ValueError(
            f"num_held_out is {num_held_out}, of {len(pairs)} pairs at most half can be held out"
        )
    generator = random.Random(seed)
    generator.shuffle(pairs)
    held_out = [_task(a, b, generator.choice(_WORDINGS)) for a, b in pairs[:num_held_out]]
    learned = [_task(a, b, wording) for a, b in pairs[num_held_out:] for wording in _WORDINGS]
    generator.shuffle(learned)
    return learned, held_out


def _task(a: int, b: int, wording: str) -> ArithmeticTask:
    return ArithmeticTask(prompt=wording.format(a=a, b=b), answer=str(a + b))


def _pairs(tasks: Iterable[ArithmeticTask]) -> Iterable[dict]:
    """Yield the right sum preferred to any other."""
    generator = random.Random(SEED)
    for task in tasks:
        wrong = str(generator.randrange(2 * LARGEST + 1))
        if wrong != task.answer:
            yield {"prompt": task.prompt, "chosen": task.answer, "rejected": wrong}


def _write(path: Path, records: Iterable[dict]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/tiny")
    make_tiny(target)
    print(f"wrote {target}")
