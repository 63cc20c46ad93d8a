"""What a model and a layout are: shapes, names of weights, which rank holds which slice, orders of work.

Pure Python on numbers. Imports neither torch.distributed nor Megatron-core, and no other sub-package.
"""
