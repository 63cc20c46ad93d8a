"""The paged KV cache, the decode step, its CUDA graphs, the sampler, and the loop over pipeline stages.

Imports `model`, `weights` and below; not `pipeline`, not `checkpoint`.
"""
