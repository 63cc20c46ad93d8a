"""Files of records, and token stores built from them."""

import json
from pathlib import Path

from glm_rlhf.engine.data.store.token_store import TokenStore, open_store

ANSWER_NAMES = {"prompts": (), "demonstrations": ("response",), "pairs": ("chosen", "rejected")}


def write_lines(path: Path, *records: dict) -> Path:
    """Write the records to `path`, one per line, and return it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def ids(num_prompt: int, *num_answers: int) -> dict:
    """Return a record of token ids: a prompt alone, with a response, or with a pair."""
    names = ANSWER_NAMES[("prompts", "demonstrations", "pairs")[len(num_answers)]]
    lengths = zip(("prompt", *names), (num_prompt, *num_answers), strict=True)
    return {f"{name}_tokens": list(range(1, length + 1)) for name, length in lengths}


def open_ids(path: Path, kind: str, folder: Path, **arguments) -> TokenStore:
    """Return the store of a file of ids, with room for 6 of a prompt and 10 in all."""
    limits = {"max_prompt_tokens": 6, "max_tokens": 10}
    return open_store(path, kind, folder=folder, tokenizer=None, **(limits | arguments))


def parts(store: TokenStore) -> list[list[list[int]]]:
    """Return all that a store holds."""
    names = ("prompt", *ANSWER_NAMES[store.kind])
    return [[getattr(store, name)(i).tolist() for name in names] for i in range(len(store))]


def stores(folder: Path) -> list[str]:
    """Return the names of the stores in a folder of them."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
