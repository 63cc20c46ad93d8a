"""Hugging Face folders in every supported form of weight files, and reading of whole folders."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of
from glm_rlhf.parallel.storage.hf_config import write_config

INDEX = "model.safetensors.index.json"


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder's safetensors files; a name in two files is an error."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = load_file(path)
        assert not content.keys() & tensors.keys()
        tensors |= content
    return tensors


def assert_same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Fail unless both hold the same names, types, shapes and bytes."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


def store_as(folder: Path, form: str) -> Path:
    """Rewrite a folder's weights in place: `one file`, `two files`, `one bin` or `two bins`."""
    tensors = load_all(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*.bin")]:
        path.unlink()
    stem, suffix = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
    if "one" in form:
        _save(tensors, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(tensors)
    parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        _save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index.json").write_text(text)
    return folder


def write_large(folder: Path, family: str, **changes) -> Path:
    """Write a checkpoint of ones, of the shapes of the tiny preset with `changes`, as one file."""
    config = replace(preset(f"tiny-{family}"), **changes)
    folder.mkdir()
    write_config(config, folder)
    tensors = {}
    for weight in weights_of(config, layers=range(config.num_layers)):
        tensors |= {name: torch.ones(shape) for name, shape in names_within(weight, config).items()}
    _save(tensors, folder / "model.safetensors")
    return folder


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; a value of `...` removes the key."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
        if value is ...:
            del content[key]
    path.write_text(json.dumps(content))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
