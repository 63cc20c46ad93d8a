"""A model folder into the shards of all ranks, and back.

Imports what `model` may, and `model`; not `optim`.
"""
