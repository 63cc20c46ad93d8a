"""Tiles of the vocabulary head for few rows and the models' vocabularies."""

import dataclasses

from glm_rlhf.kernels.dispatch.launch import is_interpreting
from glm_rlhf.kernels.lm_head import vocab_head


def install(monkeypatch):
    """Use wide tiles of few rows under the interpreter, whose time is per tile."""
    wide = dataclasses.replace(vocab_head.HOPPER, rows=16, columns=4096, width=16)
    if is_interpreting():
        monkeypatch.setattr(vocab_head, "tile_shape", lambda hidden, weight: wide)
