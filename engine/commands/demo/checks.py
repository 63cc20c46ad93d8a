"""Whether the policy of `demo` answers alike elsewhere: in other layouts, and in transformers."""

import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_rlhf.engine.commands import convert
from glm_rlhf.engine.commands.demo.training import MAX_NEW_TOKENS, read_lines, write_lines
from glm_rlhf.engine.config.sections import ModelSection, RunFolderSection
from glm_rlhf.engine.config.tools import ConvertConfig, ConvertSection
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

MAX_LOGPROB_GAP = 1e-4
"""Largest distance of an answer's logprobs between two layouts, in nats, in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCheck:
    """Greedy answers given once more elsewhere."""

    name: str
    """Where."""
    num_asked: int
    """Prompts."""
    num_same: int
    """Answers that are the same token by token."""
    logprob_gap: float | None
    """Largest distance of two logprobs of a token, in nats; None where they are not compared."""

    @property
    def is_alike(self) -> bool:
        """Whether every answer is the same, and its logprobs up to rounding."""
        return self.num_same == self.num_asked and (self.logprob_gap or 0.0) <= MAX_LOGPROB_GAP


LAYOUTS = {
    "tp 2, sequence parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp 3": (3, ("parallel.pp=3",)),
}
"""Layouts by their names: how many ranks they take, and the settings that ask for them."""


def check_layout(name: str, folder: Path, model: Path, lines: Sequence[dict]) -> DemoCheck:
    """Return how `generate` answers in one of `LAYOUTS`, as torchrun launches it.

    Args:
        name: of the layout.
        folder: of the run.
        model: Hugging Face folder of the policy.
        lines: what `generate` wrote greedily on one rank.

    Raises:
        RuntimeError: the launch failed; the message has the end of what it said.
    """
    num_ranks, settings = LAYOUTS[name]
    slug = name.replace(", ", "_").replace(" ", "_")
    asked, out = folder / "data" / "layout_prompts.jsonl", folder / "answers" / f"ppo_{slug}.jsonl"
    write_lines(asked, ({"prompt_tokens": line["prompt_tokens"]} for line in lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += ["-m", "glm_rlhf.engine", "generate", f"model.path={model}", f"data.path={asked}"]
    command += [f"data.out={out}", f"run.output={folder / 'layouts' / slug}", "train.dtype=fp32"]
    command += ["generation.temperature=0", f"generation.max_new_tokens={MAX_NEW_TOKENS}", *settings]
    done = subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"generate in the layout {name} failed: {done.stderr[-2000:]}")
    found = read_lines(out)
    gaps = [
        abs(x - y)
        for a, b in zip(lines, found, strict=True)
        for x, y in zip(a["logprobs"], b["logprobs"], strict=False)
    ]
    return DemoCheck(
        name=name,
        num_asked=len(lines),
        num_same=sum(a["tokens"] == b["tokens"] for a, b in zip(lines, found, strict=True)),
        logprob_gap=max(gaps),
    )


def export_for_transformers(folder: Path, model: Path) -> Path:
    """Return a folder with the policy in the form that transformers has a class for, `GlmForCausalLM`."""
    target = folder / "hf"
    convert.run(
        ConvertConfig(
            run=RunFolderSection(name="convert", output=str(folder / "convert")),
            model=ModelSection(path=str(model)),
            convert=ConvertSection(to=str(target), format="glm"),
        )
    )
    return target


def check_transformers(exported: Path, lines: Sequence[dict]) -> DemoCheck | None:
    """Return how transformers' own model answers greedily; None where transformers is not installed.

    Args:
        exported: the folder of `export_for_transformers`.
        lines: what `generate` wrote greedily on one rank.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM  # slow to import, and optional

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = load_tokenizer(exported)
    masked = tokenizer.unsampleable_ids(model.config.vocab_size).nonzero()[:, 0].tolist()
    by_length: dict[int, list[dict]] = defaultdict(list)
    for line in lines:
        by_length[len(line["prompt_tokens"])].append(line)  # prompts of one length need no padding
    num_same = 0
    for length, of_length in by_length.items():
        prompts_BT = torch.tensor([line["prompt_tokens"] for line in of_length])
        answers = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
            suppress_tokens=masked,
        )
        for line, answer in zip(of_length, answers.tolist(), strict=True):
            num_same += answer[length : length + len(line["tokens"])] == line["tokens"]
    return DemoCheck(name="transformers", num_asked=len(lines), num_same=num_same, logprob_gap=None)
