"""Bytes on a disk: file formats, durable writes, model folders, manifests of checkpoints.

Imports `spec`; never torch.distributed.
"""
