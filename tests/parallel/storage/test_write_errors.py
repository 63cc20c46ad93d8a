"""A file is replaced as a whole or not at all, and every error names it."""

import errno
import os

import pytest
from small_files import small_files

from glm_rlhf.parallel.storage import durable_io
from glm_rlhf.parallel.storage.durable_io import (
    name_in_errors,
    read_all,
    replace_file,
    replace_text,
    sync,
    write_synced,
)
from glm_rlhf.parallel.storage.model_folder import ModelFolderError


def fail(code: int):
    def call(*_args, **_options):
        raise OSError(code, os.strerror(code))  # names no file, as the system's calls do

    return call


def test_a_missing_folder_is_created_and_old_content_replaced(tmp_path):
    path = tmp_path / "new" / "one.json"
    replace_text(path, "é\n")
    replace_text(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "one.json"
    replace_text(path, "old")
    with small_files(1000), pytest.raises(OSError) as caught:
        replace_text(path, "x" * 2000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_system_gets_the_files_name(tmp_path, monkeypatch, call, code):
    path = tmp_path / "one.json"
    replace_file(path, b"old")
    monkeypatch.setattr(durable_io.os, call, fail(code))
    with pytest.raises(OSError) as caught:
        replace_file(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["one.json"]


def test_a_new_file_that_does_not_fit_is_removed(tmp_path):
    with small_files(10), pytest.raises(OSError) as caught:
        write_synced(tmp_path / "new", b"x" * 20)
    assert caught.value.filename == str(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    write_synced(tmp_path / "new", b"")
    with pytest.raises(FileExistsError):
        write_synced(tmp_path / "new", b"again")
    assert (tmp_path / "new").read_bytes() == b""


def test_a_folder_that_has_no_fsync_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_io.os, "fsync", fail(errno.EINVAL))
    sync(tmp_path)
    monkeypatch.setattr(durable_io.os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError) as caught:
        sync(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_a_name_that_an_error_has_stays_and_a_text_alone_becomes_a_reason(tmp_path):
    with pytest.raises(OSError) as caught, name_in_errors(tmp_path / "b"):
        (tmp_path / "a").open()
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError) as caught, name_in_errors(tmp_path / "b"):
        raise OSError("4096 requested and 1024 written")
    assert (caught.value.filename, caught.value.strerror) == (
        str(tmp_path / "b"),
        "4096 requested and 1024 written",
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    buffer = memoryview(bytearray(9))
    with path.open("rb") as file:
        with pytest.raises(ModelFolderError, match=r"model\.safetensors was truncated while t0 was read"):
            read_all(file.fileno(), 0, buffer, path=path, what="t0")
        monkeypatch.setattr(durable_io.os, "preadv", fail(errno.EIO))
        with pytest.raises(OSError) as caught:
            read_all(file.fileno(), 0, buffer, path=path, what="t0")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
