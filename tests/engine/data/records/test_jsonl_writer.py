"""Lines appear under their name when all are there; until then what stood there stays."""

import errno
import json
import resource

import pytest

from glm_rlhf.engine.data.records.jsonl_writer import json_lines


def write_all(path, records):
    with json_lines(path) as write:
        for record in records:
            write(record)


def test_records_are_lines_of_json_without_ascii_escapes(tmp_path):
    path = tmp_path / "new" / "folders" / "out.jsonl"
    records = [{"text": "你好 🙂\n\u2028", "n": 1.5}, {}, {"nested": [None, True]}]
    with json_lines(path) as write:
        for record in records:
            write(record)
        assert not path.exists(), "not before it is whole"
    content = path.read_text(encoding="utf-8")
    assert content.count("\n") == 3
    assert "你好" in content
    assert [json.loads(line) for line in content.split("\n")[:-1]] == records
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_an_exception_keeps_the_earlier_file_and_the_partial_one(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_all(path, [{"a": 1}, {"b": object()}])
    assert path.read_text() == "old\n"
    assert (tmp_path / "out.jsonl.partial").read_text() == '{"a": 1}\n'
    write_all(str(path), [{"b": 2}])
    assert path.read_text() == '{"b": 2}\n', "the next attempt starts anew"
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match="JSON compliant"), json_lines(tmp_path / "out.jsonl") as write:
        write({"logprob": number})
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_in_the_way_is_found_before_the_work(tmp_path):
    (tmp_path / "out.jsonl").mkdir()
    with (
        pytest.raises(IsADirectoryError, match=r"is a folder.*out\.jsonl"),
        json_lines(tmp_path / "out.jsonl"),
    ):
        pytest.fail("the block ran")


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, json_lines(tmp_path / "file" / "out.jsonl"):
        pytest.fail("the block ran")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_full_disk_says_which_file(tmp_path):
    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel then refuses as a disk does
    try:
        with pytest.raises(OSError) as caught:
            write_all(path, [{"text": "x" * 2000}] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == f"{path}.partial"
    assert not path.exists()
