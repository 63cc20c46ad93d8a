"""Rows h and i: one step of decoding, attention over the paged cache and the draw of the next token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import TOLERANCE, Case, compiled, peers, random_ids, random_normal
from glm_rlhf.engine.bench.peers import peer
from glm_rlhf.kernels.decoding.paged_attention import paged_attention
from glm_rlhf.kernels.decoding.sampling import sample

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE = 32, 2, 128, 64


def attention_cases(batch: int, context: int, dtype: torch.dtype, models: str) -> list[Case]:
    """Return row h; limit: keys and values read once."""
    cache_bytes = float(2 * batch * context * NUM_KV_HEADS * HEAD_SIZE * dtype.itemsize)
    return [
        Case(
            row="h",
            what="paged decode attention of one layer, one new token a sequence",
            model=models,
            shape=f"batch {batch}, context {context}, {NUM_HEADS} heads on {NUM_KV_HEADS} of {HEAD_SIZE}, "
            f"pages of {PAGE_SIZE}, {str(dtype).removeprefix('torch.')}",
            num_bytes=cache_bytes,
            num_flop=0.0,
            target_s=140e-6 if (batch, context) == (256, 2048) else None,
            build=lambda device: _attention(device, dtype, batch, context),
        )
    ]


def sampling_cases(sizes: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> list[Case]:
    """Return row i for each model's (batch, vocabulary, hidden); limit: the weight read once."""
    targets = {"6B": 135e-6, "9B": 310e-6}
    return [
        Case(
            row="i",
            what="vocabulary head, sampling at temperature 1, the token's logprob",
            model=model,
            shape=f"batch {size[0]}, V {size[1]}, D {size[2]}, {str(dtype).removeprefix('torch.')}",
            num_bytes=float(size[1] * size[2] * dtype.itemsize),
            num_flop=2.0 * size[0] * size[1] * size[2],
            target_s=targets.get(model),
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

    def gathered(query_BNH: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor) -> torch.Tensor:
        key_BKSH, value_BKSH = (
            pool[page_table_BP.long()].flatten(1, 2).transpose(1, 2) for pool in (key_pool, value_pool)
        )
        out_BN1H = F.scaled_dot_product_attention(
            query_BNH.unsqueeze(2), key_BKSH, value_BKSH, enable_gqa=True
        )
        return out_BN1H.squeeze(2)

    inputs = (query_BNH, key_pool, value_pool)
    compiled_gathered = compiled(gathered)

    def flash(attention: Callable, table: str) -> Callable[[], Answer]:
        arguments = {table: page_table_BP, "cache_seqlens": lengths_B, "causal": True}
        return lambda: [attention(query_BNH.unsqueeze(1), key_pool, value_pool, **arguments)]

    def squeezed(found: Answer) -> Answer:
        out = found[0][0] if isinstance(found[0], tuple) else found[0]
        return [out.squeeze(1)]

    def flashinfer(wrapper: type) -> Callable[[], Answer]:
        workspace = torch.zeros(128 * 2**20, dtype=torch.uint8, device=device)
        decode = wrapper(workspace, "NHD", use_tensor_cores=True)
        starts_B = torch.arange(batch + 1, dtype=torch.int32, device=device) * page_table_BP.shape[1]
        decode.plan(
            starts_B,
            page_table_BP.flatten(),
            torch.full((batch,), PAGE_SIZE, dtype=torch.int32, device=device),
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_SIZE,
            PAGE_SIZE,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return lambda: [decode.run(query_BNH, (key_pool, value_pool))]

    return Problem(
        contenders=[
            Contender(
                name="ours",
                run=lambda: [paged_attention(query_BNH, key_pool, value_pool, page_table_BP, lengths_B)],
            ),
            Contender(name="torch eager, pages gathered", run=lambda: [gathered(*inputs)]),
            Contender(name="torch.compile, pages gathered", run=lambda: [compiled_gathered(*inputs)]),
            *peers(
                device,
                [
                    lambda: peer(
                        "FlashAttention-3",
                        "flash_attn_interface",
                        "flash_attn_with_kvcache",
                        lambda attention: flash(attention, "page_table"),
                        answer=squeezed,
                    ),
                    lambda: peer(
                        "flashinfer", "flashinfer", "BatchDecodeWithPagedKVCacheWrapper", flashinfer
                    ),
                ],
            ),
        ],
        expected=lambda: [gathered(*(tensor.float() for tensor in inputs))],
        tolerance=TOLERANCE[dtype],
    )


def _sampling(device: torch.device, dtype: torch.dtype, batch: int, vocab_size: int, width: int) -> Problem:
    hidden_BD = random_normal(batch, width, device=device, dtype=dtype, seed=1)
    weight_VD = random_normal(vocab_size, width, device=device, dtype=dtype, std=2 / width**0.5, seed=2)
    seeds_B = random_ids(batch, 2**31, device=device, seed=3)
    steps_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def logits_BV() -> torch.Tensor:
        return hidden_BD @ weight_VD.t()

    def ours() -> Answer:
        drawn = sample(logits_BV(), seeds_B=seeds_B, steps_B=steps_B)
        return [drawn.tokens_B, drawn.logprobs_B]

    def eager(hidden_BD: torch.Tensor, weight_VD: torch.Tensor) -> Answer:
        log_probability_BV = (hidden_BD @ weight_VD.t()).float().log_softmax(-1)
        tokens_B1 = torch.multinomial(log_probability_BV.exp(), 1)
        return [tokens_B1.squeeze(1), log_probability_BV.gather(1, tokens_B1).squeeze(1)]

    def flashinfer(sampling_from_logits: Callable) -> Callable[[], Answer]:
        def run() -> Answer:
            logits = logits_BV().float()
            tokens_B = sampling_from_logits(logits).long()
            chosen_B = logits.gather(1, tokens_B[:, None]).squeeze(1)
            return [tokens_B, chosen_B - logits.logsumexp(-1)]

        return run

    def error(answer: Answer, expected: Answer) -> float:
        """Largest error of a logprob in nats; infinite where a token is none, or all rows agree on one."""
        tokens_B, logprobs_B = answer
        is_token = (tokens_B >= 0) & (tokens_B < vocab_size)
        if not bool(is_token.all()) or tokens_B.unique().numel() < 2:
            return float("inf")
        return float((logprobs_B - expected[0].gather(1, tokens_B[:, None]).squeeze(1)).abs().max())

    compiled_eager = compiled(eager)
    return Problem(
        contenders=[
            Contender(name="ours", run=ours),
            Contender(name="torch eager", run=lambda: eager(hidden_BD, weight_VD)),
            Contender(name="torch.compile", run=lambda: compiled_eager(hidden_BD, weight_VD)),
            *peers(
                device,
                [
                    lambda: peer(
                        "flashinfer + logsumexp", "flashinfer.sampling", "sampling_from_logits", flashinfer
                    )
                ],
            ),
        ],
        expected=lambda: [(hidden_BD.float() @ weight_VD.float().t()).log_softmax(-1)],
        # Nats. Logits in bf16 of up to 10 are off by 2⁻⁶.
        tolerance=5e-2 if dtype == torch.bfloat16 else 1e-4,
        error=error,
    )
