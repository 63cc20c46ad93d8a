"""JSON-lines reading: every bad file of the list, with file and line."""

import gzip
import logging
import pickle
import time
import tracemalloc

import pytest

from glm_rlhf.engine.data.records.jsonl import read_json_lines
from glm_rlhf.engine.data.records.reading import ReadReport, RecordError

GOOD = b'{"a": 1}\n'


def pairs_of(fields, topology):
    """Return the object with its location; raise for objects marked as bad."""
    if fields.get("bad"):
        raise topology.error("it says it is bad")
    return (topology.line, topology.index, fields)


def read(path, **settings):
    return list(read_json_lines(path, pairs_of, **settings))


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_fifty_thousand_keys_in_a_line_cost_linear_time(write):
    """The duplicate is the last: comparing each key with all others was a minute."""
    keys = ", ".join(f'"key_{i}": {i}' for i in range(50_000))
    content = f'{{{keys}, "key_49999": 0}}\n'.encode()
    start = time.process_time()
    with pytest.raises(RecordError, match="the key 'key_49999' is in one object twice"):
        read(write(content))
    assert time.process_time() - start < 2 * len(content) / 1e6 + 1


def test_records_come_in_order_with_line_and_index(write):
    path = write(b'{"a": 1}\n\n{"a": 2}\n  \t \n{"a": 3}')
    assert read(path) == [(1, 0, {"a": 1}), (3, 1, {"a": 2}), (5, 2, {"a": 3})]


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\r\n{"a": "\xe4\xbd\xa0"}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": "\xe4\xbd\xa0"}\n',
        '{"a": 1}\n{"a": "你"}'.encode(),
        b'  {"a": 1}  \n\n{"a": "\\u4f60"}\n\n\n',
    ],
    ids=["CRLF", "byte order mark", "no last line end", "blank lines and escapes"],
)
def test_harmless_variants_are_read(write, content):
    assert [fields for _, _, fields in read(write(content))] == [{"a": 1}, {"a": "你"}]


def test_line_separators_inside_a_text_do_not_end_a_line(write):
    path = write('{"a": "x\u2028y\u0085z\\u0000"}\n'.encode())
    assert read(path)[0][2] == {"a": "x\u2028y\u0085z\0"}


def test_gz_is_decompressed(write):
    packed = gzip.compress(GOOD) + gzip.compress(b'{"a": 2}\n')  # two members, as from `cat`
    assert [fields["a"] for _, _, fields in read(write(packed, "data.jsonl.gz"))] == [1, 2]


WHOLE_FILE = {
    "empty": (b"", "data.jsonl", "is empty"),
    "UTF-16 with mark": ('{"a": 1}\n'.encode("utf-16"), "data.jsonl", "is UTF-16; convert it: iconv"),
    "UTF-16 little end": ('{"a": 1}\n'.encode("utf-16-le"), "data.jsonl", "is UTF-16"),
    "UTF-16 big end": ('{"a": 1}\n'.encode("utf-16-be"), "data.jsonl", "is UTF-16"),
    "gzip named jsonl": (gzip.compress(GOOD), "data.jsonl", r"is gzip; rename it to data\.jsonl\.gz"),
    "parquet named jsonl": (b"PAR1", "data.jsonl", r"is parquet; rename it to data\.parquet"),
    "jsonl named gz": (GOOD, "data.jsonl.gz", "is not gzip"),
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(("content", "name", "says"), WHOLE_FILE.values(), ids=WHOLE_FILE)
def test_a_file_that_cannot_be_read_is_refused_by_the_call_itself(write, content, name, says, on_error):
    path = write(content, name)
    with pytest.raises(RecordError, match=says) as caught:
        read_json_lines(path, pairs_of, on_error=on_error)
    assert (caught.value.path, caught.value.line) == (path, 0)


def test_missing_files_and_folders_are_refused(tmp_path, write):
    with pytest.raises(RecordError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_json_lines(tmp_path / "absent.jsonl", pairs_of)
    write(GOOD, "train.jsonl")
    with pytest.raises(RecordError, match=r"is a folder; give a file of records, such as train\.jsonl in it"):
        read_json_lines(tmp_path, pairs_of)


@pytest.mark.parametrize("content", [b"\n", b" \n\r\n\t\n"])
def test_a_file_of_blank_lines_holds_no_record(write, content):
    with pytest.raises(RecordError, match="no record is left: every line is blank"):
        read(write(content))


BAD_LINES = {
    "invalid UTF-8": (b'{"a": "\xff"}\n', "invalid UTF-8 at byte 7"),
    "a character cut in two": (b'{"a": "\xe4\xbd"}\n', "invalid UTF-8 at byte 7"),
    "NUL": (b'{"a": "x\x00"}\n', "a NUL character at column 9"),
    "NUL padding": (b"\x00\x00\x00\x00\n", "a NUL character at column 1"),
    "raw control character": (b'{"a": "x\x01"}\n', "not JSON: Invalid control character at column 9"),
    "trailing comma": (b'{"a": 1,}\n', "not JSON"),
    "two objects": (b'{"a": 1} {"a": 2}\n', "not JSON: Extra data at column 10"),
    "one object over lines": (b'{"a":\n', "not JSON"),
    "printed JSON": (b"{\n", "not JSON.*; each line must be one JSON object"),
    "another form": (
        b"prompt,answer\n",
        "Expecting value at column 1; each line must be one JSON object",
    ),
    "single quotes": (b"{'a': 1}\n", "not JSON"),
    "a second byte order mark": (b'\xef\xbb\xbf{"a": 1}\n', "not JSON"),
    "NaN": (b'{"a": NaN}\n', "NaN is not JSON"),
    "Infinity": (b'{"a": [-Infinity]}\n', "-Infinity is not JSON"),
    "a number beyond floats": (b'{"a": 1e999}\n', "1e999 is outside"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}\n", "not usable"),
    "duplicate key": (b'{"a": 1, "a": 1}\n', "the key 'a' is in one object twice"),
    "duplicate key inside": (b'{"a": {"b": 1, "b": 2}}\n', "the key 'b' is in one object twice"),
    "top-level list": (
        b'[{"a": 1}]\n',
        "expected a JSON object, found a list; write the list's items one per line",
    ),
    "top-level text": (b'"a"\n', "expected a JSON object, found a text"),
    "top-level null": (b"null\n", "expected a JSON object, found null"),
    "top-level number": (b"3\n", "expected a JSON object, found a number"),
    "top-level true": (b"true\n", "expected a JSON object, found a boolean"),
    "nested deeply": (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}\n", "nested too deeply, over 64 levels"),
    "nested too deeply": (b'{"a": ' + b"[" * 200_000 + b"\n", "nested too deeply"),
    "the parser refuses": (b'{"bad": 1}\n', "it says it is bad"),
    "over the limit": (b'{"a": "' + b"x" * 400_000 + b'"}\n', "longer than 300000 bytes"),
}


@pytest.mark.parametrize(("bad", "says"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_file_and_line_or_skipped_and_counted(write, bad, says, caplog):
    path = write(GOOD + b"\n" + bad + b'{"a": 2}\n')
    with pytest.raises(RecordError, match=says) as caught:
        read(path, max_line_bytes=300_000)
    assert (caught.value.path, caught.value.line) == (path, 3)
    assert str(caught.value).startswith(f"{path}:3: ")

    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        records = read(path, max_line_bytes=300_000, on_error="skip", report=report)
    assert records == [(1, 0, {"a": 1}), (4, 2, {"a": 2})]  # the bad record keeps its index
    assert (report.num_records, report.num_skipped, report.num_blank) == (2, 1, 1)
    assert str(report.errors[0]) == str(caught.value)
    assert f"{path}: skipped 1 of 3 records; the first: {path}:3: " in caplog.text


def test_a_truncated_last_line_is_named_so(write):
    with pytest.raises(
        RecordError, match=r":2: not JSON.*the last line, without a line break: the file seems truncated"
    ):
        read(write(GOOD + b'{"a": "x'))


def test_a_file_of_bad_records_only_is_an_error_even_when_skipping(write):
    report = ReadReport()
    with pytest.raises(RecordError, match=r"no record is left: all 30 are bad; the first: .*:1: not JSON"):
        read(write(b"{\n" * 30), on_error="skip", report=report)
    assert (report.num_skipped, len(report.errors)) == (30, 20)


def test_a_line_of_exactly_the_limit_is_read_and_one_byte_more_is_not(write):
    line = b'{"a": 1}'
    for end in (b"\n", b"\r\n"):
        path = write(line + end + line)
        assert [number for number, _, _ in read(path, max_line_bytes=len(line))] == [1, 2]
        with pytest.raises(RecordError, match="longer than 7 bytes"):
            read(path, max_line_bytes=len(line) - 1)


def test_a_line_of_50_megabytes_is_skipped_without_being_read_into_memory(write):
    path = write(GOOD + b'{"a": "' + b"x" * 50_000_000 + b'"}\n' + GOOD)
    tracemalloc.start()
    records = read(path, max_line_bytes=2**20, on_error="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for line, _, _ in records] == [1, 3]
    assert peak < 8 * 2**20  # a few times the limit, far below the line
    with pytest.raises(RecordError, match="longer than 16777216 bytes; split it, or raise max_line_bytes"):
        read(path)
    assert len(read(path, max_line_bytes=60_000_000)) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_damaged_gzip_stream_is_an_error_even_when_skipping(write, damage, on_error):
    lines = b"".join(b'{"a": %d}\n' % (i * 7919) for i in range(5000))
    packed = bytearray(gzip.compress(lines))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2] ^= 0x10
    path = write(bytes(packed), "data.jsonl.gz")
    with pytest.raises(RecordError, match=r"cannot be read beyond this line|not JSON|UTF-8|NUL") as caught:
        read(path, on_error=on_error)
    assert caught.value.line > 1
    if on_error == "skip":
        assert "cannot be read beyond" in caught.value.reason


def test_reading_streams(write):
    """The first record is there before the rest of the file is looked at."""
    records = read_json_lines(write(GOOD + b"{"), pairs_of)
    assert next(records) == (1, 0, {"a": 1})
    with pytest.raises(RecordError, match=":2: "):
        next(records)


@pytest.mark.parametrize("settings", [{"on_error": "ignore"}, {"max_line_bytes": 0}])
def test_impossible_settings_are_refused(write, settings):
    with pytest.raises(ValueError, match="must be"):
        read_json_lines(write(GOOD), pairs_of, **settings)


def test_record_errors_survive_pickling(tmp_path):
    error = pickle.loads(pickle.dumps(RecordError(tmp_path / "x", 3, "why")))
    assert (error.path, error.line, error.reason) == (tmp_path / "x", 3, "why")
    assert str(error) == f"{tmp_path / 'x'}:3: why"
