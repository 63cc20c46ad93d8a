"""Stores of ids: what is stored is what the tokenizer says, limits, the cache's key, ranks."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glm_rlhf.engine.data import token_store
from glm_rlhf.engine.data.jsonl import RecordError
from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.token_files import tokenizer_digest
from glm_rlhf.engine.data.token_store import TokenStore, open_store

REPOSITORY = Path(__file__).parents[3]
LIMITS = {"max_prompt_tokens": 500, "max_tokens": 1000}

TEXTS = [
    {"prompt": "What is 1 + 1?", "response": "It is 2.", "chosen": "2", "rejected": "three, I believe"},
    {"prompt": "你好", "response": "", "chosen": "你好！", "rejected": ""},
    {"prompt": "a", "response": "b c", "chosen": "d", "rejected": "d"},
]
KEPT = {"prompts": (), "demonstrations": ("response",), "pairs": ("chosen", "rejected")}


@pytest.fixture
def write(tmp_path):
    def write(*records: dict, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts(write):
    """A file of three records of any kind."""

    def texts(kind: str) -> Path:
        keys = ("prompt", *KEPT[kind])
        return write(*[{key: record[key] for key in keys} for record in TEXTS])

    return texts


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "tokens"


def ids(num_prompt: int, *num_answers: int) -> dict:
    """Return a record that is ids: a prompt and no answer, a response, or a pair."""
    names = KEPT[("prompts", "demonstrations", "pairs")[len(num_answers)]]
    lengths = zip(("prompt", *names), (num_prompt, *num_answers), strict=True)
    return {f"{name}_tokens": list(range(1, length + 1)) for name, length in lengths}


def open_ids(path: Path, kind: str, folder: Path, **arguments) -> TokenStore:
    limits = {"max_prompt_tokens": 6, "max_tokens": 10}
    return open_store(path, kind, folder=folder, tokenizer=None, **(limits | arguments))


def parts(store: TokenStore) -> list[list[list[int]]]:
    """Return all that a store holds."""
    names = ("prompt", *KEPT[store.kind])
    return [[getattr(store, name)(i).tolist() for name in names] for i in range(len(store))]


def stores(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


@pytest.mark.parametrize("kind", list(KEPT))
def test_a_store_holds_what_the_tokenizer_renders(texts, folder, either, kind):
    store = open_store(texts(kind), kind, folder=folder, tokenizer=either, **LIMITS)
    prompts = [
        either.render([Message(role="user", content=r["prompt"])], add_generation_prompt=True) for r in TEXTS
    ]
    answers = [[either.render_response(record[name]) for name in KEPT[kind]] for record in TEXTS]
    assert parts(store) == [[prompt, *rest] for prompt, rest in zip(prompts, answers, strict=True)]
    assert [store.record_index(i) for i in range(3)] == [0, 1, 2]
    expected = [
        sum(map(len, rest)) + max(1, len(rest)) * len(p) for p, rest in zip(prompts, answers, strict=True)
    ]
    assert store.lengths.tolist() == expected
    assert store.lengths.dtype == np.int64
    assert store.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    for column, name in enumerate(KEPT[kind]):
        assert getattr(store, f"{name}_lengths").tolist() == [len(answer[column]) for answer in answers]
    assert store.report.num_tokens == sum(map(len, prompts)) + sum(len(a) for rest in answers for a in rest)


def test_views_are_int32_and_cannot_be_written(texts, folder, tiny):
    store = open_store(texts("pairs"), "pairs", folder=folder, tokenizer=tiny, **LIMITS)
    view = store.chosen(0)
    assert (view.dtype, type(view), view.base is None) == (np.int32, np.ndarray, False)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_what_is_not_there_is_refused(write, folder):
    store = open_ids(write(ids(1), ids(2)), "prompts", folder)
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"record {i} of a store with 2 records"):
            store.prompt(i)
        with pytest.raises(IndexError):
            store.record_index(i)
    for name in ("response", "chosen", "rejected"):
        with pytest.raises(ValueError, match=f"a store of prompts has no {name}"):
            getattr(store, name)(0)
    with pytest.raises(ValueError, match="has no chosen"):
        store.chosen_lengths  # noqa: B018


def test_a_bad_record_is_an_error_or_skipped_and_counted(write, folder):
    path = write(ids(1, 1), {"prompt_tokens": []}, ids(2, 2), ids(3, 100))
    with pytest.raises(RecordError, match="at least one token id") as caught:
        open_ids(path, "demonstrations", folder)
    assert caught.value.line == 2

    for _ in range(2):  # built, then found
        store = open_ids(path, "demonstrations", folder, on_error="skip")
        assert [store.record_index(i) for i in range(len(store))] == [0, 2]
        report = store.report
        assert (report.num_records, report.num_skipped, report.num_truncated) == (2, 2, 0)
        assert [error.line for error in report.errors] == [2, 4]
        assert report.lines()[0] == "2 records with 6 tokens, 2 bad records skipped"
        assert report.lines()[1].startswith(f"  skipped: {path}:2: 'prompt_tokens' must be")
        assert json.loads(json.dumps(report.as_dict()))["errors"][1].startswith(f"{path}:4: ")


def test_a_report_says_how_many_reasons_it_does_not_show(write, folder):
    store = open_ids(write(ids(1), *[{}] * 25), "prompts", folder, on_error="skip")
    assert (store.report.num_skipped, len(store.report.errors)) == (25, 20)
    assert store.report.lines()[-1] == "  skipped: 5 more"


def test_a_file_without_a_good_record_is_an_error_even_when_skipping(write, folder):
    with pytest.raises(RecordError, match="no record is left: all 2 are bad"):
        open_ids(write(ids(7), ids(8)), "prompts", folder, on_error="skip")
    assert stores(folder) == []


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        (ids(6), "prompts", None),
        (ids(7), "prompts", "the prompt has 7 tokens, max_prompt_tokens allows 6"),
        (ids(6, 4), "demonstrations", None),
        (ids(6, 5), "demonstrations", "prompt and response have 11 tokens, the model's context is 10"),
        (ids(2, 8, 8), "pairs", None),
        (ids(2, 9, 1), "pairs", "prompt and chosen have 11 tokens"),
        (ids(2, 1, 9), "pairs", "prompt and rejected have 11 tokens"),
    ],
)
def test_limits_are_the_last_length_that_fits(write, folder, record, kind, says):
    path = write(record)
    if says is None:
        assert len(open_ids(path, kind, folder)) == 1
    else:
        with pytest.raises(RecordError, match=says) as caught:
            open_ids(path, kind, folder)
        assert caught.value.line == 1


def test_a_prompt_that_fills_the_context_leaves_no_room(write, folder):
    arguments = {"max_prompt_tokens": 10, "truncates": True}
    assert len(open_ids(write(ids(9)), "prompts", folder, **arguments)) == 1
    for record, kind in ((ids(10), "prompts"), (ids(10, 1), "demonstrations")):
        with pytest.raises(RecordError, match="leaves no room for an answer in a context of 10"):
            open_ids(write(record), kind, folder, **arguments)


def test_answers_are_cut_only_when_asked_and_counted(write, folder):
    path = write(ids(6, 4, 9), ids(6, 5, 5), ids(1, 1, 1))
    store = open_ids(path, "pairs", folder, truncates=True)
    assert parts(store)[:2] == [[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4]]] * 2
    assert store.report.num_truncated == 3
    assert store.report.lines() == ["3 records with 31 tokens, 3 answers cut at the context's end"]


def test_a_text_without_a_tokenizer_is_a_bad_record(texts, folder):
    with pytest.raises(RecordError, match="no tokenizer is given"):
        open_ids(texts("prompts"), "prompts", folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "pair"}, "kind is 'pair'; it must be one of prompts, demonstrations, pairs"),
        ({"form": "hh-rlhf"}, "form is 'hh-rlhf', but prompts have only one form"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 2**31 + 1}, "vocab_size is 2147483649"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_impossible_arguments_are_refused(write, folder, arguments, says):
    with pytest.raises(ValueError, match=says):
        open_ids(write(ids(1)), **({"kind": "prompts", "folder": folder} | arguments))


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(texts, folder, tiny):
    with pytest.raises(ValueError, match="they do not belong together"):
        open_store(texts("prompts"), "prompts", folder=folder, tokenizer=tiny, vocab_size=639, **LIMITS)


def test_ids_of_the_file_must_be_below_the_vocabulary(write, folder):
    with pytest.raises(RecordError, match=r"prompt_tokens\[4\] is 5; ids go from 0 to 4"):
        open_ids(write(ids(5)), "prompts", folder, vocab_size=5)


def test_the_largest_id_survives(write, folder):
    store = open_ids(write({"prompt_tokens": [0, 2**31 - 1]}), "prompts", folder)
    assert store.prompt(0).tolist() == [0, 2**31 - 1]


def refuse(*_: object, **__: object) -> dict:
    raise AssertionError("records were tokenised again")


def test_a_file_is_tokenised_once_wherever_it_lies(texts, folder, tiny, tmp_path, monkeypatch):
    path = texts("pairs")
    arguments = {"folder": folder, "tokenizer": tiny, **LIMITS}
    built = parts(open_store(path, "pairs", **arguments))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(token_store, "write_records", refuse)
    assert parts(open_store(path, "pairs", **arguments)) == built
    assert parts(open_store(copy, "pairs", **arguments)) == built


def test_whatever_decides_the_ids_decides_the_store(write, folder, tiny, glm4, monkeypatch):
    path = write({"prompt": "hi", "response": "there"}, name="a.jsonl")
    other_file = write({"prompt": "hi", "response": "you"}, name="b.jsonl")
    base = {"path": path, "kind": "demonstrations", "folder": folder, "tokenizer": tiny, **LIMITS}
    changes = [
        {},
        {"path": other_file},
        {"kind": "prompts"},
        {"tokenizer": glm4},
        {"tokenizer": dataclasses.replace(tiny, chat=dataclasses.replace(tiny.chat, opening=()))},
        {"max_prompt_tokens": 499},
        {"max_tokens": 999},
        {"vocab_size": 1000},
        {"on_error": "skip"},
        {"truncates": True},
    ]
    for number, change in enumerate(changes, start=1):
        store = open_store(**(base | change))
        assert len(stores(folder)) == number, change
        assert store.prompt(0).tolist() == (base | change)["tokenizer"].render(
            [Message(role="user", content="hi")], add_generation_prompt=True
        )
    monkeypatch.setattr(token_store, "FORMAT", token_store.FORMAT + 1)
    open_store(**base)
    assert len(stores(folder)) == len(changes) + 1


def test_merges_count_for_the_tokenizers_identity_though_no_table_shows_them(tiny):
    reversed_text = dataclasses.replace(tiny, encode_text=partial(encode_backwards, tiny.encode_text))
    assert tokenizer_digest(tiny) != tokenizer_digest(reversed_text)
    assert tokenizer_digest(tiny) == tokenizer_digest(dataclasses.replace(tiny))


def encode_backwards(encode, text: str) -> list[int]:
    return encode(text)[::-1]


@pytest.mark.parametrize("name", ["tokens.int32", "offsets.int64", "records.int64", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_store_is_rebuilt(write, folder, name, how, caplog):
    path = write(ids(3, 4), ids(2, 2))
    expected = parts(open_ids(path, "demonstrations", folder))
    (place,) = stores(folder)
    file = folder / place / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if how == "truncated" else bytes([content[0] ^ 1]) + content[1:])
    assert parts(open_ids(path, "demonstrations", folder)) == expected
    assert "built anew" in caplog.text
    assert stores(folder) == [place]


def test_a_store_of_another_version_under_this_ones_name_is_rebuilt(write, folder, monkeypatch):
    path = write(ids(3, 4))
    open_ids(path, "demonstrations", folder)
    (now,) = stores(folder)
    monkeypatch.setattr(token_store, "FORMAT", 0)
    monkeypatch.setattr(token_store, "write_records", write_nothing)
    open_ids(path, "demonstrations", folder)
    (old,) = set(stores(folder)) - {now}
    monkeypatch.undo()
    for file in (folder / now).iterdir():
        file.write_bytes((folder / old / file.name).read_bytes())
    assert parts(open_ids(path, "demonstrations", folder)) == [[[1, 2, 3], [1, 2, 3, 4]]]


def write_nothing(folder: Path, source: object, tokenizer: object) -> dict:
    np.array([9, 9], np.int32).tofile(folder / "tokens.int32")
    np.array([0, 1, 2]).tofile(folder / "offsets.int64")
    np.array([0]).tofile(folder / "records.int64")
    counts = dict.fromkeys(("num_skipped", "num_blank", "num_truncated"), 0)
    return counts | {"num_records": 1, "num_tokens": 2, "errors": []}


def test_a_file_that_grows_while_it_is_read_is_refused(write, folder, tiny):
    path = write({"prompt": "hi"}, {"prompt": "you"})
    growing = dataclasses.replace(tiny, encode_text=partial(encode_and_append, path, tiny.encode_text))
    with pytest.raises(RecordError, match="changed while it was read"):
        open_store(path, "prompts", folder=folder, tokenizer=growing, **LIMITS)
    assert stores(folder) == []


def encode_and_append(path: Path, encode, text: str) -> list[int]:
    if text == "you":
        with path.open("a") as file:
            file.write('{"prompt": "more"}\n')
    return encode(text)


def on_ranks(num_ranks: int, call) -> list:
    """Return what `call(rank, barrier)` returned or raised on each of some threads with one barrier."""
    barrier = threading.Barrier(num_ranks, timeout=30)
    outcomes: list = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            outcomes[rank] = call(rank, barrier.wait)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_one_rank_builds_and_the_others_map_the_same(write, folder, monkeypatch):
    path = write(ids(3, 4), ids(2, 2))
    builders = []
    write_records = token_store.write_records
    monkeypatch.setattr(
        token_store,
        "write_records",
        lambda *args, **kwargs: (builders.append(1), write_records(*args, **kwargs))[1],
    )
    found = on_ranks(
        3,
        lambda rank, barrier: open_ids(path, "demonstrations", folder, is_builder=rank == 0, barrier=barrier),
    )
    assert [parts(store) for store in found] == [parts(found[0])] * 3
    assert builders == [1]


@pytest.mark.parametrize("fault", ["a bad record", "no file", "no room"])
def test_a_fault_ends_all_ranks_and_none_waits(write, folder, fault):
    path = write(ids(3, 4), {})
    if fault == "no file":
        path.unlink()
    if fault == "no room":
        folder.write_text("not a folder")
    errors = on_ranks(
        3,
        lambda rank, barrier: open_ids(path, "demonstrations", folder, is_builder=rank == 0, barrier=barrier),
    )
    expected = {"a bad record": RecordError, "no file": RecordError, "no room": OSError}[fault]
    assert isinstance(errors[0], expected), errors[0]
    for error in errors[1:]:
        assert isinstance(error, ValueError)
        if fault != "no file":
            assert "the rank that tokenises" in str(error)


BUILD = """
import hashlib, sys
from glm_rlhf.engine.data.token_store import open_store
from glm_rlhf.engine.data.tokenizer import load_tokenizer

path, folder, tokenizer = sys.argv[1:]
arguments = {"tokenizer": load_tokenizer(tokenizer), "max_prompt_tokens": 500, "max_tokens": 1000}
print("ready", flush=True)
sys.stdin.readline()
store = open_store(path, "pairs", folder=folder, **arguments)
digest = hashlib.sha256()
for i in range(len(store)):
    for part in (store.prompt(i), store.chosen(i), store.rejected(i)):
        digest.update(part.tobytes())
print(len(store), digest.hexdigest(), flush=True)
"""


def test_two_processes_that_build_at_once_end_with_one_store(write, folder, tiny):
    records = [{k: f"{v} {i}" for k, v in TEXTS[0].items() if k != "response"} for i in range(300)]
    path = write(*records)
    command = [sys.executable, "-c", BUILD, path, folder, REPOSITORY / "examples" / "tiny_tokenizer"]
    # Another seed of Python's hashes each: the key must not depend on the order of a set.
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]

    store = open_store(path, "pairs", folder=folder, tokenizer=tiny, **LIMITS)
    digest = hashlib.sha256(
        b"".join(np.array(part, np.int32).tobytes() for row in parts(store) for part in row)
    )
    assert said == [f"300 {digest.hexdigest()}\n"] * 2
    assert len(stores(folder)) == 1
