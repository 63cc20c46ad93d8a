"""Sharded GLM models on Megatron-core: the only layer that imports it.

- `spec`: what a model and a layout are; pure Python on numbers.
- `megatron_compat`: every patch and private name of Megatron-core and torch.
- `runtime`: process groups, errors and signals that all ranks share, timed spans, offloading to the host.
- `storage`: file formats, durable writes, model folders, manifests of checkpoints.
- `model`: the sharded GLM, from packed tokens to log-probabilities and losses.
- `weights`: a model folder into the shards of all ranks, and back.
- `optim`: gradient buffers, the optimizers, Adam's state in shards.
- `pipeline`: forward and backward of micro-batches over pipeline stages, scoring.
- `checkpoint`: a training run saved, and restored in any layout.
- `inference`: generation on the training weights.

`fast_paths` reports which optional accelerations this process has.
"""

from glm_rlhf.parallel.megatron_compat import lazy_compile, warning_filters

warning_filters.install()
lazy_compile.install()
