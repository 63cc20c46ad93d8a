"""The records that a training command learns from, opened on every rank and reported once."""

import json
import os
from pathlib import Path

from glm_rlhf.engine.config.training import DemonstrationsSection, PairsSection
from glm_rlhf.engine.data.preferences.cleaning import balance_lengths, drop_contradictions, preferences_of
from glm_rlhf.engine.data.store.examples import Demonstrations, Pairs
from glm_rlhf.engine.data.store.token_store import TokenStore, open_store
from glm_rlhf.engine.data.store.token_writer import Kind
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.parallel.runtime.consensus import failure_barriers, raise_on_all_ranks
from glm_rlhf.parallel.runtime.launch import read_launch
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.durable_io import replace_text

REPORT_NAME = "data.json"


def open_demonstrations(
    data: DemonstrationsSection,
    run_folder: str | Path,
    tokenizer: Tokenizer | None,
    glm: GLMConfig,
    *,
    topology: Topology,
) -> tuple[Demonstrations, Demonstrations | None]:
    """Return the demonstrations to learn from and those to evaluate on; every rank calls this.

    They are tokenised into `<run_folder>/tokens`; what was skipped or cut is logged, and written to
    `<run_folder>/data.json`.

    Raises:
        ValueError: a bad file or record, on every rank.
    """
    report = _Report(Path(run_folder), topology)
    opened = []
    for path in (data.path, data.eval_path):
        store = _open(data, path, "demonstrations", report, tokenizer, glm) if path is not None else None
        opened.append(store and Demonstrations(store, path))
    report.write()
    return opened[0], opened[1]


def open_pairs(
    data: PairsSection,
    run_folder: str | Path,
    tokenizer: Tokenizer | None,
    glm: GLMConfig,
    *,
    seed: int,
    topology: Topology,
) -> tuple[Pairs, Pairs | None]:
    """Return the pairs to learn from, cleaned as asked, and those to evaluate on; every rank calls this.

    Contradictions go first, then lengths are balanced; pairs to evaluate on stay as they are. What was
    excluded and why is logged, and written to `<run_folder>/data.json`.

    Raises:
        ValueError: a bad file or record, or no pair is left, on every rank.
    """
    report = _Report(Path(run_folder), topology)
    store = _open(data, data.path, "pairs", report, tokenizer, glm)
    kept = list(range(len(store)))
    if data.drops_contradictions:
        kept, found = drop_contradictions(preferences_of(store), drops_repeats=data.drops_repeats)
        report.add(data.path, "contradictions", found.lines(), found.as_dict())
    if data.balances_lengths:
        places, found = balance_lengths(
            store.chosen_lengths[kept], store.rejected_lengths[kept], seed=seed, edges=data.length_edges
        )
        kept = [kept[i] for i in places]
        report.add(data.path, "length_balance", found.lines(), found.as_dict())
    eval_store = None
    if data.eval_path is not None:
        eval_store = _open(data, data.eval_path, "pairs", report, tokenizer, glm)
    report.write()
    if not kept:
        raise ValueError(
            f"{data.path}: none of its {len(store)} pairs is left to learn from, see {report.path}; "
            "switch off data.drops_contradictions or data.balances_lengths, or give more pairs"
        )
    return Pairs(store, data.path, kept), eval_store and Pairs(eval_store, data.eval_path)


def _open(
    data: DemonstrationsSection | PairsSection,
    path: str,
    kind: Kind,
    report: "_Report",
    tokenizer: Tokenizer | None,
    glm: GLMConfig,
) -> TokenStore:
    with failure_barriers(f"reading {path}") as barrier:
        store = open_store(
            path,
            kind,
            folder=report.path.parent / "tokens",
            tokenizer=tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=min(glm.max_positions, data.max_tokens or glm.max_positions),
            vocab_size=glm.vocab_size,
            form=data.form if isinstance(data, PairsSection) else "pairs",
            on_error=data.on_error,
            truncates=data.truncates,
            is_builder=_is_first_of_host(report.topology),
            barrier=barrier,
        )
    report.add(path, "records", store.report.lines(), store.report.as_dict())
    return store


def _is_first_of_host(topology: Topology) -> bool:
    """Whether this rank tokenises: one a host, since hosts may not see the same folder."""
    return (read_launch().local_rank if "LOCAL_RANK" in os.environ else topology.rank) == 0


class _Report:
    """The results of reading each file: logged by the main rank at once, written by it at the end."""

    def __init__(self, run_folder: Path, topology: Topology) -> None:
        self.topology, self.path = topology, run_folder / REPORT_NAME
        self._files: dict[str, dict] = {}

    def add(self, path: str, what: str, lines: list[str], values: dict) -> None:
        """Note one thing about a file."""
        self._files.setdefault(path, {})[what] = values
        log("\n".join((f"{path}: {lines[0]}", *lines[1:])), self.topology)

    def write(self) -> None:
        """Write all of it; every rank calls this."""
        with raise_on_all_ranks(f"writing {self.path}"):
            if self.topology.is_main_rank:
                replace_text(self.path, json.dumps(self._files, indent=2) + "\n")
