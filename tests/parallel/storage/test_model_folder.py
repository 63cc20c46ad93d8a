"""Links of the Hub's own cache are read through every path; links out of the model's cache are not."""

import shutil

import pytest

from glm_rlhf.parallel.storage.model_folder import ModelFolderError, plain_file


@pytest.fixture
def cache(tmp_path):
    """A cache with two models; returns its folder."""
    for model in ("a", "b"):
        root = tmp_path / "hub" / f"models--x--{model}"
        (root / "blobs").mkdir(parents=True)
        (root / "snapshots" / "abc").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            blob = root / "blobs" / f"0123{model}{len(name)}"
            blob.write_text(f"{model} {name}")
            (root / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{blob.name}")
    return tmp_path / "hub"


def snapshot(cache, model="a"):
    return cache / f"models--x--{model}" / "snapshots" / "abc"


def read_all(folder):
    return [plain_file(folder, name).read_text() for name in ("config.json", "model.safetensors")]


EXPECTED = ["a config.json", "a model.safetensors"]


def test_a_snapshot_and_a_link_to_it_are_read(cache, tmp_path):
    assert read_all(snapshot(cache)) == EXPECTED
    (tmp_path / "current").symlink_to(snapshot(cache))
    assert read_all(tmp_path / "current") == EXPECTED
    (tmp_path / "elsewhere").symlink_to(cache)
    assert read_all(snapshot(tmp_path / "elsewhere")) == EXPECTED


def test_blobs_on_another_disk_are_read(cache, tmp_path):
    blobs = cache / "models--x--a" / "blobs"
    shutil.move(blobs, tmp_path / "other_disk")
    blobs.symlink_to(tmp_path / "other_disk")
    assert read_all(snapshot(cache)) == EXPECTED
    local = folder_of_links(tmp_path, cache, resolves=False)
    assert read_all(local) == EXPECTED


@pytest.mark.parametrize("resolves", [True, False])
def test_a_local_folder_of_links_is_read(cache, tmp_path, resolves):
    assert read_all(folder_of_links(tmp_path, cache, resolves=resolves)) == EXPECTED


def folder_of_links(tmp_path, cache, *, resolves):
    local = tmp_path / "local_dir"
    local.mkdir()
    for link in snapshot(cache).iterdir():
        (local / link.name).symlink_to(link.resolve() if resolves else link)
    return local


def test_links_out_of_the_own_cache_are_refused(cache, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    refused = pytest.raises(ModelFolderError, match=r"config\.json is a link out of the model's own folder")
    for target in (secret, snapshot(cache, "b") / "config.json", cache / "models--x--b/blobs/0123b11"):
        link = snapshot(cache) / "config.json"
        link.unlink()
        link.symlink_to(target)
        with refused:
            plain_file(snapshot(cache), "config.json")
    local = folder_of_links(tmp_path, cache, resolves=True)
    with refused:
        plain_file(local, "config.json")  # of model b, among links into model a
    blob = cache / "models--x--a" / "blobs" / "linked"
    blob.symlink_to(secret)
    (local / "config.json").unlink()
    (local / "config.json").symlink_to(blob)
    with refused:
        plain_file(local, "config.json")


def test_a_folder_called_blobs_is_no_cache_of_the_hub(tmp_path):
    (tmp_path / "mine" / "blobs").mkdir(parents=True)
    (tmp_path / "mine" / "blobs" / "x").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "mine" / "blobs" / "x")
    with pytest.raises(ModelFolderError, match="is a link out of"):
        plain_file(tmp_path / "model", "config.json")
