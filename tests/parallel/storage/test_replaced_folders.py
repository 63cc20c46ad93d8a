"""Replacement of files and folders: at any kill the old or the new one is there, whole."""

import os

import pytest

from glm_rlhf.parallel.storage import durable_io
from glm_rlhf.parallel.storage.durable_io import recover_folder, remove, replace_file, replace_folder


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def folder(path, content: str):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def killing_at(monkeypatch, moment: int) -> list[str]:
    """Raise before or after the n-th change of names; return the names of the calls."""
    calls = []

    def watched(name, original):
        def call(*args, **options):
            if 2 * len(calls) == moment:
                raise Killed
            calls.append(name)
            result = original(*args, **options)
            if 2 * len(calls) - 1 == moment:
                raise Killed
            return result

        return call

    monkeypatch.setattr(durable_io.os, "rename", watched("rename", os.rename))
    monkeypatch.setattr(durable_io, "_exchange", watched("exchange", durable_io._exchange))
    monkeypatch.setattr(durable_io.shutil, "rmtree", watched("rmtree", durable_io.shutil.rmtree))
    return calls


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, can_exchange):
    original, moment, seen = durable_io._exchange, -1, []
    while True:
        place = tmp_path / str(moment)
        place.mkdir()
        target, new = folder(place / "best", "old"), folder(place / ".best.new", "new")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable_io, "_exchange", original if can_exchange else lambda *_: False)
            calls = killing_at(patch, moment)
            try:
                replace_folder(new, target)
                is_killed = False
            except Killed:
                is_killed = True
            num_calls = len(calls)
        if can_exchange:
            assert target.exists()
        recover_folder(target)
        seen.append((target / "file").read_text())
        assert not (place / ".best.replaced").exists()
        if not is_killed and moment >= 0:
            break
        moment += 1
    assert moment == 2 * num_calls
    assert seen[0] == seen[-1] == "new"
    assert seen[1:] == sorted(seen[1:], reverse=True), "old until some moment, then new"
    assert "old" in seen


def test_a_folder_takes_a_free_name(tmp_path):
    replace_folder(folder(tmp_path / "new", "new"), tmp_path / "best")
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_file_that_cannot_be_written_keeps_its_content_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_io.os, "fsync", fail)
    with pytest.raises(OSError, match="No space") as caught:
        replace_file(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    replace_file(path, b"new")
    assert path.read_text() == "new"


def test_files_folders_and_links_are_removed(tmp_path):
    kept = folder(tmp_path / "kept", "here")
    (tmp_path / "link").symlink_to(kept)
    os.mkfifo(tmp_path / "fifo")
    folder(tmp_path / "folder", "gone")
    for name in ("link", "fifo", "folder", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "here"
