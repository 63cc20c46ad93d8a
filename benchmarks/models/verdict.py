"""The report of rows j to n, and its verdict on the targets."""

from collections.abc import Sequence

import torch

from glm_rlhf.engine.bench.machine import H200, MachineRates, description
from glm_rlhf.engine.bench.report import Report, Row

_MOST_OUTSIDE = 2.0
"""Percent of an iteration, the target of row n."""


def report_of(rows: Sequence[Row], device: torch.device, rates: MachineRates) -> Report:
    """Return the report of all rows."""
    notes = [
        f"rates behind `limit ms`: {rates.source}. A decode step's limit: every matrix but the embedding "
        "read once or its products computed, then keys and values read once. Row m's: its products",
        "k, l: `GenerationPhase` as generation uses it, prompts of random tokens prefilled through the model "
        "into the paged cache; a run is the time from one replay of the recorded step to the next, the "
        "host's queue and the draw included. `replay alone`: the recorded step again, nothing else. "
        "`recording`: what it took to record it, once a phase and batch size. error: nats that logprobs of "
        "sampled tokens lie off the training module's forward pass, on average, the worst of four answers",
        "transformers: GlmForCausalLM of the same shape with other random weights, `generate` with "
        "cache_implementation=static, eager (compiling it takes minutes), sampling at temperature 1; each "
        "step is waited for",
        "j: `moved bytes` of weights that generation reads at another address than training's, in all runs",
        "m, n: as many layers as fit with AdamW's whole state: fp32 gradient, master weights and moments. "
        "With few layers the vocabulary weighs more than in the whole model. error: of the mean loss, "
        "relative to forward passes of each sequence alone. MFU: counted operations, none run again, by the "
        "data sheet's peak",
        "n: phases are medians of three iterations, the device waited for behind each. `outside %`: the "
        "share that is neither `generate` nor matrix products and attention, which are summed by kernel "
        "names (on a CPU: by operations) in one further iteration that is profiled; gaps count as outside. "
        "logprob gap: nats between sampler and forward pass; above 1e-4 old logprobs are computed again",
    ]
    if device.type == "cuda":
        notes.append(f"targets are for an {H200.source}")
    else:
        notes.append(
            "a small shape in fp32, so that the command is known to work: a recorded step is run again in "
            "full where there is no CUDA graph. These rows say nothing about a GPU; no target is judged"
        )
    return Report(
        title=f"Whole models, {device.type.upper()}",
        claim=claim(rows) if device.type == "cuda" else "On a CPU nothing is claimed of these rows.",
        machine=description(device),
        rows=rows,
        notes=notes,
    )


def claim(rows: Sequence[Row]) -> str:
    """Return how each row compares with its target, in one sentence per row."""
    said = []
    for row in rows:
        engine = row.entries[0]
        name = f"{row.row} ({row.shape})"
        if engine.timing is None:
            said.append(f"{name}: {engine.status}.")
        elif "outside %" in engine.figures:
            share = engine.figures["outside %"]
            judged = "met" if share <= _MOST_OUTSIDE else "missed"
            said.append(f"{name}: {share:.1f} % outside, target {_MOST_OUTSIDE:g} % ({judged}).")
        elif row.target_s is not None:
            judged = "met" if engine.timing.median_s <= row.target_s else "missed"
            said.append(
                f"{name}: {1e3 * engine.timing.median_s:.4g} ms, "
                f"target {1e3 * row.target_s:.4g} ms ({judged})."
            )
    return " ".join(said)
