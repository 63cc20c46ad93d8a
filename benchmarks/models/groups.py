"""Rows j to n of one model, in groups that share what they hold on the device."""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.models.decode import decode_entry, other_layout_entry, switch_entry
from benchmarks.models.iteration import iteration_entry
from benchmarks.models.peer import NAME as PEER
from benchmarks.models.peer import failed, peer_entries
from benchmarks.models.sizes import (
    SMALL_NAME,
    ModelSizes,
    decode_limit_s,
    fill_on_device,
    free_bytes,
    layers_of_ppo,
    layers_that_train,
)
from benchmarks.models.training import micro_batch_flop, training_entries
from glm_rlhf.engine.bench.harness import Entry
from glm_rlhf.engine.bench.machine import MachineRates
from glm_rlhf.engine.bench.report import Row
from glm_rlhf.engine.observe.mfu import known_peak_flop_per_s
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout

GROUPS = ("jkl", "m", "n")
"""Rows that are measured on the same models, one group after another."""
_TARGET_MFU, _TARGET_SWITCH_S = 0.5, 0.1
LATE = "not measured: the time was used up"


def measured_group(
    sizes: ModelSizes, letters: str, rates: MachineRates, has_peer: bool, deadline: float
) -> list[Row]:
    """Return the rows of `letters`, of one group, on this process's device.

    A row that fails, for want of memory or otherwise, says so, and the others are measured all the same.

    Args:
        sizes: of the model.
        letters: of the group.
        rates: of the device, behind every limit.
        has_peer: whether transformers decodes beside ours.
        deadline: in seconds of `time.time`; no entry is begun after it.
    """
    with open_topology(Layout()) as topology:
        if "m" in letters:
            return _training_rows(topology, sizes, rates, deadline)
        if "n" in letters:
            return [_iteration_row(topology, sizes, deadline)]
        return _decode_rows(topology, sizes, letters, rates, has_peer, deadline)


def unmeasured_rows(sizes: ModelSizes, letters: str, status: str, rates: MachineRates) -> list[Row]:
    """Return the rows of `letters` without figures, and why there are none."""
    entries = [Entry(name="ours", status=status)]
    rows = {"j": lambda: [_switch_row(sizes, entries)], "n": lambda: [_ppo_row(sizes, 0, entries)]}
    rows["k"] = lambda: [_step_row(sizes, "k", 1, entries, rates)]
    rows["l"] = lambda: [_step_row(sizes, "l", batch, entries, rates) for batch in sizes.batches]
    rows["m"] = lambda: [_passes_row(sizes, 0, entries, rates, None)]
    return [row for letter in letters for row in rows[letter]()]


def _decode_rows(
    topology: Topology, sizes: ModelSizes, letters: str, rates: MachineRates, has_peer: bool, deadline: float
) -> list[Row]:
    steps = {letter: batches for letter, batches in (("k", (1,)), ("l", sizes.batches)) if letter in letters}
    all_batches = list(itertools.chain(*steps.values()))
    switch, engine_by_batch = _our_entries(topology, sizes, all_batches, deadline)
    _release(topology.device)  # the peer's weights take as much
    peer_by_batch: dict[int, Entry] = {}
    if has_peer and engine_by_batch:
        peer_by_batch = peer_entries(sizes, tuple(engine_by_batch), topology.device, deadline)
    absent = Entry(name=PEER, status=LATE if has_peer else "excluded by --no-peer")
    rows = [_switch_row(sizes, [switch, other_layout_entry(topology)])] if "j" in letters else []
    for letter, batches in steps.items():
        for batch in batches:
            entries = [engine_by_batch[batch], peer_by_batch.get(batch, absent)]
            rows.append(_step_row(sizes, letter, batch, entries, rates))
    return rows


def _our_entries(
    topology: Topology, sizes: ModelSizes, batches: Sequence[int], deadline: float
) -> tuple[Entry, dict[int, Entry]]:
    """Return the switch, and a decode step by batch, of one model that is gone afterwards."""
    chunks = build_model(sizes.model, topology, dtype=sizes.dtype)
    fill_on_device(chunks, seed=1)
    guarded = partial(_guarded, device=topology.device, deadline=deadline)
    switch = guarded(partial(switch_entry, chunks, topology, sizes))
    return switch, {
        batch: guarded(partial(decode_entry, chunks, topology, sizes, batch)) for batch in batches
    }


def _training_rows(topology: Topology, sizes: ModelSizes, rates: MachineRates, deadline: float) -> list[Row]:
    peak = known_peak_flop_per_s(torch.cuda.get_device_name()) if topology.device.type == "cuda" else None
    later: list[Entry] = []

    def measure(num_layers: int) -> Entry:
        passes, step = training_entries(topology, sizes, num_layers, peak)
        later.append(step)
        return passes

    most = layers_that_train(sizes, free_bytes(topology.device))
    num_layers, passes = _with_what_fits(measure, most, topology.device, deadline)
    rows = [_passes_row(sizes, num_layers, [passes], rates, peak)]
    if later:
        rows.append(
            Row(
                row="m step",
                what="AdamW's step of the cut model behind it: norm, clip, update, gradients cleared",
                shape=_cut_text(sizes, num_layers),
                command=command(sizes, "m"),
                entries=later,
            )
        )
    return rows


def _iteration_row(topology: Topology, sizes: ModelSizes, deadline: float) -> Row:
    largest: list[str] = []

    def measure(num_layers: int) -> Entry:
        entry, text = iteration_entry(topology, sizes, num_layers)
        largest.append(text)
        return entry

    most = layers_of_ppo(sizes, free_bytes(topology.device))
    num_layers, entry = _with_what_fits(measure, most, topology.device, deadline)
    row = _ppo_row(sizes, num_layers, [entry])
    return replace(row, what=f"{row.what}. Largest of the others: {largest[0]}") if largest else row


def _with_what_fits(
    measure: Callable[[int], Entry], num_layers: int, device: torch.device, deadline: float
) -> tuple[int, Entry]:
    """Return the layers that were measured, and what of them: fewer where memory runs out."""
    while True:
        entry = _guarded(partial(measure, num_layers), device, deadline)
        if "OutOfMemory" not in entry.status or num_layers == 1:
            return num_layers, entry
        num_layers = max(1, num_layers * 2 // 3)


def _guarded(measure: Callable[[], Entry], device: torch.device, deadline: float) -> Entry:
    """Return what is measured, or why it is not."""
    if time.time() > deadline:
        return Entry(name="ours", status=LATE)
    try:
        return measure()
    except Exception as error:  # one row that fails must not end the others
        return failed("ours", error)
    finally:
        _release(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def command(sizes: ModelSizes, letter: str) -> str:
    """Return the command that measures a row again."""
    if sizes.name == SMALL_NAME:
        return f"python -m benchmarks.models --device cpu --rows {letter}"
    return f"python -m benchmarks.models --device cuda --shapes {sizes.name} --rows {letter}"


def _switch_row(sizes: ModelSizes, entries: Sequence[Entry]) -> Row:
    return Row(
        row="j",
        what="from training to generation and back: plan, take and give back the cache",
        shape=f"{_model_text(sizes)}; cache for {sizes.batches[0]} sequences",
        command=command(sizes, "j"),
        entries=entries,
        target_s=_TARGET_SWITCH_S if sizes.targets_s else None,
    )


def _step_row(
    sizes: ModelSizes, letter: str, batch: int, entries: Sequence[Entry], rates: MachineRates
) -> Row:
    half = sizes.new_tokens // 2
    return Row(
        row=letter,
        what="a decode step, sampler and host's queue included",
        shape=f"{_model_text(sizes)}; batch {batch}, context {sizes.context - half} to "
        f"{sizes.context + half}",
        command=command(sizes, letter),
        entries=entries,
        limit_s=decode_limit_s(rates, sizes.model, batch, sizes.context, sizes.dtype.itemsize),
        target_s=sizes.targets_s.get((letter, batch)),
        work=(float(batch), "tokens"),
    )


def _passes_row(
    sizes: ModelSizes, num_layers: int, entries: Sequence[Entry], rates: MachineRates, peak: float | None
) -> Row:
    flop = micro_batch_flop(sizes, num_layers) if num_layers else None
    return Row(
        row="m",
        what="forward + backward of the next-token loss, no step",
        shape=f"{_cut_text(sizes, num_layers)}; {sizes.num_sequences} × {sizes.sequence} tokens",
        command=command(sizes, "m"),
        entries=entries,
        limit_s=None if flop is None else rates.limit_s(0.0, flop),
        target_s=None if flop is None or peak is None else flop / (_TARGET_MFU * peak),
        work=(float(sizes.num_sequences * sizes.sequence), "tokens"),
    )


def _ppo_row(sizes: ModelSizes, num_layers: int, entries: Sequence[Entry]) -> Row:
    return Row(
        row="n",
        what="an iteration of PPO, four roles",
        shape=f"{_cut_text(sizes, num_layers)}; {sizes.num_prompts} prompts of {sizes.prompt_tokens} tokens, "
        f"{sizes.answer_tokens} new tokens each",
        command=command(sizes, "n"),
        entries=entries,
        work=(float(sizes.num_prompts), "samples"),
    )


def _model_text(sizes: ModelSizes) -> str:
    return f"{sizes.name}: {sizes.model.num_layers} layers, {str(sizes.dtype).removeprefix('torch.')}"


def _cut_text(sizes: ModelSizes, num_layers: int) -> str:
    cut = f"{num_layers} of {sizes.model.num_layers} layers" if num_layers else "layers not chosen"
    return f"{sizes.name}: {cut}, {str(sizes.dtype).removeprefix('torch.')}"
