"""Cached folders: damage, kills and races end in a complete folder, or in none."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from glm_rlhf.engine.data.store.build_cache import DamagedFolder, ensure_folder, read_folder

IDENTITY = {"of": "numbers"}
FACTS = {"sum": 6}


def fill(folder: Path) -> dict:
    (folder / "a").write_bytes(b"1 2 3")
    (folder / "b").write_bytes(b"")
    return FACTS


def refuse(folder: Path) -> dict:
    raise AssertionError("a whole folder was filled again")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "deep" / "numbers"


@pytest.fixture
def whole(path) -> Path:
    ensure_folder(path, IDENTITY, fill)
    return path


def names(path: Path) -> set[str]:
    """Return the names next to a folder, without the lock file."""
    return {entry.name for entry in path.parent.iterdir()} - {f"{path.name}.lock"}


def test_it_is_filled_once(path):
    assert ensure_folder(path, IDENTITY, fill) == FACTS
    assert ensure_folder(path, IDENTITY, refuse) == FACTS
    assert read_folder(path, IDENTITY, checks_content=True) == FACTS
    assert (path / "a").read_bytes() == b"1 2 3"
    assert names(path) == {"numbers"}


def truncate(path: Path) -> None:
    (path / "a").write_bytes(b"1 2")


def flip(path: Path) -> None:
    (path / "a").write_bytes(b"1 2 2")


def lose(path: Path) -> None:
    (path / "b").unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def list_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def binary_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\xfe\x00")


def alter_facts(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["facts"]["sum"] = 7
    (path / "manifest.json").write_text(json.dumps(manifest))


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def replace_by_folder(path: Path) -> None:
    (path / "a").unlink()
    (path / "a").mkdir()


def make_manifest_a_fifo(path: Path) -> None:
    lose_manifest(path)
    os.mkfifo(path / "manifest.json")


def make_an_empty_file_a_fifo(path: Path) -> None:
    lose(path)
    os.mkfifo(path / "b")


def nest_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"[" * 100_000)


def swell_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 2**40)


def replace_whole_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine")


def replace_whole_by_fifo(path: Path) -> None:
    shutil.rmtree(path)
    os.mkfifo(path)


DAMAGES = [
    *(truncate, flip, lose, lose_manifest, cut_manifest, empty_manifest, list_manifest, binary_manifest),
    *(alter_facts, empty, replace_by_folder, make_manifest_a_fifo, make_an_empty_file_a_fifo),
    *(nest_manifest, swell_manifest, replace_whole_by_file, replace_whole_by_fifo),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_rebuilt(whole, damage, caplog):
    damage(whole)
    with pytest.raises(DamagedFolder):
        read_folder(whole, IDENTITY, checks_content=True)
    assert ensure_folder(whole, IDENTITY, fill) == FACTS
    assert "it is rebuilt" in caplog.text
    assert read_folder(whole, IDENTITY, checks_content=True) == FACTS
    assert names(whole) == {"numbers"}


def test_without_reading_content_sizes_still_count(whole):
    flip(whole)
    assert read_folder(whole, IDENTITY, checks_content=False) == FACTS
    truncate(whole)
    with pytest.raises(DamagedFolder, match="must have 5 bytes"):
        read_folder(whole, IDENTITY, checks_content=False)


def test_another_identity_is_another_folder_and_rebuilt(whole):
    with pytest.raises(DamagedFolder, match="built from other inputs"):
        read_folder(whole, {"of": "letters"}, checks_content=False)
    assert ensure_folder(whole, {"of": "letters"}, lambda folder: {"sum": 0}) == {"sum": 0}


def test_a_fill_that_fails_leaves_nothing_but_what_was_there(path, whole):
    def fail(folder: Path) -> dict:
        fill(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ensure_folder(path, {"of": "letters"}, fail)
    # The complete folder was of another identity, so it is removed too.
    assert names(path) == set()


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ensure_folder(tmp_path / "file" / "numbers", IDENTITY, fill)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_an_error_and_nobody_waits(path, make):
    path.parent.mkdir()
    make(path.with_name("numbers.lock"))
    with pytest.raises(OSError, match=r"numbers\.lock"):
        ensure_folder(path, IDENTITY, fill)


KILLED = """
import os, signal, sys
from pathlib import Path
from glm_rlhf.engine.data.store.build_cache import ensure_folder

def fill(folder):
    (folder / "a").write_bytes(b"1 ")
    os.kill(os.getpid(), signal.SIGKILL)

ensure_folder(Path(sys.argv[1]), {"of": "numbers"}, fill)
"""


def test_what_a_kill_left_half_written_is_removed_and_built(path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    (leftover,) = names(path)
    assert leftover.endswith(".partial")
    assert (path.parent / leftover / "a").read_bytes() == b"1 "
    assert ensure_folder(path, IDENTITY, fill) == FACTS
    assert names(path) == {"numbers"}


def test_a_partial_folder_of_another_host_is_left_alone(path):
    # That host may be building right now, under a lock that this one cannot see.
    partial = path.with_name("numbers.another-host.0123.partial")
    partial.mkdir(parents=True)
    assert ensure_folder(path, IDENTITY, fill) == FACTS
    assert names(path) == {"numbers", partial.name}


SLOW = """
import sys
from pathlib import Path
from glm_rlhf.engine.data.store.build_cache import ensure_folder

def fill(folder):
    print("filling", flush=True)
    sys.stdin.readline()
    (folder / "a").write_bytes(b"1 2 3")
    (folder / "b").write_bytes(b"")
    return {"sum": 6}

print(ensure_folder(Path(sys.argv[1]), {"of": "numbers"}, fill), flush=True)
"""


def test_while_one_process_builds_another_waits_and_finds_it_done(path, caplog):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout.readline() == "filling\n"
        # The lock is held and there is a partial folder, which must not be removed as a leftover.
        with (path.parent / "numbers.lock").open("ab") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        facts = []
        waiter = threading.Thread(target=lambda: facts.append(ensure_folder(path, IDENTITY, refuse)))
        waiter.start()
        builder.stdin.write("\n")
        builder.stdin.flush()
        waiter.join(timeout=300)
        assert builder.stdout.readline() == "{'sum': 6}\n"
    assert facts == [FACTS]
    assert names(path) == {"numbers"}


def test_without_locks_two_builders_end_with_one_whole_folder(path, monkeypatch, caplog):
    def no_locks(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    def fill_late(folder: Path) -> dict:
        assert ensure_folder(path, IDENTITY, fill) == FACTS  # another builder, meanwhile
        return fill(folder)

    assert ensure_folder(path, IDENTITY, fill_late) == FACTS
    assert "no file locks here" in caplog.text
    assert read_folder(path, IDENTITY, checks_content=True) == FACTS
    assert names(path) == {"numbers"}
