"""A folder's tensors are listed and read by slice in every form, and nothing in it is executed."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_folder
from weight_folders import INDEX, change_json, load_all, store_as

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.weight_files import copy_checked, list_tensors, read_slice

FORMS = ("one file", "two files", "one bin", "two bins")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("glm"), "glm")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns_are_read_from_every_form(folder, form):
    whole = load_all(folder)
    stored = list_tensors(store_as(folder, form))
    assert {name: s.shape for name, s in stored.items()} == {
        name: tuple(t.shape) for name, t in whole.items()
    }
    for name, tensor in whole.items():
        size = tensor.shape[0]
        rows = torch.empty_like(tensor[size // 4 : size // 2])
        read_slice(stored[name], 0, size // 4, size // 2, rows)
        assert torch.equal(rows, tensor[size // 4 : size // 2])
        if tensor.dim() == 2:
            columns = torch.empty(size, 5)
            read_slice(stored[name], 1, 3, 8, columns)
            assert torch.equal(columns, tensor[:, 3:8])


@pytest.mark.parametrize("form", ["one file", "one bin"])
def test_a_slice_is_cast_into_a_view(folder, form):
    whole = load_all(folder)["model.layers.0.mlp.down_proj.weight"]
    stored = list_tensors(store_as(folder, form))["model.layers.0.mlp.down_proj.weight"]
    target = torch.zeros(whole.shape[0], 9, dtype=torch.bfloat16)
    read_slice(stored, 1, 1, 6, target[:, 2:7])
    assert torch.equal(target[:, 2:7], whole[:, 1:6].bfloat16())
    assert not target[:, :2].any()
    assert not target[:, 7:].any()


@pytest.mark.parametrize("form", ["one file", "one bin"])
def test_rows_are_cast_in_blocks(folder, form, monkeypatch):
    monkeypatch.setattr("glm_rlhf.parallel.storage.weight_files._BLOCK_BYTES", 1000)
    whole = load_all(folder)["lm_head.weight"]
    target = torch.zeros(whole.shape[0] - 9, whole.shape[1], dtype=torch.bfloat16)
    read_slice(list_tensors(store_as(folder, form))["lm_head.weight"], 0, 4, len(whole) - 5, target)
    assert torch.equal(target, whole[4:-5].bfloat16())


def test_only_the_slice_s_bytes_are_read(folder, monkeypatch):
    stored = list_tensors(store_as(folder, "one file"))["model.layers.0.mlp.gate_up_proj.weight"]
    sizes = []
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, at: sizes.append(real(file, buffers, at)) or sizes[-1]
    )
    read_slice(stored, 0, 3, 7, torch.empty(4, stored.shape[1]))
    assert sum(sizes) == 4 * stored.shape[1] * 4
    sizes.clear()
    read_slice(stored, 1, 3, 7, torch.empty(stored.shape[0], 4))
    assert sum(sizes) == 4 * stored.shape[0] * 4


def test_safetensors_are_preferred_to_a_bin(folder):
    store_as(folder, "one file")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert all(s.path.name == "model.safetensors" for s in list_tensors(folder).values())


def test_the_hub_cache_s_own_links_are_followed(folder, tmp_path):
    repository = tmp_path / "models--X--Y"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.move(folder / "model.safetensors", repository / "blobs" / "beef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/beef")
    assert "lm_head.weight" in list_tensors(snapshot)


class RunsCode:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def place_bin(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("hidden_in", ["value", "list", "top", "legacy", "index file"])
def test_a_malicious_pickle_is_refused_and_not_run(folder, tmp_path, hidden_in):
    trap = RunsCode(tmp_path / "was-run")
    content = {
        "value": {"a": torch.ones(2), "b": trap},
        "list": {"a": [trap]},
        "top": trap,
        "legacy": {"a": trap},
        "index file": {"a": trap},
    }[hidden_in]
    place_bin(folder, content)
    if hidden_in == "legacy":
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    if hidden_in == "index file":
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model-1.bin")
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    with pytest.raises(
        ModelFolderError, match=r"\.bin (holds something other than tensors|is truncated or)"
    ) as e:
        list_tensors(folder)
    assert "weights_only" not in str(e.value), "the message does not say how to run it"
    assert not (tmp_path / "was-run").exists()
    with open(tmp_path / "plain.pkl", "wb") as file:
        pickle.dump(trap, file)
    with open(tmp_path / "plain.pkl", "rb") as file:
        pickle.load(file)
    assert (tmp_path / "was-run").exists(), "the trap itself works"


def compress(path):
    records = {}
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


BAD_BINS = {
    "cut": (lambda f: cut(f / "pytorch_model.bin", 100), "is truncated or"),
    "empty": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "is truncated or"),
    "compressed": (lambda f: compress(f / "pytorch_model.bin"), "is compressed"),
    "a list": (lambda f: torch.save([torch.ones(1)], f / "pytorch_model.bin"), "holds a list; a state_dict"),
    "an epoch": (lambda f: torch.save({"epoch": 3}, f / "pytorch_model.bin"), "holds int under 'epoch'"),
    "nested": (
        lambda f: torch.save({"model": {"a": torch.ones(1)}}, f / "pytorch_model.bin"),
        "holds dict under 'model'",
    ),
    "strided": (
        lambda f: torch.save({"a": torch.ones(4, 4).t()[1:]}, f / "pytorch_model.bin"),
        "holds 'a' with gaps",
    ),
    "sparse": (
        lambda f: torch.save({"a": torch.eye(3).to_sparse()}, f / "pytorch_model.bin"),
        "holds 'a' with gaps|holds something other",
    ),
}


@pytest.mark.parametrize("case", BAD_BINS)
def test_a_damaged_bin_is_refused_in_one_sentence(folder, case):
    store_as(folder, "one bin")
    damage, message = BAD_BINS[case]
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as caught:
        list_tensors(folder)
    assert "pytorch_model.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


def json_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def set_map(folder, **entries):
    change_json(folder / INDEX, weight_map=entries)


def move_away_and_link(folder):
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model-00001-of-00002.safetensors").symlink_to("../elsewhere.safetensors")


def duplicate_a_tensor(folder):
    tensors = load_all(folder)
    second = folder / "model-00002-of-00002.safetensors"
    (folder / "model-00001-of-00002.safetensors").unlink()
    kept = load_all(folder)
    missing = {name: t.contiguous() for name, t in tensors.items() if name not in kept}
    save_file(missing, folder / "model-00001-of-00002.safetensors")
    save_file(kept | {"lm_head.weight": tensors["lm_head.weight"]}, second)
    save_file(
        missing | {"lm_head.weight": tensors["lm_head.weight"]}, folder / "model-00001-of-00002.safetensors"
    )


BAD_FOLDERS = {
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no weights; model.safetensors or"),
    "missing file": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002\.safetensors is missing",
    ),
    "cut file": (
        lambda f: cut(f / "model-00001-of-00002.safetensors", 5),
        r"model-00001-of-00002\.safetensors is truncated",
    ),
    "above": (lambda f: set_map(f, a="../model.safetensors"), r"names the file '\.\./model\.safetensors'"),
    "absolute": (lambda f: set_map(f, a="/etc/passwd"), "names the file '/etc/passwd'"),
    "dots": (lambda f: set_map(f, a=".."), r"names the file '\.\.'"),
    "backslash": (lambda f: set_map(f, a="..\\x.safetensors"), "names the file"),
    "nul": (lambda f: set_map(f, a="x\0.safetensors"), "names the file"),
    "no name": (lambda f: set_map(f, a=""), "names the file ''"),
    "link": (move_away_and_link, r"model-00001-of-00002\.safetensors is a link"),
    "a number": (lambda f: set_map(f, a=3), "the file of 'a' is 3"),
    "empty map": (lambda f: set_map(f), "has no weight_map"),
    "no map": (lambda f: change_json(f / INDEX, weight_map=...), "has no weight_map"),
    "index not json": (lambda f: (f / INDEX).write_text("{"), "is not JSON: line 1"),
    "a directory": (
        lambda f: [
            (f / "model-00001-of-00002.safetensors").unlink(),
            (f / "model-00001-of-00002.safetensors").mkdir(),
        ],
        "is not a regular file",
    ),
    "other kind": (lambda f: [set_map(f, a="config.json")], "config.json is neither"),
    "listed, not there": (
        lambda f: change_json(
            f / INDEX, weight_map=json_map(f) | {"model.extra": "model-00001-of-00002.safetensors"}
        ),
        "the tensor 'model.extra', which is not in it",
    ),
    "there, not listed": (
        lambda f: change_json(
            f / INDEX, weight_map={n: file for n, file in json_map(f).items() if n != "lm_head.weight"}
        ),
        r"holds the tensor 'lm_head\.weight', .* gives no file for it",
    ),
    "in two files": (duplicate_a_tensor, r"holds the tensor 'lm_head\.weight', .* gives model-0000\d-of"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, case):
    store_as(folder, "two files")
    damage, message = BAD_FOLDERS[case]
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as caught:
        list_tensors(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(folder):
    stored = list_tensors(folder)
    last = max(stored.values(), key=lambda s: s.offset)
    cut(folder / "model.safetensors", 3)
    with pytest.raises(ModelFolderError, match=f"was truncated while {last.name} was read"):
        read_slice(last, 0, 0, last.shape[0], torch.empty(last.shape))


def test_a_cast_that_would_overflow_is_refused():
    out = torch.empty(3, dtype=torch.float16)
    copy_checked(out, torch.tensor([1.0, float("inf"), -2.0]), "a")  # infinite already
    with pytest.raises(ValueError, match=r"1 values of a do not fit torch\.float16"):
        copy_checked(out, torch.tensor([1.0, 70000.0, float("nan")]), "a")
