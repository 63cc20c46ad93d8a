"""Import of a model folder into the shards of all ranks, and export.

Imports `model` and everything that `model` may import; not `optim`.
"""
