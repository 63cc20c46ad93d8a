"""What training opens: a bad record ends every rank or is counted, and no line is unaccounted for."""

import json
from pathlib import Path

import pytest
from tiny_training import CONFIG

from glm_rlhf.engine.build.prompts import read_prompt_inputs
from glm_rlhf.engine.build.records import open_demonstrations, open_pairs
from glm_rlhf.engine.config.training import DemonstrationsSection, PairsSection
from glm_rlhf.engine.data.records.reading import ReadReport, RecordError
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout

DEMONSTRATION = '{"prompt_tokens": [3, 4], "response_tokens": [5, 6]}'
PAIR = '{"prompt_tokens": [3, 4], "chosen_tokens": [5, 6], "rejected_tokens": [7]}'
BAD_LINES = {
    "trailing comma": '{"prompt_tokens": [3],}',
    "NaN": '{"prompt_tokens": [3], "response_tokens": NaN}',
    "a key twice": '{"prompt_tokens": [3], "prompt_tokens": [3]}',
    "a list": "[]",
    "NUL": '{"prompt": "a\0b"}',
    "no prompt": '{"response_tokens": [5], "chosen_tokens": [5], "rejected_tokens": [6]}',
    "prompt null": '{"prompt": null, "response_tokens": [5], "chosen_tokens": [5], "rejected_tokens": [6]}',
    "no answer": '{"prompt_tokens": [3, 4]}',
    "an empty answer of ids": '{"prompt_tokens": [3], "response_tokens": [], "chosen_tokens": []}',
    "an id the model has not": '{"prompt_tokens": [64], "response_tokens": [5], "chosen_tokens": [5], '
    '"rejected_tokens": [6]}',
    "a prompt over the limit": '{"prompt_tokens": [3, 3, 3, 3, 3, 3, 3], "response_tokens": [5], '
    '"chosen_tokens": [5], "rejected_tokens": [6]}',
    "over the context": '{"prompt_tokens": [3, 3, 3, 3], "response_tokens": [5, 5, 5, 5, 5, 5, 5], '
    '"chosen_tokens": [5, 5, 5, 5, 5, 5, 5], "rejected_tokens": [6]}',
    "a text without a tokenizer": '{"prompt": "hi", "response": "a", "chosen": "a", "rejected": "b"}',
}
LIMITS = {"max_prompt_tokens": 6, "max_tokens": 10}


def open_lines(kind: str, lines: list[str], folder: Path, **options):
    """Open a file of lines on this rank alone as what `kind` of training reads."""
    path = folder / f"{kind}.jsonl"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    with open_topology(Layout()) as topology:
        if kind == "demonstrations":
            section = DemonstrationsSection(path=str(path), **LIMITS, **options)
            return open_demonstrations(section, folder / "run", None, CONFIG, topology=topology)
        section = PairsSection(path=str(path), **LIMITS, **options)
        return open_pairs(section, folder / "run", None, CONFIG, seed=0, topology=topology)


@pytest.mark.parametrize(("kind", "good"), [("demonstrations", DEMONSTRATION), ("pairs", PAIR)])
def test_every_line_is_learned_from_or_counted(tmp_path, capsys, kind, good):
    lines = [line for bad in BAD_LINES.values() for line in (good, bad, "")]
    records, _ = open_lines(kind, lines, tmp_path, on_error="skip")
    assert len(records) == len(BAD_LINES)
    path = str(tmp_path / f"{kind}.jsonl")
    assert [records.name(number) for number in range(3)] == [f"record {i} of {path}" for i in (0, 2, 4)]
    report = json.loads((tmp_path / "run" / "data.json").read_text())[path]["records"]
    counted = report["num_records"] + report["num_skipped"] + report["num_blank"]
    assert (counted, report["num_skipped"]) == (len(lines), len(BAD_LINES))
    for number, error in enumerate(report["errors"]):
        assert error.startswith(f"{path}:{3 * number + 2}: ")
    assert f"{len(BAD_LINES)} bad records skipped" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "good"), [("demonstrations", DEMONSTRATION), ("pairs", PAIR)])
@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_its_file(tmp_path, kind, good, bad):
    with pytest.raises(RecordError) as caught:
        open_lines(kind, [good, "", bad, good], tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / kind}.jsonl:3: ")


@pytest.mark.parametrize(("kind", "good"), [("demonstrations", DEMONSTRATION), ("pairs", PAIR)])
def test_the_file_to_evaluate_on_is_held_to_the_same(tmp_path, kind, good):
    held = tmp_path / "held.jsonl"
    held.write_text(f"{good}\n{{}}\n")
    with pytest.raises(RecordError, match=r"held\.jsonl:2: "):
        open_lines(kind, [good], tmp_path, eval_path=str(held))
    _, found = open_lines(kind, [good], tmp_path, eval_path=str(held), on_error="skip")
    assert len(found) == 1
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report[str(held)]["records"]["num_skipped"] == 1


def open_on_all_ranks(path: Path, folder: Path, on_error: str) -> int | str:
    section = PairsSection(path=str(path), on_error=on_error)
    with open_topology(Layout(tp=2)) as topology:
        try:
            records, _ = open_pairs(section, folder, None, CONFIG, seed=0, topology=topology)
        except ValueError as error:
            return str(error)
    return len(records)


def test_all_ranks_end_or_have_the_same_records(ranks, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{PAIR}\n{{}}\n{PAIR}\n")
    said = ranks.run(open_on_all_ranks, path, tmp_path / "raise", "raise")
    assert any("pairs.jsonl:2: there is no 'prompt'" in answer for answer in said)
    assert all(isinstance(answer, str) for answer in said)
    assert ranks.run(open_on_all_ranks, path, tmp_path / "skip", "skip") == [2] * 4


def as_parquet(lines: list[str], path: Path) -> Path:
    """Write the records of some lines as a table."""
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import Table, parquet

    columns = {"prompt_tokens": None, "chosen_tokens": None, "rejected_tokens": None, "response_tokens": None}
    parquet.write_table(Table.from_pylist([columns | json.loads(line) for line in lines]), path)
    return path


def test_parquet_is_opened_as_json_lines_are(ranks, tmp_path):
    path = as_parquet([PAIR, "{}", PAIR], tmp_path / "pairs.parquet")
    said = ranks.run(open_on_all_ranks, path, tmp_path / "raise", "raise")
    assert any("pairs.parquet:2: there is no 'prompt'" in answer for answer in said)
    assert all(isinstance(answer, str) for answer in said)
    assert ranks.run(open_on_all_ranks, path, tmp_path / "skip", "skip") == [2] * 4

    path.write_bytes(path.read_bytes()[:-20])
    said = ranks.run(open_on_all_ranks, path, tmp_path / "cut", "skip")
    assert all("pairs.parquet: is damaged or truncated" in answer for answer in said)

    lines, _ = open_lines("demonstrations", [DEMONSTRATION] * 3, tmp_path)
    table = as_parquet([DEMONSTRATION] * 3, tmp_path / "demonstrations.parquet")
    section = DemonstrationsSection(path=str(table), **LIMITS)
    with open_topology(Layout()) as topology:
        rows, _ = open_demonstrations(section, tmp_path / "run", None, CONFIG, topology=topology)
    of_lines, of_rows = (
        [records.examples(number)[0] for number in range(len(records))] for records in (lines, rows)
    )
    assert [example.tokens_T.tolist() for example in of_rows] == [[3, 4, 5, 6]] * 3
    assert [example.tokens_T.tolist() for example in of_lines] == [[3, 4, 5, 6]] * 3

    path = as_parquet([DEMONSTRATION, PAIR], tmp_path / "prompts.parquet")
    report = ReadReport()
    prompts = read_prompt_inputs(
        str(path), None, CONFIG, max_prompt_tokens=6, on_error="raise", report=report
    )
    assert [prompt.tokens for prompt in prompts] == [(3, 4), (3, 4)]
    assert prompts[1].extra == {"chosen_tokens": [5, 6], "rejected_tokens": [7]}
