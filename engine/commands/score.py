"""The command `score`: per-token logprobs of given answers under a policy, or a reward model's scores."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from glm_rlhf.engine.build.models import load_main_model
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.commands.score_reward_model import score_answers
from glm_rlhf.engine.config.sections import ScoreConfig
from glm_rlhf.engine.data.batching import pack_by_tokens
from glm_rlhf.engine.data.records.jsonl_writer import WriteLine, json_lines
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.data.records.schema import DemonstrationRecord, read_demonstrations
from glm_rlhf.engine.data.records.token_ids import answer_ids, prompt_ids
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.runs.run_folder import claim_outputs, record_config
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.model.packing import pack
from glm_rlhf.parallel.pipeline.scoring import score_tokens
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.hf_config import read_config
from glm_rlhf.parallel.weights.convert_folder import role_of

_WINDOW_BATCHES = 8  # micro-batches a data-parallel rank packs at a time: enough to fill them evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One record as ids."""

    index: int
    """Its place among the file's records."""
    prompt: list[int]
    """Ids before the response, at least one."""
    response: list[int]
    """Ids whose logprobs are asked for, at least one."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt) + len(self.response)


def run(config: ScoreConfig) -> None:
    """Write one line a demonstration: `{"index", "tokens", "logprobs"}` of the response's tokens.

    logprobs[i] = log p(tokens[i] | prompt, tokens[:i]), temperature 1. A reward model writes one score an
    answer instead, see `score_reward`. Every rank of the launch calls it; rank 0 writes and says what was
    done.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with open_world(config) as topology, claim_outputs(config, topology):
        with raise_on_all_ranks(f"reading {config.model.path}"):
            is_reward_model = _is_reward_model(config)
        if is_reward_model:
            score_answers(config, topology)
            return
        chunks, _, tokenizer = load_main_model(config, topology)
        record_config(config, topology)
        report = ReadReport()
        samples = _samples(config, tokenizer, chunks[0].glm, report)
        with contextlib.ExitStack() as stack:
            write = None
            with raise_on_all_ranks(f"writing {config.out_path}"):
                if topology.is_main_rank:
                    write = stack.enter_context(json_lines(config.out_path))
            done = _score_all(samples, chunks, topology, write, report, config)
            with raise_on_all_ranks(f"writing {config.out_path}"):
                stack.close()
        log(f"{done}; written to {config.out_path}", topology)


def _is_reward_model(config: ScoreConfig) -> bool:
    folder = Path(config.model.path)
    is_reward_model = role_of(folder, read_config(folder)) == "reward"
    if not is_reward_model and config.data.form != "demonstrations":
        raise ValueError(
            f"data.form is {config.data.form}, but {folder} is a policy, which scores demonstrations: give a "
            "reward model"
        )
    return is_reward_model


def _score_all(
    samples: Iterator[Sample],
    chunks: list[GLMModel],
    topology: Topology,
    write: WriteLine | None,
    report: ReadReport,
    config: ScoreConfig,
) -> str:
    """Score everything, write it on rank 0, and return what rank 0 has to say of it."""
    start, num_tokens, total = time.monotonic(), 0, 0.0
    budget = config.train.micro_batch_tokens
    bar = tqdm(desc="score", unit=" records", disable=None if topology.is_main_rank else True)
    while True:
        with raise_on_all_ranks("reading the data"):
            window = _take_window(samples, budget * topology.dp * _WINDOW_BATCHES)
        if not window:
            break
        found = _score_window(window, chunks, topology, budget)
        with raise_on_all_ranks(f"writing {config.out_path}"):
            for index, logprobs in sorted(found.items()) if write is not None else ():
                _check_finite(logprobs, window[index], config)
                write({"index": window[index].index, "tokens": window[index].response, "logprobs": logprobs})
                num_tokens += len(logprobs)
                total += sum(logprobs)
                bar.update()
    bar.close()
    elapsed = time.monotonic() - start
    skipped = f", {report.num_skipped} bad ones skipped" if report.num_skipped else ""
    return (
        f"scored {report.num_records} records{skipped}: {num_tokens} response tokens, mean logprob "
        f"{total / max(num_tokens, 1):.4f}, {num_tokens / elapsed:.0f} tokens/s"
    )


def _check_finite(logprobs: list[float], sample: Sample, config: ScoreConfig) -> None:
    if not math.isfinite(sum(logprobs)):
        raise ValueError(
            f"record {sample.index} has a logprob that is not finite: {config.model.path} holds weights that "
            f"are not, or train.dtype={config.train.dtype} overflows"
        )


def _score_window(
    window: list[Sample], chunks: list[GLMModel], topology: Topology, budget: int
) -> dict[int, list[float]]:
    """Return logprobs by place in the window, all of them on rank 0; each dp rank scores its share."""
    groups = pack_by_tokens([sample.num_tokens for sample in window], max_tokens=budget)
    mine = groups[topology.dp_rank :: topology.dp]
    micro_batches, wanted = [], []
    for group in mine:
        ids = [torch.tensor(window[index].prompt + window[index].response) for index in group]
        packed = pack(ids, multiple=topology.layout.token_multiple)
        is_wanted_T = torch.zeros(packed.num_tokens, dtype=torch.bool)
        for index, part in zip(group, packed.split(is_wanted_T), strict=True):
            part[len(window[index].prompt) :] = True
        micro_batches.append(packed.to(topology.device))
        wanted.append(is_wanted_T.to(topology.device))
    scored = score_tokens(chunks, micro_batches, topology=topology, wanted=wanted)
    found: dict[int, list[float]] = {}
    if not topology.tp_rank == topology.pp_rank == topology.cp_rank == 0:
        return found
    for group, packed, (logprobs_T, _) in zip(mine, micro_batches, scored, strict=True):
        for index, part in zip(group, packed.split(logprobs_T.cpu()), strict=True):
            found[index] = part[len(window[index].prompt) :].tolist()
    if topology.dp > 1:
        everyone: list[dict] = [{} for _ in range(topology.dp)]
        dist.all_gather_object(everyone, found, group=topology.dp_group)
        found = {index: logprobs for part in everyone for index, logprobs in part.items()}
    return found


def _take_window(samples: Iterator[Sample], max_tokens: int) -> list[Sample]:
    window: list[Sample] = []
    room = max_tokens
    for sample in samples:
        window.append(sample)
        room -= sample.num_tokens
        if room <= 0:
            break
    return window


def _samples(
    config: ScoreConfig, tokenizer: Tokenizer | None, glm: GLMConfig, report: ReadReport
) -> Iterator[Sample]:
    data = config.data
    sample_of = partial(
        _sample,
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        max_positions=glm.max_positions,
    )
    # A generator, so that a file that cannot be read is found where all ranks can agree on it.
    yield from read_demonstrations(
        data.path, vocab_size=glm.vocab_size, on_error=data.on_error, report=report, then=sample_of
    )


def _sample(
    record: DemonstrationRecord, *, tokenizer: Tokenizer | None, max_prompt_tokens: int, max_positions: int
) -> Sample:
    place = record.location
    prompt = prompt_ids(record.prompt, place, tokenizer)
    response = answer_ids(record.response, place, tokenizer)
    if len(prompt) > max_prompt_tokens:
        raise place.error(
            f"the prompt has {len(prompt)} tokens, data.max_prompt_tokens allows {max_prompt_tokens}"
        )
    if len(prompt) + len(response) > max_positions:
        raise place.error(
            f"prompt and response have {len(prompt) + len(response)} tokens, "
            f"the model's context is {max_positions}"
        )
    return Sample(index=place.index, prompt=prompt, response=response)
