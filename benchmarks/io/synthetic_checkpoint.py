"""A Hugging Face GLM folder of a wanted size, filled with random numbers."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of
from glm_rlhf.parallel.storage.hf_config import write_config

FILE_BYTES = 500_000_000
_BLOCK_ELEMENTS = 2**25


def config_of_size(num_bytes: float) -> GLMConfig:
    """Return a GLM whose bf16 weights have about `num_bytes`."""

    def config(num_layers: int) -> GLMConfig:
        return GLMConfig(
            family="glm",
            num_layers=num_layers,
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=2,
            head_size=128,
            ffn_size=6848,
            vocab_size=32768,
            norm_epsilon=1e-5,
            rope_theta=10000.0,
        )

    one, two = (2 * _num_parameters(config(n)) for n in (1, 2))
    return config(max(1, round((num_bytes - one) / (two - one)) + 1))


def write_checkpoint(folder: Path, config: GLMConfig) -> int:
    """Write the folder with bf16 weights in several files; return the bytes of its tensors."""
    folder.mkdir()
    write_config(config, folder, dtype=torch.bfloat16)
    block = torch.empty(_BLOCK_ELEMENTS, dtype=torch.bfloat16)
    block.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    weight_map, held, held_bytes, total_bytes = {}, {}, 0, 0
    for index, (name, shape) in enumerate(_tensors(config)):
        held[name] = _values(block, shape, index)
        held_bytes += held[name].nbytes
        if held_bytes >= FILE_BYTES:
            weight_map |= _save(folder, held, len(set(weight_map.values())))
            total_bytes, held, held_bytes = total_bytes + held_bytes, {}, 0
    if held:
        weight_map |= _save(folder, held, len(set(weight_map.values())))
    index = {"metadata": {"total_size": total_bytes + held_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_bytes + held_bytes


def _tensors(config: GLMConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for weight in weights_of(config, layers=range(config.num_layers), role="policy"):
        yield from names_within(weight, config).items()


def _num_parameters(config: GLMConfig) -> int:
    return sum(torch.Size(shape).numel() for _, shape in _tensors(config))


def _values(block: torch.Tensor, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Return a tensor cut from the block, repeated, at a place of its own."""
    size = torch.Size(shape).numel()
    start = index * 7919 % 4096
    copies = -(-(size + start) // block.numel())
    return block.repeat(copies)[start : start + size].reshape(shape).clone()


def _save(folder: Path, tensors: dict[str, torch.Tensor], index: int) -> dict[str, str]:
    file = f"model-{index + 1:05}.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    with (folder / file).open("rb") as written:
        os.fsync(written.fileno())  # else the disk would still write it while something is timed
    return dict.fromkeys(tensors, file)
