"""A save is complete or absent: kills at every moment, full disks, failing writers, and what is kept."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import kill_points
import pytest
from saved_runs import OPTIONS, save_steps, tiny_run

from glm_rlhf.parallel.checkpoint import save
from glm_rlhf.parallel.checkpoint.restore import newest_checkpoint
from glm_rlhf.parallel.checkpoint.save import TRACKER, recover_replaced, step_folders
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

NUM_KILLS = 20


def newest(folder):
    with open_topology(Layout()) as topology:
        return newest_checkpoint(folder, topology=topology)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path):
    """Twenty moments, before and after writes, syncs, the rename and the tracker's replacement."""
    source = tmp_path / "run"
    save_steps(source, {}, [2])
    command = [sys.executable, kill_points.__file__, str(source), str(NUM_KILLS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    calls, moments = json.loads(done.stdout).values()
    assert calls.count("rename") == calls.count("replace") == 1
    assert calls.count("fsync") >= 5
    assert len(moments) == NUM_KILLS
    renamed = calls.index("rename")
    loaded = {moment: newest(tmp_path / f"run_{moment}").manifest.step for moment in moments}
    # The new one is valid from its rename on; until then the old one.
    assert loaded == {moment: 4 if moment > 2 * renamed else 2 for moment in moments}
    partial = tmp_path / f"run_{2 * renamed}"
    assert (partial / ".step_4.partial").exists()
    save_steps(partial, {}, [4])  # the next run removes leftovers of the kill
    assert sorted(path.name for path in partial.iterdir()) == [TRACKER, "step_2", "step_4"]
    assert (partial / TRACKER).read_text() == "step_4\n"


def asynchronous_and_not(folder, axes):
    """Save the same state both ways; change it as soon as the save returns."""
    with tiny_run(folder / "async", axes) as run:
        run.step()
        original, update_waits = run.writer._stage, threading.Event()
        run.writer._stage = lambda job: (update_waits.wait(60), original(job))[1]  # the update comes first
        with save.CheckpointWriter(folder / "sync", topology=run.topology, is_async=False, **OPTIONS) as sync:
            run.save(1, sync)
        run.save(1)
        was_running = run.writer._thread.is_alive()
        wait_until_staged = run.state.wait_for_readers
        run.state.wait_for_readers = lambda: (update_waits.set(), wait_until_staged())
        run.step()
        return was_running


@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_an_asynchronous_save_has_the_bytes_of_a_synchronous_one(ranks, tmp_path, axes):
    assert ranks.run(asynchronous_and_not, tmp_path, axes) == [True] * 4
    found, expected = (files_of(tmp_path / kind / "step_1") for kind in ("async", "sync"))
    assert len(found) == 4 + 3
    assert found == expected


def failing_save(folder, rank):
    """One rank's disk fails; the others raise at the same step."""
    said = []
    with tiny_run(folder, {"tp": 2}) as run:
        run.save(2)
        run.writer.finish()
        if run.topology.rank == rank:
            original = save.write_all

            def fail(*args, **kwargs):
                raise OSError(28, "No space left on device", str(folder))

            save.write_all = fail
        run.save(4)
        try:
            for step in range(200):  # noqa: B007
                run.step()
                run.writer.poll()
                time.sleep(0.02)
        except ValueError as error:
            said = [step, str(error)]
        finally:
            if run.topology.rank == rank:
                save.write_all = original
        run.save(6)  # the run may continue
    return said


def test_a_failing_writer_is_reported_at_the_next_step_on_all_ranks(ranks, tmp_path):
    answers = ranks.run(failing_save, tmp_path, 2)
    assert len({step for step, _ in answers}) == 1
    for rank, (_, said) in enumerate(answers):
        assert "the checkpoint of step 4 was not written" in said
        assert "No space left on device" in said
        assert ("failed on rank 2" in said) == (rank != 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TRACKER, "step_2", "step_6"]
    assert newest(tmp_path).manifest.step == 6


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs to be root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_an_interrupt_as_the_thread_starts_leaves_a_run_that_works(tmp_path, monkeypatch):
    def interrupt(_thread):
        raise KeyboardInterrupt

    with tiny_run(tmp_path) as run:
        run.step()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run.save(1)
        run.step()  # must not wait for a copy that nobody makes
        run.writer.poll()
        run.save(2)
    assert list(step_folders(tmp_path)) == [2]


def test_a_full_and_a_read_only_disk_leave_the_old_checkpoint(tiny_disk):
    folder = tiny_disk / "run"
    save_steps(folder, {}, [2])
    before = files_of(folder / "step_2")
    blocker = tiny_disk / "blocker"
    blocker.write_bytes(bytes(2**20 - sum(map(len, before.values())) - 100_000))
    with pytest.raises(ValueError, match=r"step 4 was not written: .*No space left on device"):
        save_steps(folder, {}, [4])
    assert sorted(path.name for path in folder.iterdir()) == [TRACKER, "step_2"]
    blocker.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):  # at the start
        save_steps(folder, {}, [4])
    assert files_of(folder / "step_2") == before
    assert newest(folder).manifest.step == 2
    subprocess.run(["mount", "-o", "remount,rw", str(tiny_disk)], check=True)
    save_steps(folder, {}, [4])
    assert newest(folder).manifest.step == 4


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_steps(tmp_path / "file" / "run", {}, [1])


def test_the_newest_and_every_nth_are_kept(tmp_path):
    with tiny_run(tmp_path, keep_last=2, keep_every=4) as run:
        for step in range(1, 10):
            run.save(step)
    assert list(step_folders(tmp_path)) == [9, 8, 4]


def test_a_damaged_checkpoint_gives_way_to_a_new_one_of_its_step(tmp_path):
    save_steps(tmp_path, {}, [2, 4])
    (tmp_path / "step_4" / "manifest.json").write_bytes(b"")
    assert newest(tmp_path).manifest.step == 2
    save_steps(tmp_path, {}, [4])
    assert newest(tmp_path).manifest.step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [TRACKER, "step_2", "step_4"]


def test_foreign_things_among_the_checkpoints_are_no_obstacle(tmp_path):
    """What has a checkpoint's or a leftover's name goes as a checkpoint would; others stay."""
    save_steps(tmp_path, {}, [2])
    (tmp_path / "step_1").write_text("a file")
    (tmp_path / ".step_3.partial").write_text("a file")
    os.mkfifo(tmp_path / "step_0")
    (tmp_path / "mine").mkdir()
    save_steps(tmp_path, {}, [4])
    assert sorted(path.name for path in tmp_path.iterdir()) == [TRACKER, "mine", "step_2", "step_4"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_tracker_that_is_no_file_is_refused_at_the_start(tmp_path, make):
    make(tmp_path / TRACKER)
    for _ in range(2):  # the first refusal left no lock
        with pytest.raises(ValueError, match=f"{TRACKER} is not a regular file"):
            save_steps(tmp_path, {}, [2])
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]


def test_a_folder_of_checkpoints_has_one_writer(tmp_path):
    with tiny_run(tmp_path) as run:
        with pytest.raises(ValueError, match=rf"is being written by process {os.getpid()} on "):
            save.CheckpointWriter(tmp_path, topology=run.topology, **OPTIONS)
        run.save(2)
    assert newest(tmp_path).manifest.step == 2


def test_what_gave_way_to_a_save_that_was_killed_gets_its_name_back(tmp_path):
    for name in (".step_3.replaced", ".step_5.replaced", "step_5", ".step_4.partial", ".step_2.removed"):
        (tmp_path / name).mkdir()
    recover_replaced(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".step_2.removed", ".step_4.partial", ".step_5.replaced", "step_3", "step_5")
    ]
