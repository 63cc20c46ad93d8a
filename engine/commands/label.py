"""The command `label`: pairs out of a policy's own answers, judged by a reward model."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from glm_rlhf.engine.build.models import DTYPES, load_main_model, load_other
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.commands.generate import Prompt, generate_answers, read_prompt_ids
from glm_rlhf.engine.config.training import LabelConfig
from glm_rlhf.engine.data.preferences.cleaning import VarianceReport, filter_prompts_by_reward_variance
from glm_rlhf.engine.data.records.files import read_record_file
from glm_rlhf.engine.data.records.jsonl_writer import json_lines
from glm_rlhf.engine.data.records.reading import ReadReport, RecordLocation
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.runs.run_folder import claim_outputs, record_config
from glm_rlhf.engine.scoring.sequence_scores import score_sequences
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.durable_io import replace_text

Answer = tuple[int, ...]
REPORT_NAME = "label.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """The best and the worst answer to one prompt."""

    chosen: Answer
    """Ids of the best."""
    rejected: Answer
    """Ids of the worst."""
    chosen_score: float
    """Its score."""
    rejected_score: float
    """Its score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelReport:
    """How many prompts gave a pair, and why the others gave none."""

    num_prompts: int
    """Prompts answered."""
    num_pairs: int
    """Pairs written, one a prompt at most."""
    num_same: int
    """Prompts whose answers are all the same."""
    num_close: int
    """Prompts whose best and worst score are equal, or closer than `label.min_margin`."""
    num_answers: int
    """Answers drawn."""
    num_skipped: int
    """Bad records of the prompts file that were skipped."""

    def lines(self) -> list[str]:
        """Return the report for people."""
        skipped = f" ({self.num_skipped} bad ones skipped)" if self.num_skipped else ""
        return [
            f"labelled {self.num_pairs} pairs of {self.num_prompts} prompts{skipped}",
            f"  excluded {self.num_same}: all answers are the same",
            f"  excluded {self.num_close}: best and worst score are equal or too close",
        ]


def run(config: LabelConfig) -> None:
    """Write one line a pair: `{"index", "prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_score",
    "rejected_score", "chosen_text", "rejected_text"}`, which `reward` and `dpo` read.

    The policy draws `generation.num_samples` answers to each prompt, then makes room for the reward model,
    and of each prompt the answers with the highest and the lowest score become a pair; of equal scores the
    first. Texts are null without a tokenizer. What gave no pair is counted and logged, and written to
    `<run.output>/label.json`; the same goes for prompts whose scores hardly vary, with `label.prompts_out`.
    Every rank of the launch calls it.

    Raises:
        ValueError: anything that the user has to fix.
    """
    start = time.monotonic()
    report_path = Path(config.run.output) / REPORT_NAME
    more = [] if config.label.prompts_out is None else [Path(config.label.prompts_out)]
    with open_world(config) as topology, claim_outputs(config, topology, report_path, *more):
        chunks, _, tokenizer = load_main_model(config, topology)
        glm, read = chunks[0].glm, ReadReport()
        with raise_on_all_ranks("reading the prompts"):
            prompts = read_prompt_ids(config, tokenizer, chunks[0], read)
        record_config(config, topology)
        answers = _answers(config, prompts, tokenizer, chunks, topology)
        del chunks
        scores = _scores(config, prompts, answers, glm, tokenizer, topology)
        with raise_on_all_ranks(f"writing {config.out_path}"):
            if topology.is_main_rank:
                report = _write_pairs(config, prompts, answers, scores, tokenizer, read)
                variance = _write_prompts(config, prompts, answers, scores)
                _tell(config, report, variance, time.monotonic() - start)


def best_and_worst(answers: Sequence[Answer], score_of: dict[Answer, float]) -> PreferencePair | None:
    """Return the pair that one prompt's answers give; None when they are all the same.

    Args:
        answers: in the order they were drawn; of equal scores the first counts.
        score_of: the score of each.
    """
    different = list(dict.fromkeys(answers))
    if len(different) < 2:
        return None
    best = max(different, key=score_of.__getitem__)
    worst = min((answer for answer in different if answer != best), key=score_of.__getitem__)
    return PreferencePair(
        chosen=best, rejected=worst, chosen_score=score_of[best], rejected_score=score_of[worst]
    )


def _answers(
    config: LabelConfig,
    prompts: list[Prompt],
    tokenizer: Tokenizer | None,
    chunks: list,
    topology: Topology,
) -> list[list[Answer]]:
    """Return the answers to each prompt in the order of their samples, on every rank."""
    completions = generate_answers(config, prompts, tokenizer, chunks, topology)
    by_prompt: list[list[Answer]] = [[] for _ in prompts]
    for done in sorted(completions, key=lambda done: (done.request, done.sample)):
        by_prompt[done.request].append(tuple(done.tokens))
    everyone = [by_prompt]
    dist.broadcast_object_list(everyone, src=0)
    return everyone[0]


def _scores(
    config: LabelConfig,
    prompts: list[Prompt],
    answers: list[list[Answer]],
    policy: GLMConfig,
    tokenizer: Tokenizer | None,
    topology: Topology,
) -> list[dict[Answer, float]]:
    """Return the score of each different answer to each prompt, on every rank."""
    dtype = DTYPES[config.train.dtype]
    chunks, _ = load_other(
        "reward.path",
        config.reward.path,
        topology,
        role="reward",
        dtype=dtype,
        beside=policy,
        tokenizer=tokenizer,
        tokenizer_path=config.tokenizer_path,
    )
    glm = chunks[0].glm
    different = [list(dict.fromkeys(of_prompt)) for of_prompt in answers]
    sequences = [
        [*prompt.ids, *answer]
        for prompt, of_prompt in zip(prompts, different, strict=True)
        for answer in of_prompt
    ]
    longest = max(map(len, sequences), default=0)
    if longest > glm.max_positions:
        raise ValueError(
            f"prompt and answer have up to {longest} tokens, the context of reward.path is "
            f"{glm.max_positions}: lower generation.max_new_tokens or data.max_prompt_tokens"
        )
    records = [prompt.index for prompt, of_prompt in zip(prompts, different, strict=True) for _ in of_prompt]
    scores = iter(
        score_sequences(
            chunks,
            sequences,
            topology=topology,
            max_tokens=config.train.micro_batch_tokens,
            records=records,
        )
    )
    return [{answer: next(scores) for answer in of_prompt} for of_prompt in different]


def _write_pairs(
    config: LabelConfig,
    prompts: list[Prompt],
    answers: list[list[Answer]],
    scores: list[dict[Answer, float]],
    tokenizer: Tokenizer | None,
    read: ReadReport,
) -> LabelReport:
    num_pairs = num_same = num_close = 0
    with json_lines(config.out_path) as write:
        for prompt, of_prompt, score_of in zip(prompts, answers, scores, strict=True):
            pair = best_and_worst(of_prompt, score_of)
            if pair is None:
                num_same += 1
                continue
            margin = pair.chosen_score - pair.rejected_score
            if margin == 0.0 or margin < config.label.min_margin:
                num_close += 1
                continue
            num_pairs += 1
            write(
                {
                    "index": prompt.index,
                    "prompt_tokens": prompt.ids,
                    "chosen_tokens": list(pair.chosen),
                    "rejected_tokens": list(pair.rejected),
                    "chosen_score": pair.chosen_score,
                    "rejected_score": pair.rejected_score,
                    "chosen_text": _text(pair.chosen, tokenizer),
                    "rejected_text": _text(pair.rejected, tokenizer),
                }
            )
    return LabelReport(
        num_prompts=len(prompts),
        num_pairs=num_pairs,
        num_same=num_same,
        num_close=num_close,
        num_answers=sum(map(len, answers)),
        num_skipped=read.num_skipped,
    )


def _text(answer: Answer, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.decode_response(list(answer), unknown="replace")


def _write_prompts(
    config: LabelConfig,
    prompts: list[Prompt],
    answers: list[list[Answer]],
    scores: list[dict[Answer, float]],
) -> VarianceReport | None:
    """Write the records of prompts whose scores vary, as they stand in the prompts file."""
    if config.label.prompts_out is None:
        return None
    rewards = [
        [score_of[answer] for answer in of_prompt]
        for of_prompt, score_of in zip(answers, scores, strict=True)
    ]
    kept, report = filter_prompts_by_reward_variance(rewards, config.label.min_variance)
    indices = {prompts[number].index for number in kept}

    def numbered(fields: dict, place: RecordLocation) -> tuple[int, dict]:
        return place.index, fields

    with json_lines(config.label.prompts_out) as write:
        for index, fields in read_record_file(config.data.path, numbered, on_error=config.data.on_error):
            if index in indices:
                write(fields)
    return report


def _tell(
    config: LabelConfig, report: LabelReport, variance: VarianceReport | None, elapsed_s: float
) -> None:
    path = Path(config.run.output) / REPORT_NAME
    values = {"pairs": asdict(report), "prompts": None if variance is None else variance.as_dict()}
    replace_text(path, json.dumps(values, indent=2) + "\n")
    lines = [*report.lines(), *([] if variance is None else variance.lines())]
    speed = report.num_answers / elapsed_s
    lines.append(
        f"{report.num_answers} answers in {elapsed_s:.1f} s, {speed:.1f} answers/s; written to "
        f"{config.out_path}"
    )
    log("\n".join(lines))
