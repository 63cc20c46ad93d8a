"""The per-token KL estimators k1, k2, k3 in plain torch."""

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")


def token_kl(log_ratio_T: torch.Tensor, estimator: str) -> torch.Tensor:
    """Return the estimate of KL(policy ‖ reference) of each token, in the input's dtype.

    With d_t = log p_policy(token t) - log p_reference(token t):

        k1: d_t        k2: d_t² / 2        k3: exp(-d_t) - 1 + d_t

    k1 and k3 are unbiased for tokens that the policy sampled; k3 is never negative and has less variance.
    As a differentiated penalty, k1's gradient has expectation zero and k2's is the gradient of the KL.

    Args:
        log_ratio_T: [T] float, d_t in nats.
        estimator: `k1`, `k2` or `k3`.

    Raises:
        ValueError: unknown estimator.

    Source: Schulman, "Approximating KL divergence" (2020).
    """
    check_kl_estimator(estimator)
    if estimator == "k1":
        return log_ratio_T
    if estimator == "k2":
        return 0.5 * log_ratio_T.square()
    # expm1 in fp32 has an error of |d| · 2⁻²⁴, as large as k3 itself at d = 1e-7: compute in fp64.
    wide_T = log_ratio_T.double()
    return (torch.expm1(-wide_T) + wide_T).to(log_ratio_T.dtype)


def check_kl_estimator(estimator: str) -> None:
    """Raise ValueError unless `estimator` is one of the three."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {estimator!r}: use one of {', '.join(KL_ESTIMATORS)}")
