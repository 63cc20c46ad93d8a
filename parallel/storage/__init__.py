"""Files on disk: formats, durable writes, model folders, checkpoint manifests.

Imports `spec`; never torch.distributed.
"""
