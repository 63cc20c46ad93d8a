"""Checkpoints of a training run, restored in any layout.

Imports `model`, `optim`, `weights` and below; not `pipeline`, not `inference`.
"""
