"""A file of torch.save is mapped without running it, and damage to it is found or harmless."""

import random
import warnings

import pytest
import torch

from glm_rlhf.parallel.storage.mapped_bin import BinFile
from glm_rlhf.parallel.storage.model_folder import ModelFolderError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def read(stored, like):
    out = torch.empty_like(like)
    stored.read_into(0, 0, stored.shape[0], out)
    return out


def test_tensors_are_those_that_were_saved(path):
    shared = torch.randn(6, 4)
    tensors = {
        "a": torch.randn(3, 5),
        "tied": shared,
        "tied again": shared,
        "part": shared[2:4],
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "half": torch.randn(9).bfloat16(),
        "counter": torch.tensor(3),
        "nothing": torch.empty(0, 4),
    }
    torch.save(tensors, path)
    listed = BinFile(path).list_tensors()
    assert listed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert listed[name].shape == tuple(tensor.shape)
        if tensor.dim():
            assert torch.equal(read(listed[name], tensor.detach()), tensor.detach())
    kinds = [(listed[name].dtype_name, listed[name].dtype) for name in ("a", "half", "counter")]
    assert kinds == [("F32", torch.float32), ("BF16", torch.bfloat16), ("I64", None)]


def test_a_mapping_is_renewed_and_a_file_that_shrinks_is_noticed(path, monkeypatch):
    monkeypatch.setattr("glm_rlhf.parallel.storage.mapped_bin._MAPPED_BYTES", 100)
    tensors = {"a": torch.randn(30), "b": torch.randn(30)}
    torch.save(tensors, path)
    maps = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: maps.append(1) or real(*args, **options))
    listed = BinFile(path).list_tensors()
    for name in ("a", "b", "a"):
        assert torch.equal(read(listed[name], tensors[name]), tensors[name])
    assert len(maps) == 3, "one to list them, and one before each but the first is read"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFolderError, match="was cut short while b was read"):
        read(listed["b"], tensors["b"])


def test_an_empty_state_dict_has_no_tensors(path):
    torch.save({}, path)
    assert BinFile(path).list_tensors() == {}


def read_or_refuse(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, about pickle protocols that no version writes
            return BinFile(path).list_tensors(), ""
    except ModelFolderError as error:
        return {}, str(error)


def test_changed_bytes_are_refused_or_stay_within_the_file(path):
    torch.save({"first.weight": torch.ones(4, 3), "second.bias": torch.ones(5).half()}, path)
    original = path.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for _ in range(400):
        content = bytearray(original)
        for _ in range(generator.choice([1, 1, 3])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        listed, refusal = read_or_refuse(path)
        assert "\n" not in refusal
        num_refused += bool(refusal)
        for stored in listed.values():
            if stored.dtype is not None and stored.shape:  # a page behind the file's end kills the process
                read(stored, torch.empty(stored.shape, dtype=stored.dtype))
    assert num_refused > 100, "the changes reach the parts that matter"
