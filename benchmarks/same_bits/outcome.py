"""What a run leaves, and where it differs from what another leaves."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.same_bits.names import (
    CHECKPOINTS,
    EXPORTS,
    NOT_COMPARED,
    RENAMED_METRICS,
    RENAMED_TENSORS,
    folder_in,
    renamed,
)

Number = float | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNumbers:
    """Every number that a run leaves, under the new names."""

    metrics: Mapping[str, Number]
    """By `step N metric`; None is what a run writes for a number that is not finite or not defined."""
    exports: Mapping[str, torch.Tensor]
    """Tensors of all Hugging Face folders, by `step_N/file/name`."""
    checkpoint: Mapping[str, torch.Tensor]
    """Tensors of the newest checkpoint, weights and optimizer state of each rank, by `step_N/file/name`."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by folder and name."""
        folders = {EXPORTS: self.exports, CHECKPOINTS: self.checkpoint}
        return {f"{folder}/{name}": t for folder, tensors in folders.items() for name, t in tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_outcome(run: Path) -> RunNumbers:
    """Return what a run folder holds; what is not there is empty.

    Raises:
        ValueError: two names become one under the new names.
    """
    checkpoints = {
        int(folder.name.removeprefix("step_")): folder
        for folder in folder_in(run, CHECKPOINTS).glob("step_*")
        if re.fullmatch(r"step_\d+", folder.name)
    }
    exports = [folder for folder in sorted(folder_in(run, EXPORTS).glob("*")) if folder.is_dir()]
    return RunNumbers(
        metrics=_metrics(run / "metrics.jsonl"),
        exports={name: tensor for folder in exports for name, tensor in _tensors(folder)},
        checkpoint=dict(_tensors(checkpoints[max(checkpoints)])) if checkpoints else {},
    )


def _metrics(path: Path) -> dict[str, Number]:
    if not path.exists():
        return {}
    numbers: dict[str, Number] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        step = line.pop("step")
        for name, new in renamed(line, RENAMED_METRICS).items():
            if new.startswith(NOT_COMPARED):
                continue
            if f"step {step} {new}" in numbers:
                raise ValueError(f"{path} holds {name} of step {step} twice")
            numbers[f"step {step} {new}"] = line[name]
    return numbers


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        names = renamed((f"{path.name}/{name}" for name in tensors), RENAMED_TENSORS)
        for (_, new), tensor in zip(names.items(), tensors.values(), strict=True):
            yield f"{folder.name}/{new}", tensor


def differences(before: RunNumbers, after: RunNumbers) -> list[str]:
    """Return a sentence for each difference, none where two runs left the same bits.

    A run without a metric, an export or a checkpoint differs from any other, its like included.
    """
    sentences = []
    for name, outcome in (("before", before), ("after", after)):
        for what in ("metrics", "exports", "checkpoint"):
            if not getattr(outcome, what):
                sentences.append(f"{name}: there are no {what} to compare")
    sentences += _differences(before.metrics, after.metrics, _number_difference)
    sentences += _differences(before.tensors, after.tensors, _tensor_difference)
    return sentences


def _differences(before: Mapping, after: Mapping, difference) -> Iterator[str]:
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield f"{name} is missing after"
        elif name not in before:
            yield f"{name} is missing before"
        else:
            size = difference(before[name], after[name])
            if size:
                yield f"{name}: {size}"


def _number_difference(before: Number, after: Number) -> str:
    if type(before) is type(after) and _bits(before) == _bits(after):
        return ""
    size = ""
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        size = f", by {abs(after - before):.3g}"
    return f"{before!r} → {after!r}{size}"


def _bits(number: Number) -> object:
    return struct.pack("d", number) if isinstance(number, float) else number


def _tensor_difference(before: torch.Tensor, after: torch.Tensor) -> str:
    for what in ("dtype", "shape"):
        if getattr(before, what) != getattr(after, what):
            return f"{what} {getattr(before, what)} → {getattr(after, what)}"
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (before, after)]
    is_other = (bits[0] != bits[1]).view(-1, before.element_size()).any(1)
    if not is_other.any():
        return ""
    first, second = (tensor.reshape(-1)[is_other].double() for tensor in (before, after))
    largest = (second - first).abs().max().item()
    return f"{int(is_other.sum())} of {before.numel()} elements, by {largest:.3g} at most"
