"""The ids that a model's folder declares as the end of an answer."""

from collections.abc import Mapping
from pathlib import Path

_KEY = "eos_token_id"


def declared_stop_ids(config: Mapping, path: Path, *, num_ids: int, whose: str) -> list[int]:
    """Return `eos_token_id` of a parsed config, one id or a list of them, as a list; empty without one.

    Args:
        config: the content of `path`.
        path: `config.json` or `generation_config.json` of a folder, for errors.
        num_ids: ids are below it.
        whose: what has that many ids, for errors.

    Raises:
        ValueError: an entry is no id: a text, a bool, a fraction, null in a list, a list in a list, or out of
            range.
    """
    declared = config.get(_KEY)
    if declared is None:
        return []
    ids = declared if isinstance(declared, list) else [declared]
    for token in ids:
        if type(token) is not int or not 0 <= token < num_ids:
            raise ValueError(
                f"{path}: {_KEY} {token!r:.80} is not an id of {whose}, which has ids from 0 to "
                f"{num_ids - 1}; set it to one of them, or to a list of them"
            )
    return ids
