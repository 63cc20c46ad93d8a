"""A folder appears complete or not at all."""

import contextlib
import json
import os
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_files import small_files

from glm_rlhf.parallel.storage import folder_writer
from glm_rlhf.parallel.storage.folder_writer import (
    PlannedTensor,
    TensorFiles,
    Writers,
    new_folder,
    plan_files,
)
from glm_rlhf.parallel.storage.model_folder import ModelFolderError


def planned(*sizes, writers=None):
    return [
        PlannedTensor(name=f"t{i}", dtype=torch.float32, shape=(size,), writer=writers[i] if writers else 0)
        for i, size in enumerate(sizes)
    ]


def names(files):
    return [(file.name, list(file.entries)) for file in files]


def test_files_are_filled_up_to_the_limit():
    files = plan_files(planned(2, 2, 3, 9, 1), 16)
    assert [list(file.entries) for file in files] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert names(plan_files(planned(2, 2), 16)) == [("model.safetensors", ["t0", "t1"])]
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        plan_files(planned(1), 0)


def test_a_new_writer_begins_a_new_file():
    files = plan_files(planned(1, 1, 1, 1, writers=[0, 0, 1, 0]), 10**9)
    assert [(list(file.entries), file.writer) for file in files] == [
        (["t0", "t1"], 0),
        (["t2"], 1),
        (["t3"], 0),
    ]


def test_tensors_may_come_in_any_order(tmp_path):
    files = plan_files(planned(2, 3, 4), 20)
    with new_folder(tmp_path / "out", files, Writers()) as folder:
        assert folder.name.startswith(".")
        output = TensorFiles(folder, files)
        for i in (2, 0, 1):
            output.write(f"t{i}", torch.full((i + 2,), float(i)))
        assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == ["out"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 36
    for name, file in index["weight_map"].items():
        i = int(name[1])
        assert torch.equal(load_file(tmp_path / "out" / file)[name], torch.full((i + 2,), float(i)))


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, fault):
    files = plan_files(planned(2), 100)

    def fail():
        with new_folder(tmp_path / "out", files, Writers()) as folder:
            TensorFiles(folder, files)
            raise fault

    with pytest.raises(fault):
        fail()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    files = plan_files(planned(2), 100)
    with new_folder(tmp_path / "out", files, Writers()) as folder:
        TensorFiles(folder, files).write("t0", torch.ones(2))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["t0"], torch.ones(2))


def test_a_target_in_use_is_refused_untouched(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("keep")
    files = plan_files(planned(2), 100)
    with (
        pytest.raises(ModelFolderError, match="out exists already; remove it"),
        new_folder(target, files, Writers()),
    ):
        pass
    assert (target / "mine").read_text() == "keep"
    with (
        pytest.raises(ModelFolderError, match="nowhere does not exist; create"),
        new_folder(tmp_path / "nowhere" / "out", files, Writers()),
    ):
        pass


def test_an_empty_target_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    files = plan_files(planned(2), 100)
    with new_folder(tmp_path / "out", files, Writers()) as folder:
        TensorFiles(folder, files).write("t0", torch.ones(2))
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_too_small_a_disk_is_noticed_before_anything_is_written(tmp_path):
    tensor = PlannedTensor(name="huge", dtype=torch.float32, shape=(2**50,), writer=0)
    files = plan_files([tensor], 10**9)
    with (
        pytest.raises(ModelFolderError, match=r"needs 4503599\.6 GB and the disk has .* GB left"),
        new_folder(tmp_path / "out", files, Writers()),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_what_a_failed_attempt_left_counts_as_room(tmp_path, monkeypatch):
    files = plan_files(planned(1000), 10**9)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"x" * 8192)
    monkeypatch.setattr(folder_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with new_folder(tmp_path / "out", files, Writers()) as folder:
        TensorFiles(folder, files).write("t0", torch.ones(1000))
    with (
        pytest.raises(ModelFolderError, match=r"the disk has 0\.0 GB left"),
        new_folder(tmp_path / "other", files, Writers()),
    ):
        pass


def test_a_write_that_does_not_fit_names_the_file(tmp_path):
    files = plan_files(planned(1000), 10**9)

    def fill():
        with new_folder(tmp_path / "out", files, Writers()) as folder:
            TensorFiles(folder, files).write("t0", torch.ones(1000))

    with small_files(2000), pytest.raises(OSError) as caught:
        fill()
    assert caught.value.filename == str(tmp_path / ".out.partial" / "model.safetensors")
    assert os.listdir(tmp_path) == []


def run_writers(target: Path, files, write):
    """Run `write(rank, folder)` for two writers and return what each of them raised."""
    barrier, errors = threading.Barrier(2, timeout=120), [None, None]

    def work(rank):
        try:
            with new_folder(target, files, Writers(rank=rank, count=2, barrier=barrier.wait)) as folder:
                write(rank, folder)
        except Exception as error:
            errors[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_writers_share_a_folder(tmp_path):
    files = plan_files(planned(2, 3, writers=[0, 1]), 10**9)

    def write(rank, folder):
        own = TensorFiles(folder, [file for file in files if file.writer == rank])
        own.write(f"t{rank}", torch.full((rank + 2,), float(rank)))

    assert run_writers(tmp_path / "out", files, write) == [None, None]
    assert sorted(os.listdir(tmp_path)) == ["out"]
    for rank in range(2):
        content = load_file(tmp_path / "out" / files[rank].name)
        assert torch.equal(content[f"t{rank}"], torch.full((rank + 2,), float(rank)))


def test_a_writer_that_writes_nothing_is_noticed(tmp_path):
    files = plan_files(planned(2, 3, writers=[0, 1]), 10**9)

    def write(rank, folder):
        if rank == 0:
            TensorFiles(folder, files[:1]).write("t0", torch.ones(2))

    errors = run_writers(tmp_path / "out", files, write)
    assert "has 0 bytes of" in str(errors[0])
    assert "writer 1 failed" in str(errors[0])
    assert not (tmp_path / "out").exists()


def test_writers_without_a_barrier_are_refused():
    with pytest.raises(ValueError, match="2 writers need a barrier"):
        Writers(count=2)
    with pytest.raises(ValueError, match="rank is 2; with 2 writers"):
        Writers(rank=2, count=2, barrier=lambda: None)


def test_the_second_writer_of_a_folder_is_refused_and_the_first_one_finishes(tmp_path):
    """Without a lock the second took the first one's hidden folder, which ended as a file of zeros."""
    target, files = tmp_path / "out", plan_files(planned(2), 100)
    with new_folder(target, files, Writers()) as folder:
        output = TensorFiles(folder, files)
        with (
            pytest.raises(ValueError, match=rf"out is being written by process {os.getpid()} on "),
            new_folder(target, files, Writers()),
        ):
            pytest.fail("the block ran")
        output.write("t0", torch.ones(2))
    assert torch.equal(load_file(target / "model.safetensors")["t0"], torch.ones(2))
    assert os.listdir(tmp_path) == ["out"]


def test_without_locks_a_hidden_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_writer, "one_writer", lambda target: contextlib.nullcontext(False))
    (tmp_path / ".out.partial").mkdir()
    files = plan_files(planned(2), 100)
    with pytest.raises(ModelFolderError, match="another process may be writing"):
        with new_folder(tmp_path / "out", files, Writers()):
            pytest.fail("the block ran")
    (tmp_path / ".out.partial").rmdir()
    with new_folder(tmp_path / "out", files, Writers()) as folder:
        TensorFiles(folder, files).write("t0", torch.ones(2))
    assert os.listdir(tmp_path) == ["out"]
