"""The rows' limits are PERFORMANCE's, and every row can be built, checked and reported on a CPU."""

import pytest
import torch

from benchmarks.kernels.__main__ import main
from glm_rlhf.engine.bench.harness import measure
from glm_rlhf.engine.bench.kernel_rows.advantages import cases as advantage_cases
from glm_rlhf.engine.bench.kernel_rows.decode import sampling_cases
from glm_rlhf.engine.bench.kernel_rows.layers import cases as layer_cases
from glm_rlhf.engine.bench.kernel_rows.logits import cases as logits_cases
from glm_rlhf.engine.bench.kernel_rows.optimizer import cases as optimizer_cases
from glm_rlhf.engine.bench.kernel_rows.table import full_cases
from glm_rlhf.engine.bench.kernel_rows.vocabulary_head import cases as head_cases
from glm_rlhf.engine.bench.machine import H200
from glm_rlhf.engine.bench.parts.kernels import is_not_compiled, with_contenders

CPU, FP32 = torch.device("cpu"), torch.float32


def tiny_cases():
    return [
        *head_cases({"tiny": (24, 96, 16)}, FP32),
        *logits_cases({"tiny": (24, 96)}, FP32),
        *advantage_cases({"c1": (3, 16)}, "tiny"),
        *optimizer_cases({"tiny": ([(8, 16), (5,)], 0.0, None)}),
        *layer_cases(16, 32, 48, FP32, "tiny", has_targets=False),
        *sampling_cases({"tiny": (8, 96, 16)}, FP32),
    ]


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.row)
def test_every_contender_of_a_row_is_right(case):
    problem = with_contenders(case.build(CPU), is_not_compiled)
    entries = measure(problem, device=CPU, budget_s=0.0)
    assert len(entries) >= 2
    assert {entry.name: entry.status for entry in entries} == {entry.name: "" for entry in entries}


# The limits of the table of hot paths, in ms: computed by hand from bytes and operations.
LIMITS_MS = {
    ("a1", "6B"): 5.52,
    ("a1", "9B"): 12.87,
    ("a2", "6B"): 16.6,
    ("a2", "9B"): 38.6,
    ("a3", "6B"): 13.8,
    ("b1", "6B"): 0.248,
    ("b1", "9B"): 0.577,
    ("b2", "6B"): 0.50,
    ("b2", "9B"): 1.16,
    ("e1", "6B 9B"): 0.062,
    ("f1", "6B 9B"): 0.157,
    ("f3", "6B 9B"): 0.261,
    ("g", "6B 9B"): 0.017,
    ("h", "6B 9B"): 0.125,
    ("i", "6B"): 0.124,
    ("i", "9B"): 0.289,
}


def test_full_shapes_have_the_limits_that_the_targets_were_set_by():
    found = {(c.row, c.model): H200.limit_s(c.num_bytes, c.num_flop) * 1e3 for c in full_cases()}
    assert LIMITS_MS.keys() <= found.keys()
    for key, limit_ms in LIMITS_MS.items():
        assert found[key] == pytest.approx(limit_ms, rel=0.03), key  # the table has two or three digits


def test_the_optimizer_row_is_a_share_of_the_whole_models_step():
    found = {c.model: c for c in full_cases() if c.row == "d"}
    for model, whole_ms in (("6B", 37.8), ("9B", 56.8)):
        limit_ms = H200.limit_s(found[model].num_bytes, 0.0) * 1e3
        assert limit_ms == pytest.approx(whole_ms / 16, rel=0.01)  # a 16th of every tensor, rounded down


def test_an_unknown_row_ends_with_2(capsys):
    assert main(["--device", "cpu", "--rows", "z9"]) == 2
    assert "there is no row z9" in capsys.readouterr().err
