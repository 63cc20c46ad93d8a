"""The paged cache, one decoding step, its CUDA graphs, the sampler, and the loop over pipeline stages.

Imports `model`, `weights` and below; not `pipeline`, not `checkpoint`.
"""
