"""What a checkpoint costs a run: time that training waits, restore time and bytes, against `torch.save`.

python -m benchmarks.io.checkpoint

A model of 100 M parameters in training on one rank (fp32 weights, Adam's two averages). Each round saves the
same state with `torch.save`, synchronously, and asynchronously while a training step runs; then loads it.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import RESULTS
from glm_rlhf.engine.bench.machine import description
from glm_rlhf.parallel.checkpoint.restore import checkpoint_at, restore
from glm_rlhf.parallel.checkpoint.save import CheckpointWriter
from glm_rlhf.parallel.checkpoint.shards import stored_tensors
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.model.token_outputs import next_tokens, token_logprobs
from glm_rlhf.parallel.optim.training_state import AdamSettings, TrainingState
from glm_rlhf.parallel.pipeline.schedule import run_micro_batches
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.load import randomize_weights

LIMIT = 0.10
"""An asynchronous save may block this share of what `torch.save` takes."""


def glm_of(num_layers: int) -> GLMConfig:
    """Return the shape: 9 layers have 104 M parameters."""
    return GLMConfig(
        family="glm",
        num_layers=num_layers,
        hidden_size=768,
        num_heads=12,
        num_kv_heads=2,
        head_size=64,
        ffn_size=2048,
        vocab_size=32000,
        norm_epsilon=1e-5,
        rope_theta=1e4,
    )


class Trained:
    """A model in training on this rank, and its step."""

    def __init__(self, num_layers: int, num_tokens: int, topology) -> None:
        self.topology = topology
        chunks = build_model(glm_of(num_layers), topology, dtype=torch.float32)
        randomize_weights(chunks, seed=1)
        self.state = TrainingState(chunks, AdamSettings(lr=1e-4), topology=topology)
        generator = torch.Generator().manual_seed(2)
        tokens_T = torch.randint(0, chunks[0].glm.vocab_size, (num_tokens,), generator=generator)
        self.batch = pack([tokens_T], multiple=1)

    def step(self) -> None:
        """Take one training step."""

        def loss(model, hidden_TD, _index):
            logprobs_T, _ = token_logprobs(model, hidden_TD, next_tokens(self.batch))
            total = -logprobs_T.mean()
            return total, total.detach()

        self.state.zero_grad()
        run_micro_batches(self.state.chunks, [self.batch], loss, topology=self.topology, forward_only=False)
        assert self.state.step().is_applied


def timed(work) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def round_of(run: Trained, folder: Path, writer: CheckpointWriter, number: int) -> dict[str, float]:
    """Return the seconds of each task, measured once, one after the other."""
    models, state, seconds = {"policy": run.state}, run.state, {}
    tensors, _ = stored_tensors("policy", state)
    path = folder / "peer.pt"
    seconds["torch.save"] = timed(lambda: torch.save(tensors, path))
    seconds["torch.load"] = timed(lambda: torch.load(path, weights_only=True))
    path.unlink()
    with CheckpointWriter(folder / "sync", topology=run.topology, keep_last=1, is_async=False) as synchronous:
        seconds["save, synchronous: blocks"] = timed(lambda: synchronous.save(number, models, state={}))
    seconds["training step alone"] = timed(run.step)
    waits: list[float] = []
    start = time.perf_counter()
    seconds["save, asynchronous: call"] = timed(lambda: writer.save(number, models, state={}))
    wait = state.wait_for_readers
    state.wait_for_readers = lambda: waits.append(timed(wait))
    seconds["training step beside the save"] = timed(run.step)
    (seconds["save, asynchronous: wait before the update"],) = waits
    writer.finish()
    seconds["save, asynchronous: until it is on the disk"] = time.perf_counter() - start
    seconds["save, asynchronous: blocks"] = seconds["save, asynchronous: call"] + waits[0]
    found = folder / "async" / f"step_{number}"

    def load() -> None:
        restore(state, checkpoint_at(found, topology=run.topology), "policy")

    seconds["restore, checksums compared"] = timed(load)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and return the exit status: 1 where the limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="9 have 104 M parameters")
    parser.add_argument("--tokens", type=int, default=512, help="of a training step")
    parser.add_argument("--rounds", type=int, default=3, help="of all tasks in turn")
    parser.add_argument("--folder", type=Path, help="where files go; default the one for temporary files")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_cpu", help="without its suffix")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        with open_topology(Layout()) as topology:
            run = Trained(options.layers, options.tokens, topology)
            run.step()
            with CheckpointWriter(folder / "async", topology=topology, keep_last=1) as writer:
                round_of(run, folder, writer, 0)  # memory and files are touched for the first time
                rounds = [round_of(run, folder, writer, 1 + i) for i in range(options.rounds)]
        num_parameters = sum(p.numel() for chunk in run.state.bare_chunks for p in chunk.parameters())
        num_bytes = sum(path.stat().st_size for path in (folder / "async").rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    share = median(one["save, asynchronous: blocks"] / one["torch.save"] for one in rounds)
    report = {
        "machine": description(torch.device("cpu")),
        "num_parameters": num_parameters,
        "tokens_of_a_step": options.tokens,
        "bytes_per_parameter": num_bytes / num_parameters,
        "seconds": {name: [one[name] for one in rounds] for name in rounds[0]},
        "asynchronous_blocks_share_of_torch_save": share,
        "limit": LIMIT,
    }
    write(report, options.out)
    return int(share > LIMIT)


def write(report: dict, stem: Path) -> None:
    """Write the report as JSON and as Markdown, and print the latter."""
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    reference = median(report["seconds"]["torch.save"])
    lines = [
        "# Checkpoints: time that training waits, restore time, bytes",
        "",
        *(f"- {name}: {value}" for name, value in report["machine"].items()),
        f"- {report['num_parameters'] / 1e6:.1f} M parameters, fp32, Adam; one rank; a step has "
        f"{report['tokens_of_a_step']} tokens",
        f"- {report['bytes_per_parameter']:.2f} bytes a parameter on disk (fp32 weight and two averages: 12)",
        "- `torch.save` writes the same tensors to one file and does not sync it; ours are hashed (SHA-256) "
        "and synced",
        "",
        "| task | median s | all rounds s | share of torch.save |",
        "|---|---|---|---|",
    ]
    for name, values in report["seconds"].items():
        rounds = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {median(values):.3f} | {rounds} | {median(values) / reference:.2f} |")
    share, limit = report["asynchronous_blocks_share_of_torch_save"], report["limit"]
    verdict = "kept" if share <= limit else "not kept"
    lines += [
        "",
        f"An asynchronous save blocks {share:.1%} of what `torch.save` takes (median of the rounds' ratios); "
        f"promised: at most {limit:.0%}, {verdict}. What it blocks is the call, and the wait before the next "
        "update until the copy to host memory is done; the rest runs beside training and slows a step on a "
        "busy CPU, see the two steps above.",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
