"""Training commands in several layouts, and comparison of the metrics that they write."""

import contextlib
import io
import json
import math
from pathlib import Path

import torch

from glm_rlhf.engine.cli import main

LAYOUTS = {
    "tp2 pp2": "parallel.tp=2 parallel.pp=2",
    "tp2 sp dp2": "parallel.tp=2 parallel.sequence_parallel=true",
    "pp2 vpp2 dp2": "parallel.pp=2 parallel.vpp=2",
    "cp2 dp2": "parallel.cp=2",
}
"""Over four ranks; the other ranks are data parallel."""


def token_ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    """Between `low` and `high` random ids of the tiny models."""
    length = int(torch.randint(low, high + 1, (1,), generator=generator))
    return torch.randint(3, 96, (length,), generator=generator).tolist()


def write_demonstrations(path: Path, count: int, seed: int = 0) -> Path:
    """Write random demonstrations as ids; answers have from 1 to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return write_lines(
        path,
        [
            {"prompt_tokens": token_ids(generator, 1, 12), "response_tokens": token_ids(generator, 1, 20)}
            for _ in range(count)
        ],
    )


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Write random pairs as ids; the chosen answer has more even ids, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        chosen, rejected = token_ids(generator, 1, 16), token_ids(generator, 1, 16)
        records.append(
            {
                "prompt_tokens": token_ids(generator, 1, 10),
                "chosen_tokens": [token - token % 2 for token in chosen],
                "rejected_tokens": [token - token % 2 + 1 for token in rejected],
            }
        )
    return write_lines(path, records)


def write_lines(path: Path, records: list[dict]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_main(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and its last line of output."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue().splitlines()[-1] if said.getvalue() else ""


def metrics_of(output: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def curve(output: Path, name: str) -> list[float]:
    """One number of every step that has it."""
    return [line[name] for line in metrics_of(output) if name in line]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """The largest difference of two curves, relative to the expected value."""
    assert len(found) == len(expected)
    assert all(map(math.isfinite, found + expected))
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, expected, strict=True))
