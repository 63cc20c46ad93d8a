"""Rows e to g: residual add + RMSNorm, SwiGLU, partial interleaved RoPE."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import TOLERANCE, Case, dtype_name, in_torch, plain, random_normal
from glm_rlhf.engine.bench.peers import peer, peers
from glm_rlhf.kernels.layers.rmsnorm import add_rms_norm
from glm_rlhf.kernels.layers.rope import rope_qkv_in_place, rope_table
from glm_rlhf.kernels.layers.swiglu import swiglu

EPSILON = 1e-5
NUM_GROUPS, QUERIES_PER_GROUP, HEAD_SIZE, ROTARY_SIZE = 2, 16, 128, 64


def cases(
    num_tokens: int, width: int, ffn_size: int, dtype: torch.dtype, models: str, *, has_targets: bool
) -> list[Case]:
    """Return the rows at one shape. Limits: each tensor is read or written once a pass."""
    name = dtype_name(dtype)
    row_bytes = float(num_tokens * width * dtype.itemsize)
    ffn_bytes = float(num_tokens * ffn_size * dtype.itemsize)
    rotated_bytes = float(num_tokens * NUM_GROUPS * (QUERIES_PER_GROUP + 1) * ROTARY_SIZE * dtype.itemsize)
    norm, gate = f"T {num_tokens}, D {width}, {name}", f"T {num_tokens}, F {ffn_size}, {name}"
    rope = f"T {num_tokens}, {NUM_GROUPS} groups of {QUERIES_PER_GROUP} + 2 heads of {HEAD_SIZE}, {name}"
    both, tokens = "forward + backward", (dtype, num_tokens)
    add, gated = "residual add + RMSNorm; ", "SwiGLU; "
    gradient = lambda d, **options: _gate_gradient(d, *tokens, ffn_size, **options)
    table: list[tuple[str, str, str, float, float | None, Callable]] = [
        ("e1", f"{add}forward", norm, 4 * row_bytes, 70e-6, lambda d: _norm(d, *tokens, width)),
        ("e2", add + both, norm, 8 * row_bytes, None, lambda d: _norm_both(d, *tokens, width)),
        ("f1", f"{gated}forward", gate, 3 * ffn_bytes, 175e-6, lambda d: _gate(d, *tokens, ffn_size)),
        ("f2", gated + both, gate, 8 * ffn_bytes, 465e-6, lambda d: gradient(d, times_forward=True)),
        ("f3", f"{gated}backward", gate, 5 * ffn_bytes, 290e-6, lambda d: gradient(d, times_forward=False)),
        ("g", "RoPE on queries and keys", rope, 2 * rotated_bytes, 25e-6, lambda d: _rope(d, *tokens)),
    ]
    return [
        Case(
            row=row,
            what=what,
            model=models,
            shape=shape,
            num_bytes=num_bytes,
            target_s=target_s if has_targets else None,
            build=build,
        )
        for row, what, shape, num_bytes, target_s, build in table
    ]


def add_norm(hidden_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor) -> Answer:
    """Return the normed sum and the sum, statistics in fp32, as transformers' GLM computes them."""
    total_TD = hidden_TD + residual_TD
    wide_TD = total_TD.float()
    normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + EPSILON)
    return weight_D * normed_TD.to(hidden_TD.dtype), total_TD


def gate_up(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up as transformers' GLM computes it."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def rotate(heads_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Return heads with their first part rotated by interleaved pairs, the rest as it was."""
    turned_TNH, kept_TNH = heads_TNH[..., :ROTARY_SIZE], heads_TNH[..., ROTARY_SIZE:]
    even, odd = turned_TNH[..., 0::2], turned_TNH[..., 1::2]
    cos, sin = (angle[:, None].to(heads_TNH.dtype) for angle in (cos_TR, sin_TR))
    turned_TNH = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned_TNH, kept_TNH), dim=-1)


def _norm_inputs(device: torch.device, dtype: torch.dtype, num_tokens: int, width: int) -> list[torch.Tensor]:
    hidden, residual = (
        random_normal(num_tokens, width, device=device, dtype=dtype, seed=seed) for seed in (1, 2)
    )
    return [hidden, residual, random_normal(width, device=device, dtype=dtype, seed=3)]


def _norms(device: torch.device, inputs: Sequence[torch.Tensor]) -> list[Contender]:
    """Return the contenders that are differentiable."""
    hidden_TD, residual_TD, weight_D = inputs
    return [
        plain("ours", lambda: add_rms_norm(*inputs, epsilon=EPSILON)),
        *in_torch(add_norm, inputs),
        *peers(
            device,
            partial(
                peer,
                "liger-kernel",
                "liger_kernel.transformers.functional",
                "liger_fused_add_rms_norm",
                lambda liger: partial(liger, *inputs, EPSILON, in_place=False),
            ),
            partial(
                peer,
                "quack-kernels",
                "quack.rmsnorm",
                "rmsnorm",
                lambda quack: partial(
                    quack, hidden_TD, weight_D, residual=residual_TD, eps=EPSILON, prenorm=True
                ),
            ),
        ),
    ]


def _norm(device: torch.device, dtype: torch.dtype, num_tokens: int, width: int) -> Problem:
    inputs = _norm_inputs(device, dtype, num_tokens, width)
    in_place = [tensor.clone() for tensor in inputs[:2]]

    def flashinfer(fused: Callable) -> Callable[[], Answer]:
        def run() -> Answer:
            fused(in_place[0], in_place[1], inputs[2], EPSILON)
            return in_place

        return run

    def restore() -> None:
        for tensor, original in zip(in_place, inputs, strict=False):
            tensor.copy_(original)

    fused = ("flashinfer (in place)", "flashinfer.norm", "fused_add_rmsnorm", flashinfer)
    return Problem(
        contenders=[*_norms(device, inputs), *peers(device, partial(peer, *fused, prepare=restore))],
        expected=lambda: add_norm(*(tensor.float() for tensor in inputs)),
        tolerance=TOLERANCE[dtype],
    )


def _norm_both(device: torch.device, dtype: torch.dtype, num_tokens: int, width: int) -> Problem:
    inputs = [t.requires_grad_() for t in _norm_inputs(device, dtype, num_tokens, width)]
    upstream = [random_normal(num_tokens, width, device=device, dtype=dtype, seed=seed) for seed in (4, 5)]

    def expected() -> Answer:
        wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
        return _with_gradients(add_norm(*wide), wide, [tensor.float() for tensor in upstream])

    return Problem(
        contenders=[_with_backward(contender, inputs, upstream) for contender in _norms(device, inputs)],
        expected=expected,
        tolerance=TOLERANCE[dtype],
    )


def _with_backward(
    contender: Contender, inputs: list[torch.Tensor], upstream: list[torch.Tensor]
) -> Contender:
    """Return a forward's contender that also takes the gradients."""
    if contender.absent:
        return contender
    return Contender(name=contender.name, run=lambda: _with_gradients(contender.run(), inputs, upstream))


def _backward_alone(
    contender: Contender, inputs: list[torch.Tensor], upstream: list[torch.Tensor]
) -> Contender:
    """Return a forward's contender of which only the gradients are timed."""
    if contender.absent:
        return contender
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        outputs[:] = contender.run()

    run = lambda: torch.autograd.grad(outputs, inputs, upstream)
    return Contender(name=contender.name, run=run, prepare=forward)


def _with_gradients(
    outputs: Answer, inputs: list[torch.Tensor], upstream: list[torch.Tensor]
) -> list[torch.Tensor]:
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return [*(output.detach() for output in outputs), *gradients]


def _gates(device: torch.device, gate_up_TF2: torch.Tensor) -> list[Contender]:
    """Return the contenders that are differentiable."""
    liger = ("liger-kernel", "liger_kernel.transformers.functional", "liger_swiglu")
    return [
        plain("ours", lambda: [swiglu(gate_up_TF2)]),
        *in_torch(lambda gate_up_TF2: [gate_up(gate_up_TF2)], (gate_up_TF2,)),
        *peers(device, partial(peer, *liger, lambda swiglu: lambda: [swiglu(*gate_up_TF2.chunk(2, dim=-1))])),
    ]


def _gate(device: torch.device, dtype: torch.dtype, num_tokens: int, ffn_size: int) -> Problem:
    gate_up_TF2 = random_normal(num_tokens, 2 * ffn_size, device=device, dtype=dtype, seed=1)
    flashinfer = ("flashinfer", "flashinfer.activation", "silu_and_mul")
    return Problem(
        contenders=[
            *_gates(device, gate_up_TF2),
            *peers(
                device, partial(peer, *flashinfer, lambda silu_and_mul: partial(silu_and_mul, gate_up_TF2))
            ),
        ],
        expected=lambda: [gate_up(gate_up_TF2.float())],
        tolerance=TOLERANCE[dtype],
    )


def _gate_gradient(
    device: torch.device, dtype: torch.dtype, num_tokens: int, ffn_size: int, *, times_forward: bool
) -> Problem:
    gate_up_TF2 = random_normal(num_tokens, 2 * ffn_size, device=device, dtype=dtype, seed=1).requires_grad_()
    upstream_TF = random_normal(num_tokens, ffn_size, device=device, dtype=dtype, seed=2)
    timed = _with_backward if times_forward else _backward_alone

    def expected() -> Answer:
        wide = gate_up_TF2.detach().float().requires_grad_()
        answer = _with_gradients([gate_up(wide)], [wide], [upstream_TF.float()])
        return answer if times_forward else answer[1:]

    return Problem(
        contenders=[timed(c, [gate_up_TF2], [upstream_TF]) for c in _gates(device, gate_up_TF2)],
        expected=expected,
        tolerance=TOLERANCE[dtype],
    )


def _rope(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Problem:
    num_heads = QUERIES_PER_GROUP + 2
    mixed_TM = random_normal(
        num_tokens, NUM_GROUPS * num_heads * HEAD_SIZE, device=device, dtype=dtype, seed=1
    )

    def query_and_key_heads(mixed_TM: torch.Tensor) -> torch.Tensor:
        return mixed_TM.view(num_tokens, NUM_GROUPS, num_heads, HEAD_SIZE)[:, :, :-1].flatten(1, 2)

    heads_TNH = query_and_key_heads(mixed_TM)
    cos_TR, sin_TR = rope_table(num_tokens, ROTARY_SIZE, 10000.0, device=device)
    ours_TM = mixed_TM.clone()
    query_TM = heads_TNH[:, :-NUM_GROUPS].flatten(1).clone()
    key_TM = heads_TNH[:, -NUM_GROUPS:].flatten(1).clone()
    positions_T = torch.arange(num_tokens, device=device)
    cos_sin_TR = torch.cat((cos_TR, sin_TR), dim=-1)

    def rotate_in_place() -> torch.Tensor:
        return rope_qkv_in_place(ours_TM, cos_TR, sin_TR, num_groups=NUM_GROUPS, head_size=HEAD_SIZE)

    def flashinfer(apply: Callable) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            apply(positions_T, query_TM, key_TM, HEAD_SIZE, cos_sin_TR, is_neox=False)
            return torch.cat((query_TM, key_TM), dim=1)

        return run

    in_place = (
        "flashinfer (queries and keys apart, in place)",
        "flashinfer.rope",
        "apply_rope_with_cos_sin_cache_inplace",
        flashinfer,
    )
    return Problem(
        contenders=[
            Contender(name="ours, in place", run=rotate_in_place, answer=query_and_key_heads),
            *in_torch(rotate, (heads_TNH, cos_TR, sin_TR)),
            *peers(
                device,
                partial(peer, *in_place, answer=lambda out_TM: out_TM.view(num_tokens, -1, HEAD_SIZE)),
            ),
        ],
        expected=lambda: [rotate(heads_TNH.float(), cos_TR, sin_TR)],
        tolerance=TOLERANCE[dtype],
    )
