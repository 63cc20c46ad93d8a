"""The sharded GLM model: the model chunks that this rank holds in a layout."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.kernels.layers.rope import rope_table
from glm_rlhf.parallel.megatron_compat.cpu_patches import is_needed as is_cpu
from glm_rlhf.parallel.megatron_compat.parallel_layers import keep_grad_mode
from glm_rlhf.parallel.model.attention import AttentionInputs
from glm_rlhf.parallel.model.heads import ValueHead, VocabularyHead
from glm_rlhf.parallel.model.layers import block_submodules
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.weight_map import SCALAR_ROLES

Role = Literal["policy", "critic", "reward", "reference"]


def build_model(
    config: GLMConfig,
    topology: Topology,
    *,
    role: Role = "policy",
    dtype: torch.dtype = torch.bfloat16,
    recompute_layers: bool = False,
) -> list["GLMModel"]:
    """Return the chunks of a model that this rank holds, with weights allocated but not initialised.

    Every rank of the topology calls this; nothing is communicated.

    Args:
        config: shape of the model.
        topology: layout and process groups.
        role: policy and reference end in a vocabulary head, critic and reward in a scalar head (fp32).
        dtype: of all other weights.
        recompute_layers: keep only each layer's input for backward, and recompute the layer there.

    Returns:
        `layout.vpp` chunks, first layers first.

    Raises:
        ValueError: the layout cannot split this model; the message names the numbers.
    """
    topology.layout.check_model(config)
    megatron = transformer_config(config, topology, dtype=dtype, recompute_layers=recompute_layers)
    chunks = []
    for chunk in range(topology.layout.vpp):
        model = GLMModel(config, megatron, topology, role=role, chunk=chunk)
        chunks.append(model.to(topology.device))
    return chunks


class GLMModel(MegatronModule):
    """One model chunk: embedding (first chunk), consecutive layers, final norm and head (last chunk)."""

    def __init__(
        self, glm: GLMConfig, config: TransformerConfig, topology: Topology, *, role: Role, chunk: int
    ) -> None:
        super().__init__(config=config)
        layout = topology.layout
        self.glm, self.topology, self.role = glm, topology, role
        self.pre_process = topology.pp_rank == 0 and chunk == 0
        self.post_process = topology.is_last_stage and chunk == layout.vpp - 1
        has_vocabulary_head = role not in SCALAR_ROLES
        self.share_embeddings_and_output_weights = glm.has_tied_head and has_vocabulary_head
        groups = ProcessGroupCollection.use_mpu_process_groups()
        if self.pre_process:
            self.embedding = Embedding(glm, config, topology)
        num_layers = glm.num_layers // (layout.pp * layout.vpp)
        submodules = block_submodules(config, num_layers, has_sandwich_norms=glm.has_sandwich_norms)
        self.decoder = TransformerBlock(
            config,
            submodules,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=chunk if layout.vpp > 1 else None,
        )
        for layer in self.decoder.layers:
            keep_grad_mode(layer)
        if self.post_process and not has_vocabulary_head:
            self.value_head = ValueHead(glm, device=topology.device)
        elif self.post_process and not (self.share_embeddings_and_output_weights and self.pre_process):
            self.output_layer = VocabularyHead(
                glm.hidden_size,
                glm.rows_per_rank(layout.tp) * layout.tp,
                config=config,
                init_method=config.init_method,
                bias=False,
                tp_group=topology.tp_group,
            )
        self.most_tokens: dict[str, int] = {}
        """Most tokens per micro-batch that fit in memory, for `training` and `forward`; see `oom_retry`."""
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        _mark_shards(self)
        self._mark_shared_weight()

    @property
    def output_weight_VD(self) -> torch.Tensor:
        """This rank's rows of the vocabulary head, [V / tp, D] with padding; on the last chunk only."""
        return self.output_layer() if hasattr(self, "output_layer") else self.embedding.word_embeddings.weight

    def head_weights(self) -> list[torch.Tensor]:
        """Return the parameters of the head; on the last chunk only."""
        return list(self.value_head.parameters()) if hasattr(self, "value_head") else [self.output_weight_VD]

    @property
    def first_layer(self) -> int:
        """Index in the whole model of this chunk's first layer, from 0."""
        return self.decoder.layers[0].layer_number - 1

    def forward(self, share: ContextShard) -> torch.Tensor:
        """Return this chunk's output for one micro-batch.

        Args:
            share: this rank's part of the micro-batch.

        Returns:
            Before the last chunk: the residual stream [T / cp, 1, D] (T / cp / tp rows with sequence
            parallelism). From the last: final hidden states [T / cp, D], equal on all tensor-parallel
            ranks, the input of a head.
        """
        hidden = self.embedding(share.take(share.packed.tokens_T)) if self.pre_process else None
        if hidden is not None and self.config.recompute_granularity and torch.is_grad_enabled():
            hidden.requires_grad_()  # else recomputed layers behind a frozen embedding get no gradients
        cos_PR, sin_PR = self.rotary_table(max(b - a for a, b in share.packed.spans))
        inputs = AttentionInputs(
            share=share, cos_TR=cos_PR[share.positions_T], sin_TR=sin_PR[share.positions_T]
        )
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=inputs)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Each rank has a partial gradient of the vocabulary head's input: backward sums them here. The
            # scalar head computes the same on every rank: backward takes each rank's rows.
            is_partial = self.role not in SCALAR_ROLES
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=is_partial, group=self.topology.tp_group
            )
        return hidden.squeeze(1)

    def named_weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield every parameter with its name in the whole model: layers count from the first stage."""
        prefix = "decoder.layers."
        for name, parameter in self.named_parameters():
            if name.startswith(prefix):
                index, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{int(index) + self.first_layer}.{rest}"
            yield name, parameter

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Set the previous chunk's output [T / cp, 1, D], None on the first chunk, for the next `forward`."""
        self.decoder.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the weight tied over first and last stage, for Megatron-core's gradient reduction."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None

    def rotary_table(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of at least `longest` positions; the table grows in powers of two."""
        if self._rotary is None or self._rotary[0].shape[0] < longest:
            num_positions = 1 << max(longest - 1, 1023).bit_length()
            device = self.topology.device
            self._rotary = rope_table(num_positions, self.glm.rotary_size, self.glm.rope_theta, device=device)
        return self._rotary

    def _mark_shared_weight(self) -> None:
        if not (self.share_embeddings_and_output_weights and self.topology.layout.pp > 1):
            return
        if self.pre_process or self.post_process:
            self.shared_embedding_or_output_weight().shared_embedding = True
        if self.post_process:
            self.output_layer.weight.shared = True  # counted once in norms


class Embedding(torch.nn.Module):
    """Rows of the vocabulary for token ids, the vocabulary split over tensor-parallel ranks."""

    def __init__(self, glm: GLMConfig, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        tp = topology.layout.tp
        self.word_embeddings = VocabParallelEmbedding(
            glm.rows_per_rank(tp) * tp,
            glm.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=topology.tp_group,
        )

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Return [T, 1, D], or this rank's [T / tp, 1, D] with sequence parallelism."""
        # The layer swaps the first two dims only if it reduce-scatters for sequence parallelism.
        dim = 0 if self.word_embeddings.reduce_scatter_embeddings else 1
        return self.word_embeddings(tokens_T.unsqueeze(dim))


def transformer_config(
    config: GLMConfig, topology: Topology, *, dtype: torch.dtype, recompute_layers: bool
) -> TransformerConfig:
    """Return Megatron-core's configuration of a GLM in a layout."""
    layout = topology.layout
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_size,
        ffn_hidden_size=config.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # builds the activation from the spec: ours takes [gate | up] whole
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=config.has_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,  # losses are divided by global denominators: Megatron must not average
        use_cpu_initialization=is_cpu(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        recompute_granularity="full" if recompute_layers else None,
        recompute_method="uniform" if recompute_layers else None,
        recompute_num_layers=1 if recompute_layers else None,
    )


def _mark_shards(model: torch.nn.Module) -> None:
    """Mark every split weight, so that gradient norms count each rank's part.

    Megatron-core does this in its random initialisation, which this model skips.
    """
    split_dims = {ColumnParallelLinear: 0, VocabularyHead: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = split_dims.get(type(module))
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "num_tp_replicas"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)
