"""A file of torch.save is listed without executing or reading it, and damage is found or harmless."""

import random
import warnings

import pytest
import torch

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.torch_save_format import read_pickled_header


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def bytes_of(tensor):
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_positions_are_those_of_the_bytes(path):
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
    content = path.read_bytes()
    header = read_pickled_header(path)
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = header[name]
        stored = content[entry.offset : entry.offset + entry.num_bytes]
        assert stored == (bytes_of(tensor.detach()) if tensor.numel() else b"")
        assert entry.shape == tuple(tensor.shape)
    assert (header["a"].dtype, header["half"].dtype, header["counter"].dtype) == ("F32", "BF16", "I64")


def test_an_empty_state_dict_has_no_tensors(path):
    torch.save({}, path)
    assert read_pickled_header(path) == {}


def read_or_refuse(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch, about pickle protocols that no version writes
            return read_pickled_header(path), ""
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
        header, refusal = read_or_refuse(path)
        assert "\n" not in refusal
        num_refused += bool(refusal)
        assert all(0 <= e.offset <= e.offset + e.num_bytes <= len(content) for e in header.values())
    assert num_refused > 100, "the changes reach the parts that matter"
