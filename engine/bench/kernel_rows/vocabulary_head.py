"""Rows a1 to a3: from hidden states through the vocabulary to logprobs, entropy and PPO's loss."""

import math
from collections.abc import Callable
from functools import partial

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import (
    TOLERANCE,
    Case,
    clearing,
    dtype_name,
    in_torch,
    plain,
    random_ids,
    random_normal,
)
from glm_rlhf.engine.bench.peers import peer, peers
from glm_rlhf.kernels.lm_head.linear_logprob import linear_logprob
from glm_rlhf.kernels.lm_head.linear_ppo_loss import linear_ppo_loss
from glm_rlhf.kernels.rl.policy_loss import ppo_policy_loss

CLIP, KL_COEF = 0.2, 0.05
CLIPPED_SHARE = 0.25
_TARGETS_S = {
    **{("a1", "6B"): 5.8e-3, ("a2", "6B"): 17.5e-3, ("a3", "6B"): 15e-3},
    **{("a1", "9B"): 13.4e-3, ("a2", "9B"): 41e-3},
}
_CUT_CROSS_ENTROPY = ("cut_cross_entropy", "linear_cross_entropy")
_LIGER = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
# Rows of one slice of the definition: fp32 logits of 1024 × 151552 are 0.6 GB.
SLICE = 1024


def cases(sizes: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> list[Case]:
    """Return the rows for each model's (tokens, vocabulary, hidden).

    Limits: one product is 2·T·V·D operations; forward takes one, forward + backward three, and of the
    last two only the rows that have a gradient.
    """
    clipped = f"a2 without KL, {CLIPPED_SHARE:.0%} of the rows clipped; forward + backward"
    rows = (
        ("a1", "hidden → vocabulary → logprob, entropy; forward", 1, _forward),
        ("a2", "the same with PPO's loss (clip, k3 KL); forward + backward", 3, _ppo),
        ("a3", clipped, 1 + 2 * (1 - CLIPPED_SHARE), _clipped_ppo),
    )
    return [
        Case(
            row=row,
            what=what,
            model=model,
            shape=f"T {size[0]}, V {size[1]}, D {size[2]}, {dtype_name(dtype)}",
            num_bytes=size[1] * size[2] * dtype.itemsize,
            num_flop=num_products * 2.0 * math.prod(size),
            target_s=_TARGETS_S.get((row, model)),
            build=lambda device, size=size, build=build: build(device, dtype, *size),
            counts_memory=row == "a2",
        )
        for model, size in sizes.items()
        for row, what, num_products, build in rows
        if (row, model) != ("a3", "9B")
    ]


class _Inputs:
    """Hidden states, weight and PPO's numbers of each token."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, num_tokens: int, vocab_size: int, width: int
    ) -> None:
        self.hidden_TD = random_normal(num_tokens, width, device=device, dtype=dtype, seed=1)
        # Logits with a deviation of 2.
        std = 2 / width**0.5
        self.weight_VD = random_normal(vocab_size, width, device=device, dtype=dtype, std=std, seed=2)
        self.targets_T = random_ids(num_tokens, vocab_size, device=device, seed=3)

    def with_policy(self, *, clipped_share: float) -> None:
        """Add old logprobs near the present ones, but for rows whose ratio is clipped away."""
        device, num_tokens = self.hidden_TD.device, self.targets_T.shape[0]
        logprobs_T = torch.cat([logprobs_T for logprobs_T, _ in self.defined_slices()])
        noise = {"device": device, "dtype": torch.float32, "std": 0.05}
        self.old_logprobs_T = logprobs_T + random_normal(num_tokens, seed=4, **noise)
        self.ref_logprobs_T = logprobs_T + random_normal(num_tokens, seed=5, **noise)
        self.advantages_T = random_normal(num_tokens, device=device, dtype=torch.float32, seed=6)
        self.mask_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
        num_clipped = round(clipped_share * num_tokens)
        clipped = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(7))[:num_clipped]
        clipped = clipped.to(device)
        self.old_logprobs_T[clipped] = logprobs_T[clipped] - 1.0
        self.advantages_T[clipped] = self.advantages_T[clipped].abs() + 0.1

    def defined_slices(self):
        """Yield (logprobs, entropy) in fp32 of some rows at a time."""
        for start in range(0, self.targets_T.shape[0], SLICE):
            rows = slice(start, start + SLICE)
            yield definition(self.hidden_TD[rows].float(), self.weight_VD.float(), self.targets_T[rows])


def definition(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropy the usual way in torch: logits, then log_softmax in fp32."""
    log_probability_TV = (hidden_TD @ weight_VD.t()).float().log_softmax(-1)
    logprobs_T = log_probability_TV.gather(1, targets_T[:, None]).squeeze(1)
    return logprobs_T, -(log_probability_TV.exp() * log_probability_TV).sum(-1)


def eager_logprobs(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Return the logprobs alone: what a loss without an entropy term needs."""
    log_probability_TV = (hidden_TD @ weight_VD.t()).float().log_softmax(-1)
    return log_probability_TV.gather(1, targets_T[:, None]).squeeze(1)


def eager_ppo_loss(
    logprobs_T: torch.Tensor, inputs: _Inputs, kl_coef: float, rows: slice = slice(None)
) -> torch.Tensor:
    """Return PPO's clipped loss with a k3 penalty, a mean over all tokens of the batch."""
    ratio_T = (logprobs_T - inputs.old_logprobs_T[rows]).exp()
    advantages_T = inputs.advantages_T[rows]
    loss_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * ratio_T.clamp(1 - CLIP, 1 + CLIP))
    if kl_coef:
        difference_T = inputs.ref_logprobs_T[rows] - logprobs_T
        loss_T = loss_T + kl_coef * (difference_T.exp() - 1 - difference_T)
    return loss_T.sum() / inputs.targets_T.shape[0]


def _forward(device: torch.device, dtype: torch.dtype, *size: int) -> Problem:
    inputs = _Inputs(device, dtype, *size)
    arguments = (inputs.hidden_TD, inputs.weight_VD, inputs.targets_T)

    def without_entropy(name: str, module: str, symbol: str) -> Contender:
        return peer(
            f"{name} (no entropy)",
            module,
            symbol,
            lambda cross_entropy: partial(cross_entropy, *arguments, reduction="none"),
            answer=lambda loss_T: [-loss_T.float(), None],
        )

    return Problem(
        contenders=[
            plain("ours", lambda: linear_logprob(*arguments)),
            *in_torch(definition, arguments),
            *peers(
                device,
                partial(without_entropy, "cut-cross-entropy", *_CUT_CROSS_ENTROPY),
                partial(without_entropy, "liger-kernel", *_LIGER),
            ),
        ],
        expected=lambda: [torch.cat(parts) for parts in zip(*inputs.defined_slices(), strict=True)],
        tolerance=TOLERANCE[dtype],
    )


def _ppo(device: torch.device, dtype: torch.dtype, *size: int) -> Problem:
    inputs = _Inputs(device, dtype, *size)
    inputs.with_policy(clipped_share=0.0)
    return _loss_problem(inputs, KL_COEF)


def _clipped_ppo(device: torch.device, dtype: torch.dtype, *size: int) -> Problem:
    inputs = _Inputs(device, dtype, *size)
    inputs.with_policy(clipped_share=CLIPPED_SHARE)
    return _loss_problem(inputs, 0.0)


def _loss_problem(inputs: _Inputs, kl_coef: float) -> Problem:
    device, dtype = inputs.hidden_TD.device, inputs.hidden_TD.dtype
    hidden_TD, weight_VD = inputs.hidden_TD.requires_grad_(), inputs.weight_VD.requires_grad_()
    targets_T, num_tokens = inputs.targets_T, float(inputs.targets_T.shape[0])
    settings = {"clip_low": CLIP, "clip_high": CLIP, "kl_coef": kl_coef, "denominator": num_tokens}
    policy = (inputs.old_logprobs_T, inputs.advantages_T, inputs.mask_T)

    def contender(name: str, loss: Callable[[], torch.Tensor]) -> Contender:
        def run() -> Answer:
            result = loss()
            result.backward()
            return [result.detach(), hidden_TD.grad, weight_VD.grad]

        return Contender(name=name, run=run, prepare=clearing(hidden_TD, weight_VD))

    def in_forward() -> torch.Tensor:
        return linear_ppo_loss(
            hidden_TD, weight_VD, targets_T, *policy, ref_logprobs_T=inputs.ref_logprobs_T, **settings
        )[0]

    def general() -> torch.Tensor:
        logprobs_T, _ = linear_logprob(hidden_TD, weight_VD, targets_T)
        return ppo_policy_loss(logprobs_T, *policy, ref_logprobs_T=inputs.ref_logprobs_T, **settings)[0]

    def eager(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return eager_ppo_loss(eager_logprobs(hidden_TD, weight_VD, targets_T), inputs, kl_coef)

    def through(name: str, module: str, symbol: str) -> Contender:
        arguments = (hidden_TD, weight_VD, targets_T)

        def make(cross_entropy: Callable) -> Callable[[], Answer]:
            logprobs = lambda: -cross_entropy(*arguments, reduction="none").float()
            return contender(name, lambda: eager_ppo_loss(logprobs(), inputs, kl_coef)).run

        return peer(name, module, symbol, make, prepare=clearing(hidden_TD, weight_VD))

    return Problem(
        contenders=[
            contender("ours, gradient in forward", in_forward),
            contender("ours, general (4 products)", general),
            *in_torch(eager, (hidden_TD, weight_VD), contender=contender),
            *peers(
                device,
                partial(through, "cut-cross-entropy + torch loss", *_CUT_CROSS_ENTROPY),
                partial(through, "liger-kernel + torch loss", *_LIGER),
            ),
        ],
        expected=lambda: _defined_loss(inputs, kl_coef),
        tolerance=TOLERANCE[dtype],
        besides_bytes=weight_VD.nbytes,
    )


def _defined_loss(inputs: _Inputs, kl_coef: float) -> list[torch.Tensor]:
    """Return loss and both gradients in fp32, some rows at a time."""
    weight_VD = inputs.weight_VD.detach().float().requires_grad_()
    losses, hidden_gradients = [], []
    for start in range(0, inputs.targets_T.shape[0], SLICE):
        rows = slice(start, start + SLICE)
        hidden_TD = inputs.hidden_TD[rows].detach().float().requires_grad_()
        logprobs_T = eager_logprobs(hidden_TD, weight_VD, inputs.targets_T[rows])
        loss = eager_ppo_loss(logprobs_T, inputs, kl_coef, rows)
        loss.backward()
        losses.append(loss.detach())
        hidden_gradients.append(hidden_TD.grad)
    return [torch.stack(losses).sum(), torch.cat(hidden_gradients), weight_VD.grad]
