"""Parquet: the records of JSON lines, and every bad file and row, with file and row."""

import datetime
import logging
import sys

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.parquet import read_parquet_rows
from glm_rlhf.engine.data.records.reading import ReadReport, RecordError
from glm_rlhf.engine.data.records.schema import TokenIds, read_demonstrations, read_pairs, read_prompts

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
from pyarrow import parquet  # noqa: E402

TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi", "metadata": "x"}]
DIALOGUE = "\n\nHuman: hi\n\nAssistant: "
USER = Message(role="user", content="hi")

READERS = {
    "prompts": (read_prompts, {"prompt": "hi"}, {}),
    "demonstrations": (read_demonstrations, {"prompt": "hi", "response": "a"}, {}),
    "pairs": (read_pairs, {"prompt": "hi", "chosen": "a", "rejected": "b"}, {}),
    "hh-rlhf": (
        read_pairs,
        {"chosen": f"{DIALOGUE}a", "rejected": f"{DIALOGUE}b"},
        {"form": "hh-rlhf"},
    ),
}


def as_read(fields, topology):
    """Return the object with its place."""
    return (topology.line, topology.index, fields)


def read(path, **settings):
    return list(read_parquet_rows(path, as_read, **settings))


@pytest.fixture
def write(tmp_path):
    def write(records: list[dict] | dict, name: str = "data.parquet", **settings):
        make = pyarrow.table if isinstance(records, dict) else pyarrow.Table.from_pylist
        parquet.write_table(make(records), tmp_path / name, **settings)
        return tmp_path / name

    return write


def test_rows_are_the_objects_that_json_lines_would_hold(write):
    rows = [
        {"messages": TURNS, "n": 1, "x": 0.5, "yes": True, "meta": {"source": ["a", None], "at": None}},
        {"messages": TURNS[1:], "n": 2, "x": None, "yes": False, "meta": {"source": [], "at": 3}},
    ]
    expected = [
        {"messages": TURNS, "n": 1, "x": 0.5, "yes": True, "meta": {"source": ["a", None]}},
        {"messages": TURNS[1:], "n": 2, "yes": False, "meta": {"source": [], "at": 3}},
    ]
    assert read(write(rows)) == [(1, 0, expected[0]), (2, 1, expected[1])]


def test_a_table_may_mix_the_forms_of_a_prompt_and_of_an_answer(write):
    path = write(
        {
            "prompt": ["hi", None, None],
            "messages": [None, TURNS, None],
            "prompt_tokens": [None, None, [0, 5]],
            "response": ["a", "", None],
            "response_tokens": pyarrow.array([None, None, [2, 3]], pyarrow.list_(pyarrow.int32())),
            "id": pyarrow.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    records = list(read_demonstrations(path))
    turns = (Message(role="system", content="be kind"), Message(role="user", content="hi", metadata="x"))
    assert [record.prompt for record in records] == [(USER,), turns, TokenIds((0, 5))]
    assert [record.response for record in records] == ["a", "", TokenIds((2, 3))]
    assert [record.extra["id"] for record in records] == ["x", "y", "x"]


@pytest.mark.parametrize(("reader", "good", "settings"), READERS.values(), ids=READERS)
def test_every_reader_names_a_bad_row_or_skips_and_counts_it(write, caplog, reader, good, settings):
    path = write([good, good | dict.fromkeys(good), good])  # the second row is all null
    with pytest.raises(RecordError, match=r"there is no|must be a text, not null") as caught:
        list(reader(path, **settings))
    assert str(caught.value).startswith(f"{path}:2: ")
    report = ReadReport()
    with caplog.at_level(logging.WARNING):
        records = list(reader(path, on_error="skip", report=report, **settings))
    assert [(record.location.line, record.location.index) for record in records] == [(1, 0), (3, 2)]
    assert (report.num_records, report.num_skipped, report.num_blank) == (2, 1, 0)
    assert f"{path}: skipped 1 of 3 records; the first: {path}:2: " in caplog.text


def not_parquet(path, content):
    path.write_bytes(b'{"prompt": "hi"}\n')


def empty(path, content):
    path.write_bytes(b"")


def cut_off(path, content):
    path.write_bytes(content[: len(content) // 2])


def folder(path, content):
    path.unlink()
    path.mkdir()
    (path / "train-00000.parquet").write_bytes(content)


def missing(path, content):
    path.unlink()


BAD_FILES = {
    "not parquet": (not_parquet, "is not parquet; a file of JSON lines is named"),
    "empty": (empty, "is empty; it must hold at least one record"),
    "cut off": (cut_off, "is damaged or truncated: .*; download it again"),
    "a folder": (folder, r"is a folder; give a file of records, such as train-00000\.parquet in it"),
    "missing": (missing, "cannot be read: No such file"),
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(("damage", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_every_reader_refuses_a_bad_file_at_once(write, damage, says, on_error):
    for reader, good, settings in READERS.values():
        path = write([good], f"{damage.__name__}_{len(good)}_{reader.__name__}{len(settings)}.parquet")
        damage(path, path.read_bytes())
        with pytest.raises(RecordError, match=says) as caught:
            reader(path, on_error=on_error, **settings)
        assert (caught.value.path, caught.value.line) == (path, 0)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_table_without_rows_or_without_the_columns_leaves_no_record(write, on_error):
    for reader, good, settings in READERS.values():
        nothing = write({name: pyarrow.array([], pyarrow.string()) for name in good})
        with pytest.raises(RecordError, match="no record is left: it has no row"):
            list(reader(nothing, on_error=on_error, **settings))
        other = write([{"question": "hi", "id": 3}])
        with pytest.raises(RecordError, match=r"there is no 'prompt'|'chosen' must be a text, not null"):
            list(reader(other, on_error=on_error, **settings))


def test_columns_of_types_without_json_form_are_named_and_skipped(write, caplog):
    day = datetime.date(2024, 1, 1)
    path = write({"prompt": ["hi"], "image": [b"\xff"], "day": [day], "turns": [[{"at": day}]]})
    with caplog.at_level(logging.WARNING):
        assert read(path) == [(1, 0, {"prompt": "hi"})]
    assert "column 'image' (binary), 'day' (date32[day]), 'turns' (list<" in caplog.text
    with pytest.raises(RecordError, match=r"no column of texts, numbers, .*; it has 'image' \(binary\)"):
        read(write({"image": [b"\xff"]}))


def test_values_outside_json_make_a_bad_row(write):
    broken = pyarrow.array([b"a", b"b", b"\xff", b"d", b"e"]).cast(pyarrow.string(), safe=False)
    path = write({"a": broken, "x": [1.0, float("nan"), 1.0, 1.0, None], "y": [[1.0]] * 4 + [[float("inf")]]})
    report = ReadReport()
    records = read(path, on_error="skip", report=report)
    assert [(line, index) for line, index, _ in records] == [(1, 0), (4, 3)]
    assert [(error.line, error.reason.split(":")[0]) for error in report.errors] == [
        (2, "the number nan is not JSON; write null instead"),
        (3, "not usable"),
        (5, "the number inf is not JSON; write null instead"),
    ]


def test_row_groups_are_read_in_order(write):
    """Rows of the first groups are there although a later one is damaged, which is always an error."""
    texts = [f"{number * 7919}" * 50 for number in range(3000)]
    path = write({"prompt": texts}, row_group_size=1000, write_page_checksum=True, use_dictionary=False)
    chunk = parquet.read_metadata(path).row_group(2).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        records = read_parquet_rows(path, as_read, on_error=on_error)
        assert [next(records)[0] for _ in range(2000)] == list(range(1, 2001))
        with pytest.raises(
            RecordError, match=r":2001: the file cannot be read beyond this row: .*; download it"
        ):
            next(records)


def test_only_a_part_of_a_large_file_is_in_memory(write):
    path = write({"prompt": ["x" * 1000] * 40_000}, use_dictionary=False, compression="none")
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_parquet_rows(path, as_read):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8 * 2**20  # of 40 MB


def test_without_pyarrow_a_sentence_says_what_to_install(write, monkeypatch):
    path = write([{"prompt": "hi"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(pyarrow, "parquet")
    with pytest.raises(RecordError, match=r"needs pyarrow: pip install 'glm-rlhf\[parquet\]'"):
        read_prompts(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(RecordError, match="two columns named 'prompt'"):
        read_prompts(tmp_path / "data.parquet")
