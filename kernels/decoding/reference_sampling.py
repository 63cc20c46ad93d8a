"""Sampling by an exponential race in plain torch, on the whole vocabulary or a shard of it."""

import torch

from glm_rlhf.kernels.decoding.philox import uniforms

NUM_STATISTICS = 8
# 1 / temperature stays a normal number: at infinity 0 × ∞ would be NaN, at 0 a row would count as greedy.
INVERSE_LOW, INVERSE_HIGH = 1.1754944e-38, 3e38
# The statistics of a row in a shard, in this order.
MAXIMUM, TOTAL, UNTEMPERED_MAXIMUM, UNTEMPERED_TOTAL, BEST, TOKEN, LOGIT, INVERSE_TEMPERATURE = range(
    NUM_STATISTICS
)


def shard_statistics(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    seeds_B: torch.Tensor,
    steps_B: torch.Tensor,
    masked_ids_V: torch.Tensor | None,
    threshold_B: torch.Tensor | None,
    *,
    vocab_offset: int,
) -> torch.Tensor:
    """Return the sampling statistics of each row of a shard, [B, 8].

    With x the kept logits (unmasked, at least threshold), β = 1 / temperature, and E[i] = −log(1 − u[i])
    exponentially distributed: the sampled id is the i that maximises β · x[i] − log E[i] (Gumbel-max).
    MAXIMUM max x; TOTAL Σ exp(β · (x − max x)); UNTEMPERED_MAXIMUM, UNTEMPERED_TOTAL the same over all logits
    at β = 1; BEST max β · (x − max x) − log E; TOKEN, LOGIT the id (offset added) and logit of that maximum;
    INVERSE_TEMPERATURE β, 0 for temperature 0: then BEST is 0 and TOKEN the lowest id of the maximum.
    """
    dtype = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
    logits_BV = logits_BV.to(dtype)
    # The host counts rows by temperature to skip work: on a CPU, call overhead dominates for short rows.
    temperatures = temperature_B.tolist()
    num_greedy, num_unit = temperatures.count(0.0), temperatures.count(1.0)
    inverse_B1 = temperature_B[:, None].to(dtype).reciprocal().clamp_(INVERSE_LOW, INVERSE_HIGH)
    if num_greedy:
        is_greedy_B1 = temperature_B[:, None] == 0
        inverse_B1 = inverse_B1.masked_fill_(is_greedy_B1, 1.0)

    untempered_maximum_B1 = logits_BV.amax(1, keepdim=True)
    untempered_exp_BV = (logits_BV - _finite(untempered_maximum_B1)).exp_()
    untempered_total_B1 = untempered_exp_BV.sum(1, keepdim=True)
    if masked_ids_V is None and threshold_B is None and num_greedy + num_unit == len(temperatures):
        kept_BV, maximum_B1, weights_BV, total_B1 = (
            logits_BV,
            untempered_maximum_B1,
            untempered_exp_BV,
            untempered_total_B1,
        )
    else:
        kept_BV = logits_BV
        if masked_ids_V is not None:
            kept_BV = kept_BV.masked_fill(masked_ids_V, -torch.inf)
        if threshold_B is not None:
            kept_BV = kept_BV.masked_fill(kept_BV < threshold_B[:, None], -torch.inf)
        maximum_B1 = kept_BV.amax(1, keepdim=True)
        weights_BV = (kept_BV - _finite(maximum_B1)).mul_(inverse_B1).exp_()
        total_B1 = weights_BV.sum(1, keepdim=True)

    if num_greedy < len(temperatures):
        # Division by E replaces the subtraction of log E before exp; it saves a logarithm per element.
        uniforms_BV = uniforms(seeds_B, steps_B, logits_BV.shape[1], first_index=vocab_offset)
        race_BV = weights_BV.div_(uniforms_BV.neg_().log1p_().neg_())
    if num_greedy == len(temperatures):
        race_BV = (kept_BV == maximum_B1).to(dtype)
    elif num_greedy:
        race_BV = torch.where(is_greedy_B1, (kept_BV == maximum_B1).to(dtype), race_BV)
    best_B1, index_B1 = race_BV.max(1, keepdim=True)
    # A sampled row without an allowed id has weights 0, whose logarithm is −∞; a greedy row needs it set.
    best_B1 = best_B1.log()
    if num_greedy:
        best_B1.masked_fill_(maximum_B1 == -torch.inf, -torch.inf)

    columns = {
        MAXIMUM: maximum_B1,
        TOTAL: total_B1,
        UNTEMPERED_MAXIMUM: untempered_maximum_B1,
        UNTEMPERED_TOTAL: untempered_total_B1,
        BEST: best_B1,
        TOKEN: (index_B1 + vocab_offset).to(dtype),
        LOGIT: logits_BV.gather(1, index_B1),
        INVERSE_TEMPERATURE: inverse_B1.masked_fill(is_greedy_B1, 0.0) if num_greedy else inverse_B1,
    }
    return torch.cat([columns[column] for column in range(NUM_STATISTICS)], dim=1)


def combine(statistics_SB8: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens_B int64, logprobs_B, untempered_logprobs_B) sampled over all shards.

    token −1 with NaN logprobs if no id is allowed, or a logit is NaN or +∞, or the temperature NaN.
    """
    joined_8B = (_join(statistics_SB8) if len(statistics_SB8) > 1 else statistics_SB8[0]).T
    inverse_B, logit_B = joined_8B[INVERSE_TEMPERATURE], joined_8B[LOGIT]
    logprob_B = (logit_B - joined_8B[MAXIMUM]) * inverse_B - joined_8B[TOTAL].log()
    logprob_B.masked_fill_(inverse_B == 0, 0.0)
    untempered_logprob_B = logit_B - joined_8B[UNTEMPERED_MAXIMUM] - joined_8B[UNTEMPERED_TOTAL].log()
    totals_B = joined_8B[UNTEMPERED_TOTAL] + joined_8B[TOTAL]
    is_invalid_B = (joined_8B[MAXIMUM] == -torch.inf) | totals_B.isnan()
    return (
        joined_8B[TOKEN].masked_fill(is_invalid_B, -1.0).long(),
        logprob_B.masked_fill_(is_invalid_B, torch.nan),
        untempered_logprob_B.masked_fill_(is_invalid_B, torch.nan),
    )


def _join(statistics_SB8: torch.Tensor) -> torch.Tensor:
    """Return the statistics [B, 8] of one shard with all columns."""
    statistics_SB = statistics_SB8.unbind(-1)
    inverse_B = statistics_SB[INVERSE_TEMPERATURE][0]
    scale_B = inverse_B.masked_fill(inverse_B == 0, 1.0)
    maximum_B = statistics_SB[MAXIMUM].amax(0)
    lag_SB = (statistics_SB[MAXIMUM] - _finite(maximum_B)) * scale_B
    untempered_maximum_B = statistics_SB[UNTEMPERED_MAXIMUM].amax(0)
    untempered_lag_SB = statistics_SB[UNTEMPERED_MAXIMUM] - _finite(untempered_maximum_B)
    race_SB = statistics_SB[BEST] + lag_SB
    best_B = race_SB.amax(0)
    # Ties: the lowest id, so that the result does not depend on the split into shards.
    winner_1B = torch.where(race_SB == best_B, statistics_SB[TOKEN], torch.inf).argmin(0, keepdim=True)
    columns = {
        MAXIMUM: maximum_B,
        TOTAL: (statistics_SB[TOTAL] * lag_SB.exp()).sum(0),
        UNTEMPERED_MAXIMUM: untempered_maximum_B,
        UNTEMPERED_TOTAL: (statistics_SB[UNTEMPERED_TOTAL] * untempered_lag_SB.exp()).sum(0),
        BEST: best_B,
        TOKEN: statistics_SB[TOKEN].gather(0, winner_1B)[0],
        LOGIT: statistics_SB[LOGIT].gather(0, winner_1B)[0],
        INVERSE_TEMPERATURE: inverse_B,
    }
    return torch.stack([columns[column] for column in range(NUM_STATISTICS)], dim=1)


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """Return maximum with −∞ replaced by the lowest number, because −∞ − (−∞) is NaN."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)
