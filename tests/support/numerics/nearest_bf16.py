"""Triton's interpreter truncates float32 to bf16; devices round to nearest. This makes it round."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install(monkeypatch) -> None:
    """Make the interpreter's conversions to bf16 round to nearest even until the test ends."""
    plain = interpreter._convert_float

    def convert(values, source, destination, rounding_mode):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return plain(values, source, destination, rounding_mode)
        flat = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=np.float32).copy())
        rounded = flat.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return rounded.reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
