"""Which settings decide the result of a run, and so may not change where it resumes.

A key that stands in no list below decides the result: a new one is refused until it is known to do no harm.
Settings that lead to files do not count by their name, but by what the files hold.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Effect = Literal["none", "last bits", "result"]
"""What another value does to a run that resumes: nothing; sums are made in another order, or another thing is
done from here on that is no other algorithm, so that equal bits end; it would be another run."""

_WITHOUT_EFFECT_SECTIONS = ("observe", "evaluate")
_WITHOUT_EFFECT = {
    *("run.name", "run.output", "run.resume", "run.watchdog_s", "parallel.timeout_s"),
    *("train.save_every", "train.save_every_s", "train.keep_last", "train.keep_every"),
    *("train.async_save", "train.export_every"),
    *("train.eval_every", "train.sample_every", "train.max_nonfinite_steps", "train.recompute_layers"),
    *("train.offload", "data.eval_records"),
    *("reward.timeout_s", "reward.retries", "reward.batch_size", "reward.concurrency"),
    *("reward.workers", "reward.function_timeout_s"),
}
_ON_LAST_BITS = {
    *("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.sequence_parallel"),
    *("generation.tp", "generation.pp", "generation.page_size", "generation.cache_bytes"),
    *("generation.max_batch", "generation.max_step_tokens", "ppo.overlap_scoring"),
    *("train.micro_batch_tokens", "train.overlap_communication"),
    *("train.steps", "optimizer.in_backward", "reward.on_error"),
}
"""With `train.steps` the learning rate ends elsewhere, `optimizer.in_backward` clips by other norms, and
`reward.on_error` decides whether an answer without a reward ends the run."""

KNOWN_KEYS = frozenset(_WITHOUT_EFFECT | _ON_LAST_BITS)
"""All keys that are listed by name."""


def effect_of(key: str) -> Effect:
    """Return what another value of a key does to a run that resumes."""
    if key in _WITHOUT_EFFECT or key.partition(".")[0] in _WITHOUT_EFFECT_SECTIONS or is_path(key):
        return "none"
    return "last bits" if key in _ON_LAST_BITS else "result"


def is_path(key: str) -> bool:
    """Return whether a key's value leads to files, which are compared in its place."""
    return key.endswith("path")


def flat_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config as JSON values by their keys, such as `train.steps`."""
    for section, keys in config.items():
        if isinstance(keys, Mapping):
            yield from ((f"{section}.{name}", value) for name, value in keys.items())
