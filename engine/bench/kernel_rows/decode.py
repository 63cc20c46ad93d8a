"""Rows h and i: one step of decoding, attention over the paged cache and sampling of the next token."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from glm_rlhf.engine.bench.harness import Answer, Problem
from glm_rlhf.engine.bench.kernel_rows.case import (
    TOLERANCE,
    Case,
    dtype_name,
    in_torch,
    plain,
    random_ids,
    random_normal,
)
from glm_rlhf.engine.bench.peers import peer, peers
from glm_rlhf.kernels.decoding.paged_attention import paged_attention
from glm_rlhf.kernels.decoding.sampling import sample

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE = 32, 2, 128, 64
_SAMPLING_TARGETS_S = {"6B": 135e-6, "9B": 310e-6}


def attention_cases(batch: int, context: int, dtype: torch.dtype, models: str) -> list[Case]:
    """Return row h; limit: keys and values read once."""
    return [
        Case(
            row="h",
            what="paged decode attention of one layer, one new token a sequence",
            model=models,
            shape=f"batch {batch}, context {context}, {NUM_HEADS} heads on {NUM_KV_HEADS} of {HEAD_SIZE}, "
            f"pages of {PAGE_SIZE}, {dtype_name(dtype)}",
            num_bytes=float(2 * batch * context * NUM_KV_HEADS * HEAD_SIZE * dtype.itemsize),
            target_s=140e-6 if (batch, context) == (256, 2048) else None,
            build=lambda device: _attention(device, dtype, batch, context),
        )
    ]


def sampling_cases(sizes: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> list[Case]:
    """Return row i for each model's (batch, vocabulary, hidden); limit: the weight read once."""
    return [
        Case(
            row="i",
            what="vocabulary head, sampling at temperature 1, the token's logprob",
            model=model,
            shape=f"batch {size[0]}, V {size[1]}, D {size[2]}, {dtype_name(dtype)}",
            num_bytes=float(size[1] * size[2] * dtype.itemsize),
            num_flop=2.0 * size[0] * size[1] * size[2],
            target_s=_SAMPLING_TARGETS_S.get(model),
            build=lambda device, size=size: _sampling(device, dtype, *size),
        )
        for model, size in sizes.items()
    ]


def _attention(device: torch.device, dtype: torch.dtype, batch: int, context: int) -> Problem:
    num_pages = batch * context // PAGE_SIZE
    options = {"device": device, "dtype": dtype}
    query_BNH = random_normal(batch, NUM_HEADS, HEAD_SIZE, seed=1, **options)
    key_pool, value_pool = (
        random_normal(num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_SIZE, seed=seed, **options) for seed in (2, 3)
    )
    # Pages of a running engine lie in no order.
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(4))
    page_table_BP = pages.view(batch, -1).to(device=device, dtype=torch.int32)
    lengths_B = torch.full((batch,), context, dtype=torch.int32, device=device)
    inputs = (query_BNH, key_pool, value_pool)

    def over_gathered_pages(query_BNH: torch.Tensor, *pools: torch.Tensor) -> torch.Tensor:
        key_BKSH, value_BKSH = (pool[page_table_BP.long()].flatten(1, 2).transpose(1, 2) for pool in pools)
        out_BN1H = F.scaled_dot_product_attention(
            query_BNH.unsqueeze(2), key_BKSH, value_BKSH, enable_gqa=True
        )
        return out_BN1H.squeeze(2)

    def flash(attention: Callable) -> Callable[[], torch.Tensor]:
        arguments = {"page_table": page_table_BP, "cache_seqlens": lengths_B, "causal": True}
        return lambda: attention(query_BNH.unsqueeze(1), key_pool, value_pool, **arguments)

    def flashinfer(wrapper: type) -> Callable[[], torch.Tensor]:
        workspace = torch.zeros(128 * 2**20, dtype=torch.uint8, device=device)
        decode = wrapper(workspace, "NHD", use_tensor_cores=True)
        starts_B = torch.arange(batch + 1, dtype=torch.int32, device=device) * page_table_BP.shape[1]
        last_page_B = torch.full((batch,), PAGE_SIZE, dtype=torch.int32, device=device)
        sizes = (NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE)
        dtypes = {"q_data_type": dtype, "kv_data_type": dtype}
        decode.plan(starts_B, page_table_BP.flatten(), last_page_B, *sizes, **dtypes)
        return lambda: decode.run(query_BNH, (key_pool, value_pool))

    flash_3 = ("FlashAttention-3", "flash_attn_interface", "flash_attn_with_kvcache", flash)
    return Problem(
        contenders=[
            plain("ours", lambda: paged_attention(*inputs, page_table_BP, lengths_B)),
            *in_torch(over_gathered_pages, inputs, how=", pages gathered"),
            *peers(
                device,
                partial(
                    peer, *flash_3, answer=lambda out: (out[0] if isinstance(out, tuple) else out).squeeze(1)
                ),
                partial(peer, "flashinfer", "flashinfer", "BatchDecodeWithPagedKVCacheWrapper", flashinfer),
            ),
        ],
        expected=lambda: [over_gathered_pages(*(tensor.float() for tensor in inputs))],
        tolerance=TOLERANCE[dtype],
    )


def _sampling(device: torch.device, dtype: torch.dtype, batch: int, vocab_size: int, width: int) -> Problem:
    hidden_BD = random_normal(batch, width, device=device, dtype=dtype, seed=1)
    weight_VD = random_normal(vocab_size, width, device=device, dtype=dtype, std=2 / width**0.5, seed=2)
    seeds_B = random_ids(batch, 2**31, device=device, seed=3)
    steps_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def run_kernel() -> Answer:
        sampled = sample(hidden_BD @ weight_VD.t(), seeds_B=seeds_B, steps_B=steps_B)
        return [sampled.tokens_B, sampled.logprobs_B]

    def eager(hidden_BD: torch.Tensor, weight_VD: torch.Tensor) -> Answer:
        log_probability_BV = (hidden_BD @ weight_VD.t()).float().log_softmax(-1)
        tokens_B1 = torch.multinomial(log_probability_BV.exp(), 1)
        return [tokens_B1.squeeze(1), log_probability_BV.gather(1, tokens_B1).squeeze(1)]

    def flashinfer(sampling_from_logits: Callable) -> Callable[[], Answer]:
        def run() -> Answer:
            logits_BV = (hidden_BD @ weight_VD.t()).float()
            tokens_B = sampling_from_logits(logits_BV).long()
            chosen_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1)
            return [tokens_B, chosen_B - logits_BV.logsumexp(-1)]

        return run

    def error(answer: Answer, expected: Answer) -> float:
        """Largest error of a logprob in nats; infinite where a token is none, or all rows agree on one."""
        tokens_B, logprobs_B = answer
        is_token = (tokens_B >= 0) & (tokens_B < vocab_size)
        if not bool(is_token.all()) or tokens_B.unique().numel() < 2:
            return float("inf")
        return float((logprobs_B - expected[0].gather(1, tokens_B[:, None]).squeeze(1)).abs().max())

    with_logsumexp = ("flashinfer + logsumexp", "flashinfer.sampling", "sampling_from_logits", flashinfer)
    return Problem(
        contenders=[
            plain("ours", run_kernel),
            *in_torch(eager, (hidden_BD, weight_VD)),
            *peers(device, partial(peer, *with_logsumexp)),
        ],
        expected=lambda: [(hidden_BD.float() @ weight_VD.float().t()).log_softmax(-1)],
        # Nats. Logits in bf16 of up to 10 are off by 2⁻⁶.
        tolerance=5e-2 if dtype == torch.bfloat16 else 1e-4,
        error=error,
    )
