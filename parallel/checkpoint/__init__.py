"""A training run saved, and restored in any layout.

Imports `model`, `optim`, `weights` and below; not `pipeline`, not `inference`.
"""
