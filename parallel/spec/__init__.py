"""Model shapes, layouts, names of weights, shards and their transfers, the order of a pipeline.

Pure Python on numbers. Imports neither torch.distributed nor Megatron-core, and no other sub-package.
"""
