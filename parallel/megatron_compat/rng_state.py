"""The states of this rank's random number generators, as tensors for a checkpoint."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from glm_rlhf.parallel.megatron_compat.cpu_patches import is_needed as is_cpu

_TRACKED = "megatron/"
_ALWAYS = ("python", "python_gauss", "numpy", "numpy_gauss", "torch")


def random_state() -> dict[str, torch.Tensor]:
    """Return the states of Python's, numpy's, torch's and Megatron-core's generators by name."""
    version, state_words, gauss = random.getstate()
    assert version == 3
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor(state_words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if not is_cpu():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in get_cuda_rng_tracker().get_states().items():
        state[_TRACKED + name] = value.cpu()
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Set every generator to a state that `random_state` returned.

    Raises:
        ValueError: the state of a generator is missing.
    """
    missing = [name for name in _ALWAYS if name not in state]
    if missing:
        raise ValueError(
            f"there is no state of the random generators {', '.join(missing)}; {', '.join(_ALWAYS)} are "
            "required: remove this checkpoint to resume from the previous one"
        )
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and not is_cpu():
        torch.cuda.set_rng_state(state["cuda"])
    tracked = {
        name.removeprefix(_TRACKED): value for name, value in state.items() if name.startswith(_TRACKED)
    }
    get_cuda_rng_tracker().set_states(tracked)
