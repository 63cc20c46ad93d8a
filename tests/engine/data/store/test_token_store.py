"""Stores of ids: stored ids are the tokenizer's, the cache's key, damage, ranks."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from stored_ids import ANSWER_NAMES, ids, open_ids, parts, stores, write_lines

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.reading import RecordError
from glm_rlhf.engine.data.store import token_store
from glm_rlhf.engine.data.store.token_store import open_store

REPOSITORY = Path(__file__).parents[4]
LIMITS = {"max_prompt_tokens": 500, "max_tokens": 1000}

TEXTS = [
    {"prompt": "What is 1 + 1?", "response": "It is 2.", "chosen": "2", "rejected": "three, I believe"},
    {"prompt": "你好", "response": "", "chosen": "你好！", "rejected": ""},
    {"prompt": "a", "response": "b c", "chosen": "d", "rejected": "d"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def write(tmp_path):
    """Write the records of a file and return its path."""
    return partial(write_lines, tmp_path / "data.jsonl")


@pytest.fixture
def texts(write):
    """A file of three records of any kind."""

    def texts(kind: str) -> Path:
        keys = ("prompt", *ANSWER_NAMES[kind])
        return write(*[{key: record[key] for key in keys} for record in TEXTS])

    return texts


@pytest.mark.parametrize("kind", list(ANSWER_NAMES))
def test_a_store_holds_what_the_tokenizer_renders(texts, folder, either, kind):
    store = open_store(texts(kind), kind, folder=folder, tokenizer=either, **LIMITS)
    prompts = [
        either.render([Message(role="user", content=r["prompt"])], add_generation_prompt=True) for r in TEXTS
    ]
    answers = [[either.render_response(record[name]) for name in ANSWER_NAMES[kind]] for record in TEXTS]
    assert parts(store) == [[prompt, *rest] for prompt, rest in zip(prompts, answers, strict=True)]
    assert [store.record_index(i) for i in range(3)] == [0, 1, 2]
    expected = [
        sum(map(len, rest)) + max(1, len(rest)) * len(p) for p, rest in zip(prompts, answers, strict=True)
    ]
    assert store.lengths.tolist() == expected
    assert store.lengths.dtype == np.int64
    assert store.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    for column, name in enumerate(ANSWER_NAMES[kind]):
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
    with pytest.raises(ValueError, match="they are not of the same model"):
        open_store(texts("prompts"), "prompts", folder=folder, tokenizer=tiny, vocab_size=639, **LIMITS)


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


def test_whatever_decides_the_ids_decides_the_store(write, folder, tmp_path, tiny, glm4, monkeypatch):
    path = write({"prompt": "hi", "response": "there"})
    other_file = write_lines(tmp_path / "b.jsonl", {"prompt": "hi", "response": "you"})
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
    assert "it is rebuilt" in caplog.text
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


def on_ranks(num_ranks: int, call) -> list:
    """Return what `call(rank, barrier)` returned or raised on each of some threads with one barrier."""
    barrier = threading.Barrier(num_ranks, timeout=120)
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
from glm_rlhf.engine.data.store.token_store import open_store
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

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
    records = [
        {key: f"{text} {i}" for key, text in TEXTS[0].items() if key != "response"} for i in range(300)
    ]
    path = write(*records)
    command = [sys.executable, "-c", BUILD, path, folder, REPOSITORY / "examples" / "tiny_tokenizer"]
    # Another seed of Python's hashes there: the key must not depend on the order of a set.
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        store = open_store(path, "pairs", folder=folder, tokenizer=tiny, **LIMITS)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    content = b"".join(np.array(part, np.int32).tobytes() for row in parts(store) for part in row)
    assert output == f"300 {hashlib.sha256(content).hexdigest()}\n"
    assert len(stores(folder)) == 1
