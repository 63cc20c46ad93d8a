"""The command `convert`: a Hugging Face folder into another form, type or file size."""

import time
from functools import partial

from glm_rlhf.engine.config.tools import ConvertConfig
from glm_rlhf.engine.runs.run_folder import record_config
from glm_rlhf.engine.runs.same_start import check_same_start
from glm_rlhf.parallel.runtime.consensus import failure_barriers
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.convert_folder import convert_folder


def run(config: ConvertConfig) -> None:
    """Write the converted folder; under torchrun the ranks share the layers. Every rank calls it.

    Raises:
        ValueError: anything that the user has to fix.
    """
    wanted, start = config.convert, time.monotonic()
    with open_topology(Layout(), check=partial(check_same_start, config)) as topology:
        with failure_barriers(f"converting {config.model.path}") as barrier:
            convert_folder(
                config.model.path,
                wanted.to,
                family=None if wanted.format == "same" else wanted.format,
                dtype=wanted.dtype,
                max_shard_bytes=wanted.max_shard_bytes,
                rank=topology.rank,
                world=topology.world_size,
                barrier=barrier,
            )
        record_config(config, topology)
        log(f"converted {config.model.path} to {wanted.to} in {time.monotonic() - start:.1f} s", topology)
