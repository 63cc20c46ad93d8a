"""Decode steps of transformers' `generate` with a static cache, timed step by step as ours are."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.models.decode import decode_prompts
from benchmarks.models.sizes import ModelSizes
from glm_rlhf.engine.bench.harness import Entry, summary

NAME = "transformers, static cache"
_FIRST = 2
"""Steps of a run that are not counted: the prefill, and the first decode step, which sets up."""


def peer_entries(
    sizes: ModelSizes, batches: Sequence[int], device: torch.device, deadline: float
) -> dict[int, Entry]:
    """Return the time of a decode step by batch, of other random weights; none is begun late."""
    try:
        model = _model(sizes, device)
    except ImportError:
        return {batch: Entry(name=NAME, status="absent: transformers is not installed") for batch in batches}
    entries = {}
    for batch in batches:
        if time.time() > deadline:
            break
        try:
            entries[batch] = _entry(model, sizes, batch, device)
        except Exception as error:  # of another library: one that fails must not end the others
            entries[batch] = failed(NAME, error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return entries


def failed(name: str, error: BaseException) -> Entry:
    """Return the entry of a contender that raised."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return Entry(name=name, status=f"failed: {type(error).__name__}: {first_line[:160]}")


def _model(sizes: ModelSizes, device: torch.device) -> torch.nn.Module:
    from transformers import GlmConfig, GlmForCausalLM

    glm = sizes.model
    config = GlmConfig(
        vocab_size=glm.vocab_size,
        hidden_size=glm.hidden_size,
        intermediate_size=glm.ffn_size,
        num_hidden_layers=glm.num_layers,
        num_attention_heads=glm.num_heads,
        num_key_value_heads=glm.num_kv_heads,
        head_dim=glm.head_size,
        max_position_embeddings=glm.max_positions,
        rms_norm_eps=glm.norm_epsilon,
        attention_bias=glm.has_qkv_bias,
        pad_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with device:
            torch.manual_seed(1)
            return GlmForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def _entry(model: torch.nn.Module, sizes: ModelSizes, batch: int, device: torch.device) -> Entry:
    prompts_BT = decode_prompts(sizes, batch).to(device)
    ends: list[float] = []

    def note(tokens_BT: torch.Tensor, _scores: object, **_options: object) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return torch.zeros(len(tokens_BT), dtype=torch.bool, device=device)

    answers_BT = model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=sizes.new_tokens,
        do_sample=True,
        top_k=0,
        temperature=1.0,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
        stopping_criteria=[note],
    )
    steps_s = [later - earlier for earlier, later in zip(ends[_FIRST - 1 :], ends[_FIRST:], strict=False)]
    entry = Entry(name=NAME, timing=summary(steps_s))
    if answers_BT.shape[1] != sizes.prompt_of_decode + sizes.new_tokens:
        return replace(entry, timing=None, status=f"wrong: {tuple(answers_BT.shape)} tokens came")
    return entry
