"""Rows j to n on a tiny model: what is counted, what is checked, and that a row that fails ends no other."""

import dataclasses
import json

import pytest
import torch

from benchmarks.harness import next_token_loss
from benchmarks.models import decode, groups
from benchmarks.models.__main__ import main
from benchmarks.models.iteration import classified
from benchmarks.models.sizes import (
    decode_limit_s,
    full_sizes,
    layers_of_ppo,
    layers_that_train,
    small_sizes,
)
from benchmarks.models.training import micro_batch_flop
from benchmarks.models.verdict import claim
from glm_rlhf.engine.bench.harness import Entry, Timing
from glm_rlhf.engine.bench.machine import H200, MachineRates
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.parallel.inference.layer_ops import TorchOps
from glm_rlhf.parallel.spec.presets import preset

RATES = MachineRates(bytes_per_s=1e9, flop_per_s=1e10, source="made up")
NEVER = float("inf")


def tiny():
    return dataclasses.replace(
        small_sizes(),
        model=preset("tiny-glm"),
        batches=(2, 5),
        context=24,
        new_tokens=12,
        step_tokens=36,
        sequence=16,
        num_prompts=2,
        prompt_tokens=6,
        answer_tokens=4,
    )


def measured(letters, **changes):
    options = {"has_peer": False, "deadline": NEVER} | changes
    return groups.measured_group(tiny(), letters, RATES, options["has_peer"], options["deadline"])


def test_the_whole_command_measures_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.models.__main__.measured_rates", lambda device: RATES)
    assert main(["--device", "cpu", "--out", str(tmp_path / "rows")], small=tiny()) == 0
    data = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["row"], row["shape"].partition("batch ")[2].partition(",")[0]): row for row in data["rows"]}
    names = [("j", ""), ("k", "1"), ("l", "2"), ("l", "5"), ("m", ""), ("m step", ""), ("n", "")]
    assert list(rows) == names
    assert all(row["target_s"] is None for row in rows.values())  # nothing is judged on a CPU
    switch, other = rows["j", ""]["entries"]
    assert switch["figures"] == {"moved bytes": 0.0}
    assert other["timing"] is None
    assert other["status"] == "not measured: it takes several devices, here is 1"
    for batch, num_prefills in ((1, 1), (2, 1), (5, 3)):
        row = rows["k" if batch == 1 else "l", str(batch)]
        engine, peer = row["entries"]
        # Two prompts of 18 go through a step at once: the first answer has drawn so many of its 12 tokens
        # when the last prompt is through. From then on all decode together, and a run lies between two steps.
        assert engine["timing"]["repetitions"] == 12 - num_prefills - 1
        assert row["work"] == [batch, "tokens"]
        assert engine["error"] < decode.TOLERANCE[torch.float32]
        assert peer["status"] == ""
        assert peer["timing"]["repetitions"] == 12 - 2
    passes = rows["m", ""]
    assert passes["work"] == [2 * 16, "tokens"]
    assert passes["entries"][0]["error"] < 1e-5  # fp32 sums in another order
    assert passes["limit_s"] == micro_batch_flop(tiny(), 4) / 1e10
    figures = rows["n", ""]["entries"][0]["figures"]
    assert 0 < figures["outside %"] < 100
    assert figures["products ms"] > 0
    assert figures["logprob gap"] < 1e-4  # of fp32, so that old logprobs are not computed again


def test_a_cache_that_is_not_written_is_found_out(monkeypatch):
    # Nothing at all: what the memory held before might not even be finite.
    monkeypatch.setattr(TorchOps, "write", lambda ops, heads_TGSH, pools: pools.zero_())
    (row,) = measured("k")
    assert row.entries[0].status.startswith("wrong: logprobs off by ")
    assert row.entries[0].timing is None


def test_a_loss_of_other_targets_is_found_out(monkeypatch):
    next_tokens = next_token_loss.next_tokens
    monkeypatch.setattr(next_token_loss, "next_tokens", lambda packed: next_tokens(packed).roll(1))
    passes, step = measured("m")
    assert passes.entries[0].status.startswith("wrong: the loss is off by ")
    assert step.entries[0].status == "not measured"


def test_weights_at_another_address_are_found_out(monkeypatch):
    monkeypatch.setattr(
        decode, "chunk_weights", lambda chunks: [[weight.clone()] for weight in chunks[0].parameters()]
    )
    (row,) = measured("j")
    engine = row.entries[0]
    assert engine.status == "wrong: weights lie elsewhere than before"
    assert engine.figures["moved bytes"] > 0


def test_a_row_that_fails_says_why_and_the_others_are_measured(monkeypatch):
    def entry(*arguments):
        if arguments[-1] == 2:
            raise torch.OutOfMemoryError("no memory\nof a device")
        return Entry(name="ours")

    monkeypatch.setattr(groups, "decode_entry", entry)
    first, second = measured("l")
    assert first.entries[0].status == "failed: OutOfMemoryError: no memory"
    assert second.entries[0].status == ""


def test_fewer_layers_are_taken_where_memory_runs_out():
    tried = []

    def measure(num_layers):
        tried.append(num_layers)
        if num_layers > 3:
            raise torch.OutOfMemoryError
        return Entry(name="ours")

    found = groups._with_what_fits(measure, 8, torch.device("cpu"), NEVER)
    assert found == (3, Entry(name="ours"))
    assert tried == [8, 5, 3]


def test_nothing_is_begun_after_the_deadline(tmp_path):
    assert all(row.entries[0].status == groups.LATE for row in measured("kl", deadline=0.0))
    out = tmp_path / "rows"
    assert main(["--device", "cpu", "--deadline-s", "-1", "--out", str(out)], small=tiny()) == 1
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["j", "k", "l", "l", "m", "n"]
    assert all(row["entries"][0]["status"] == groups.LATE for row in rows)


def test_unknown_rows_and_shapes_end_with_2(capsys):
    assert main(["--rows", "j,z"]) == 2
    assert main(["--shapes", "7B"]) == 2
    assert "--shapes takes 6B,9B, --rows j,k,l,m,n" in capsys.readouterr().err


# The limits of the table of hot paths, on its reference chip: ms of a token, and tokens/s.
@pytest.mark.parametrize(
    ("name", "one_ms", "rates"), [("6B", 2.78, (19.9e3, 45.5e3)), ("9B", 4.08, (13.6e3, 31.3e3))]
)
def test_decode_steps_have_the_limits_that_the_targets_were_set_by(name, one_ms, rates):
    sizes = full_sizes(name)
    assert 1e3 * decode_limit_s(H200, sizes.model, 1, sizes.context, 2) == pytest.approx(one_ms, rel=0.01)
    for batch, rate in zip(sizes.batches, rates, strict=True):
        found = batch / decode_limit_s(H200, sizes.model, batch, sizes.context, 2)
        assert found == pytest.approx(rate, rel=0.01)  # the table has three digits


def test_layers_are_cut_to_the_memory_that_is_free():
    for name, (most, most_of_ppo) in {"6B": (10, 7), "9B": (7, 4)}.items():
        sizes = full_sizes(name)
        assert 2 <= layers_that_train(sizes, 78 * 2**30) <= most
        assert 1 <= layers_of_ppo(sizes, 78 * 2**30) <= most_of_ppo
        assert layers_that_train(sizes, 1e15) == sizes.model.num_layers
        assert layers_that_train(sizes, 1.0) == 1


def test_kernels_are_classified_by_their_names():
    products = (
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT",
        "void cutlass::Kernel2<...>",
        "sm90_xmma_gemm_bf16",
    )
    products += ("cublasLt::splitKreduce_kernel<32>", "void flash::flash_fwd_kernel<...>", "aten::addmm_")
    products += ("_paged_attention_fwd_kernel", "_linear_logprob_fwd_kernel")
    others = (
        "_rms_norm_fwd_kernel",
        "_swiglu_bwd_kernel",
        "void at::native::vectorized_elementwise_kernel<4>",
    )
    others += (
        "Memcpy DtoD (Device -> Device)",
        "_dlogits_from_exp_kernel",
        "multi_tensor_apply_kernel",
        "aten::mul",
    )
    times = classified(dict.fromkeys(products, 2.0) | dict.fromkeys(others, 1.0))
    assert times.products_s == 2.0 * len(products)
    assert times.others_s == len(others)
    assert set(times.largest) < set(others)


def row(name, seconds, target_s=None, **figures):
    timing = Timing(median_s=seconds, low_s=seconds, high_s=seconds, repetitions=3)
    entry = Entry(name="ours", timing=timing, figures=figures)
    return Row(row=name, what="", shape="6B", command="", entries=[entry], target_s=target_s)


def test_a_claim_judges_each_row_by_its_target():
    rows = [
        row("k", 3.1e-3, 3.2e-3),
        row("l", 5e-3, 4e-3),
        row("n", 1.0, **{"outside %": 2.5}),
        row("m step", 1.0),
    ]
    assert claim(rows) == (
        "k (6B): 3.1 ms, target 3.2 ms (met). l (6B): 5 ms, target 4 ms (missed). "
        "n (6B): 2.5 % outside, target 2 % (missed)."
    )
