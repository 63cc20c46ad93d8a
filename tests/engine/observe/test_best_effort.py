"""A full disk costs a run no line that there is room for later, and never the run."""

import errno
import os

import pytest

from glm_rlhf.engine.observe import best_effort
from glm_rlhf.engine.observe.best_effort import GrowingFile, without_failing


class Disk:
    """Stands in the place of `write_all`: when it is full, half of what is given fits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self._write_all = best_effort.write_all
        monkeypatch.setattr(best_effort, "write_all", self)

    def __call__(self, file, content, position):
        if self.is_full:
            self._write_all(file, content[: len(content) // 2], position)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write_all(file, content, position)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_lines_that_do_not_fit_wait_and_are_written_when_there_is_room(tmp_path, disk, capsys):
    path = tmp_path / "metrics.jsonl"
    file = GrowingFile(path)
    file.append("one\n")
    disk.is_full = True
    for line in ("two\n", "three\n"):
        file.append(line)
        assert path.read_text() == "one\n", "no half line"
    said = capsys.readouterr().err
    assert said == f"{path}: No space left on device; what is missing waits for room, the run continues\n"
    disk.is_full = False
    file.append("four\n")
    file.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    assert capsys.readouterr().err == f"{path} can be written again, and is complete\n"


def test_a_disk_that_stays_full_ends_the_file_and_its_memory(tmp_path, disk, capsys, monkeypatch):
    monkeypatch.setattr(best_effort, "_MOST_WAITING_BYTES", 10)
    path = tmp_path / "rank_0.json"
    file = GrowingFile(path)
    file.append("[\n")
    disk.is_full = True
    for _ in range(5):
        file.append("an event\n")
    disk.is_full = False
    file.append("too late\n")
    file.close()
    assert path.read_text() == "[\n"
    first, second, last = capsys.readouterr().err.splitlines()
    assert "waits for room" in first
    assert second.endswith("No space left on device; it ends here, the run continues")
    assert last == f"{path} lacks its last 2 lines"


def test_a_file_is_replaced_or_continued(tmp_path):
    path = tmp_path / "file"
    for text, is_new in (("a", True), ("b", True), ("c", False)):
        file = GrowingFile(path, is_new=is_new)
        file.append(text)
        file.close()
    assert path.read_text() == "bc"
    with pytest.raises(OSError, match="nowhere"):
        GrowingFile(tmp_path / "nowhere" / "file")


def test_a_failed_write_is_logged_and_other_errors_are_raised(tmp_path, capsys):
    with without_failing(tmp_path / "a"):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'a'}: Disk quota exceeded; it was not written, the run continues")
    with pytest.raises(ValueError, match="bug"), without_failing(tmp_path / "a"):
        raise ValueError("bug")
