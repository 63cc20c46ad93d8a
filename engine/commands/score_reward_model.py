"""The command `score` with a reward model: one score an answer."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from glm_rlhf.engine.build.models import load_main_model
from glm_rlhf.engine.config.sections import ScoreConfig
from glm_rlhf.engine.data.records.jsonl_writer import json_lines
from glm_rlhf.engine.data.records.reading import ReadReport, RecordLocation
from glm_rlhf.engine.data.records.schema import (
    DemonstrationRecord,
    PairRecord,
    read_demonstrations,
    read_pairs,
)
from glm_rlhf.engine.data.records.token_ids import answer_ids, prompt_ids
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.runs.run_folder import record_config
from glm_rlhf.engine.scoring.sequence_scores import score_sequences
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig

_WINDOW_BATCHES = 8  # micro-batches a data-parallel rank packs at a time: enough to fill them evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One record as ids."""

    index: int
    """Its place among the file's records."""
    sequences: tuple[list[int], ...]
    """Prompt and answer, of the chosen and then of the other answer where it is a pair."""


def score_answers(config: ScoreConfig, topology: Topology) -> None:
    """Write one line a record: `{"index", "score"}`, of a pair `{"index", "chosen_score", "rejected_score"}`.

    A score is the scalar at an answer's last token. Every rank of the topology calls it; rank 0 writes and
    says what was done.

    Raises:
        ValueError: anything that the user has to fix.
    """
    chunks, _, tokenizer = load_main_model(config, topology, role="reward")
    record_config(config, topology)
    report, budget = ReadReport(), config.train.micro_batch_tokens
    records = _records(config, tokenizer, chunks[0].glm, report)
    start, num_answers, num_right = time.monotonic(), 0, 0.0
    bar = tqdm(desc="score", unit=" records", disable=None if topology.is_main_rank else True)
    with contextlib.ExitStack() as stack:
        write = None
        with raise_on_all_ranks(f"writing {config.out_path}"):
            if topology.is_main_rank:
                write = stack.enter_context(json_lines(config.out_path))
        while True:
            with raise_on_all_ranks("reading the data"):
                window = _take_window(records, budget * topology.dp * _WINDOW_BATCHES)
            if not window:
                break
            sequences = [sequence for record in window for sequence in record.sequences]
            scores = iter(
                score_sequences(
                    chunks,
                    sequences,
                    topology=topology,
                    max_tokens=budget,
                    records=[record.index for record in window for _ in record.sequences],
                )
            )
            with raise_on_all_ranks(f"writing {config.out_path}"):
                for record in window:
                    found = [next(scores) for _ in record.sequences]
                    num_answers += len(found)
                    num_right += (found[0] > found[-1]) + 0.5 * (found[0] == found[-1])
                    if write is not None:
                        write({"index": record.index, **_named(found)})
                    bar.update()
        with raise_on_all_ranks(f"writing {config.out_path}"):
            stack.close()
    bar.close()
    if topology.is_main_rank:
        skipped = f", {report.num_skipped} bad ones skipped" if report.num_skipped else ""
        is_pairs = num_answers > report.num_records > 0
        accuracy = f", accuracy {num_right / report.num_records:.4f}" if is_pairs else ""
        elapsed = time.monotonic() - start
        log(
            f"scored {report.num_records} records{skipped}: {num_answers} answers{accuracy}, "
            f"{num_answers / elapsed:.0f} answers/s; written to {config.out_path}"
        )


def _named(scores: list[float]) -> dict[str, float]:
    names = ("score",) if len(scores) == 1 else ("chosen_score", "rejected_score")
    return dict(zip(names, scores, strict=True))


def _take_window(records: Iterator[Judged], max_tokens: int) -> list[Judged]:
    window: list[Judged] = []
    room = max_tokens
    for record in records:
        window.append(record)
        room -= sum(map(len, record.sequences))
        if room <= 0:
            break
    return window


def _records(
    config: ScoreConfig, tokenizer: Tokenizer | None, glm: GLMConfig, report: ReadReport
) -> Iterator[Judged]:
    data = config.data
    then = partial(
        _judged,
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        max_positions=glm.max_positions,
    )
    options = {"vocab_size": glm.vocab_size, "on_error": data.on_error, "report": report, "then": then}
    # A generator, so that a file that cannot be read is found where all ranks can agree on it.
    if data.form == "demonstrations":
        yield from read_demonstrations(data.path, **options)
    else:
        yield from read_pairs(data.path, form=data.form, **options)


def _judged(
    record: DemonstrationRecord | PairRecord,
    *,
    tokenizer: Tokenizer | None,
    max_prompt_tokens: int,
    max_positions: int,
) -> Judged:
    place = record.location
    prompt = prompt_ids(record.prompt, place, tokenizer)
    if len(prompt) > max_prompt_tokens:
        raise place.error(
            f"the prompt has {len(prompt)} tokens, data.max_prompt_tokens allows {max_prompt_tokens}"
        )
    answers = (record.chosen, record.rejected) if isinstance(record, PairRecord) else (record.response,)
    sequences = tuple(prompt + answer_ids(answer, place, tokenizer) for answer in answers)
    _check_lengths(sequences, place, max_positions)
    return Judged(index=place.index, sequences=sequences)


def _check_lengths(sequences: tuple[list[int], ...], place: RecordLocation, max_positions: int) -> None:
    longest = max(map(len, sequences))
    if longest > max_positions:
        raise place.error(f"prompt and answer have {longest} tokens, the model's context is {max_positions}")
