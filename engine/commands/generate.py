"""The command `generate`: answers for a file of prompts."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from tqdm import tqdm

from glm_rlhf.engine.build.models import (
    answer_seed,
    load_main_model,
    stop_ids_of,
)
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.sections import GenerateConfig, GenerationSection
from glm_rlhf.engine.config.training import LabelConfig
from glm_rlhf.engine.data.records.jsonl_writer import WriteLine, json_lines
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.data.records.schema import PromptRecord, read_prompts
from glm_rlhf.engine.data.records.token_ids import prompt_ids
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rollout.generation_layout import generation_layout, weights_for_generation
from glm_rlhf.engine.rollout.generation_phase import GenerationPhase, deal_by_length
from glm_rlhf.engine.rollout.scheduling.request_queue import Completion, GenerationRequest
from glm_rlhf.engine.rollout.scheduling.requests import NonFiniteLogits
from glm_rlhf.engine.rollout.stop_strings import stop_check
from glm_rlhf.engine.runs.run_folder import claim_outputs, record_config
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.inference.weight_views import ChunkWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.nonfinite import abbreviate, raise_if_nonfinite
from glm_rlhf.parallel.runtime.topology import Topology

LOOK_AT_WEIGHTS = "nothing is written: look at its weights, or use train.dtype=fp32"
"""What a message says of a model whose outputs are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One record as ids."""

    index: int
    """Its place among the file's records."""
    ids: list[int]
    """What the model is given, at least one id."""


def run(config: GenerateConfig) -> None:
    """Write one line an answer: `{"index", "sample", "prompt_tokens", "tokens", "text", "logprobs",
    "sampling_logprobs", "finish_reason"}`.

    `logprobs` are those of the plain model, as `score` gives them; `sampling_logprobs` those of the
    distribution that was drawn from. `text` is null without a tokenizer. Every rank of the launch calls
    it; rank 0 writes, in the input's order, and says what was done.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with open_world(config) as topology, claim_outputs(config, topology):
        chunks, _, tokenizer = load_main_model(config, topology)
        report = ReadReport()
        with raise_on_all_ranks("reading the prompts"):
            prompts = read_prompt_ids(config, tokenizer, chunks[0], report)
        record_config(config, topology)
        with contextlib.ExitStack() as stack:
            write = None
            with raise_on_all_ranks(f"writing {config.out_path}"):
                if topology.is_main_rank:
                    write = stack.enter_context(json_lines(config.out_path))
            start = time.monotonic()
            completions = generate_answers(config, prompts, tokenizer, chunks, topology)
            with raise_on_all_ranks(f"writing {config.out_path}"):
                if write is not None:
                    _write_all(write, prompts, completions, tokenizer)
                stack.close()
        if topology.is_main_rank:
            _say(config, report, completions, time.monotonic() - start)


def generate_answers(
    config: GenerateConfig | LabelConfig,
    prompts: list[Prompt],
    tokenizer: Tokenizer | None,
    chunks: list[GLMModel],
    topology: Topology,
) -> list[Completion]:
    """Return all completions, in no order, on rank 0; each copy of the model answers its share of prompts.

    Every rank of the topology calls this.

    Args:
        config: how answers are drawn.
        prompts: of the whole launch; a completion's `request` is the place of its prompt among them.
        tokenizer: masks ids without a token, and knows what ends an answer; may be None.
        chunks: this rank's chunks of the policy.
        topology: layout and groups.

    Raises:
        FloatingPointError: logits on some rank are NaN or Inf; on all ranks of the world, with the records.
    """
    settings, glm = config.generation, chunks[0].glm
    with raise_on_all_ranks("finding the ids that end an answer"):
        stop_ids = stop_ids_of(config, tokenizer, glm)
    requests = [
        GenerationRequest(
            index=number,
            prompt=tuple(prompt.ids),
            num_samples=settings.num_samples,
            max_new_tokens=min(settings.max_new_tokens, glm.max_positions - len(prompt.ids)),
            stop_ids=stop_ids,
            seed=answer_seed(config) + prompt.index,
        )
        for number, prompt in enumerate(prompts)
    ]
    with contextlib.ExitStack() as stack:
        resharded = stack.enter_context(
            generation_layout(
                chunks, topology, tp=settings.tp, pp=settings.pp, timeout_s=config.parallel.timeout_s
            )
        )
        weights, topology = stack.enter_context(weights_for_generation(chunks, topology, resharded))
        return _answers_everywhere(prompts, requests, settings, tokenizer, weights, topology)


def _answers_everywhere(
    prompts: Sequence[Prompt],
    requests: list[GenerationRequest],
    settings: GenerationSection,
    tokenizer: Tokenizer | None,
    chunks: Sequence[GLMModel | ChunkWeights],
    topology: Topology,
) -> list[Completion]:
    """Return the answers to all requests on rank 0, drawn in the layout of `chunks`."""
    # Context-parallel ranks hold the whole model too: they are further copies here.
    copies = topology.dp_cp_group
    shares = deal_by_length(
        [len(request.prompt) for request in requests], rank=copies.rank(), num_ranks=copies.size()
    )
    mine = [requests[number] for number in shares]
    vocab_size = chunks[0].glm.vocab_size
    masked_V = None if tokenizer is None else tokenizer.unsampleable_ids(vocab_size).to(topology.device)
    sampling = SamplingSettings(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        masked_ids_V=masked_V,
    )
    longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
    bar = tqdm(
        total=len(mine) * settings.num_samples,
        desc="generate",
        unit=" answers",
        disable=None if topology.is_main_rank else True,
    )
    found, findings = [], []
    with bar, GenerationPhase(chunks, topology=topology, batch=settings, longest=longest) as phase:
        try:
            for completion in phase.run(mine, sampling, stop_check=stop_check(settings.stop, tokenizer)):
                found.append(completion)
                bar.update()
        except NonFiniteLogits as error:  # on every rank of this copy of the model; others continue
            records = abbreviate([prompts[request].index for request in error.requests])
            findings = [f"the policy's logits in the answers to records {records}"]
    raise_if_nonfinite(findings, LOOK_AT_WEIGHTS, device=topology.device)
    if copies.size() > 1 and topology.tp_rank == topology.pp_rank == 0:
        everyone: list[list[Completion]] = [[] for _ in range(copies.size())]
        dist.all_gather_object(everyone, found, group=copies)
        found = [completion for part in everyone for completion in part]
    return found


def read_prompt_ids(
    config: GenerateConfig | LabelConfig, tokenizer: Tokenizer | None, model: GLMModel, report: ReadReport
) -> list[Prompt]:
    """Return the prompts of `data.path` as ids, each of which leaves room for an answer.

    Raises:
        RecordError: a bad file or record.
    """
    data, glm = config.data, model.glm
    to_prompt = partial(
        _prompt, tokenizer=tokenizer, longest=data.max_prompt_tokens, max_positions=glm.max_positions
    )
    return list(
        read_prompts(
            data.path, vocab_size=glm.vocab_size, on_error=data.on_error, report=report, then=to_prompt
        )
    )


def _prompt(record: PromptRecord, *, tokenizer: Tokenizer | None, longest: int, max_positions: int) -> Prompt:
    place = record.location
    ids = prompt_ids(record.prompt, place, tokenizer)
    if len(ids) > longest:
        raise place.error(f"the prompt has {len(ids)} tokens, data.max_prompt_tokens allows {longest}")
    if len(ids) >= max_positions:
        raise place.error(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the model's context "
            f"of {max_positions}"
        )
    return Prompt(index=place.index, ids=ids)


def _write_all(
    write: WriteLine, prompts: list[Prompt], completions: list[Completion], tokenizer: Tokenizer | None
) -> None:
    for done in sorted(completions, key=lambda done: (done.request, done.sample)):
        prompt, tokens = prompts[done.request], list(done.tokens)
        write(
            {
                "index": prompt.index,
                "sample": done.sample,
                "prompt_tokens": prompt.ids,
                "tokens": tokens,
                "text": None if tokenizer is None else tokenizer.decode_response(tokens, unknown="replace"),
                "logprobs": list(done.untempered_logprobs),
                "sampling_logprobs": list(done.logprobs),
                "finish_reason": done.finish_reason,
            }
        )


def _say(config: GenerateConfig, report: ReadReport, completions: list[Completion], elapsed_s: float) -> None:
    num_tokens = sum(len(done.tokens) for done in completions)
    num_cut = sum(done.finish_reason == "length" for done in completions)
    skipped = f" ({report.num_skipped} bad ones skipped)" if report.num_skipped else ""
    log(
        f"answered {report.num_records} prompts{skipped} with {len(completions)} answers, {num_cut} of them "
        f"cut at their longest: {num_tokens} tokens, {num_tokens / elapsed_s:.0f} tokens/s; written to "
        f"{config.out_path}"
    )
