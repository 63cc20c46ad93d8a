"""The per-token KL estimators k1, k2, k3 as device functions that several kernels inline."""

import triton
import triton.language as tl

# Below this |log-ratio|, exp(-d) - 1 + d loses precision in fp32 (at 1e-6 all digits): the series is exact to
# fp32 there, and log-ratios in the first steps of PPO are that small.
SERIES_BELOW = tl.constexpr(0.5)


@triton.jit
def token_kl(log_ratio: tl.tensor, ESTIMATOR: tl.constexpr) -> tl.tensor:
    """Return the estimate of KL(policy ‖ reference) from log_ratio = log policy - log reference, in fp32.

    k1: d; k2: d² / 2; k3: exp(-d) - 1 + d, see `reference.kl.token_kl`.
    """
    if ESTIMATOR == "k1":
        return log_ratio
    elif ESTIMATOR == "k2":
        return 0.5 * log_ratio * log_ratio
    else:
        return _k3(log_ratio)


@triton.jit
def token_kl_slope(log_ratio: tl.tensor, ESTIMATOR: tl.constexpr) -> tl.tensor:
    """Return d(token_kl) / d(log_ratio) in fp32. k1: 1; k2: d; k3: 1 - exp(-d)."""
    if ESTIMATOR == "k1":
        return log_ratio * 0.0 + 1.0  # NaN stays NaN
    elif ESTIMATOR == "k2":
        return log_ratio
    else:
        return tl.where(
            tl.abs(log_ratio) < SERIES_BELOW, log_ratio - _k3(log_ratio), 1.0 - tl.exp(-log_ratio)
        )


@triton.jit
def _k3(d):
    # d²/2! - d³/3! + … - d⁹/9!, by Horner's rule.
    series = 1.0 / 40320.0 - d * (1.0 / 362880.0)
    series = 1.0 / 5040.0 - d * series
    series = 1.0 / 720.0 - d * series
    series = 1.0 / 120.0 - d * series
    series = 1.0 / 24.0 - d * series
    series = 1.0 / 6.0 - d * series
    series = 0.5 - d * series
    return tl.where(tl.abs(d) < SERIES_BELOW, d * d * series, tl.exp(-d) - 1.0 + d)
