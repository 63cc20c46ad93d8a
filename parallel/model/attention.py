"""GLM's self-attention on Megatron-core's parallel linear layers, over packed sequences."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from glm_rlhf.kernels.layers.rope import rope, rope_qkv_in_place
from glm_rlhf.parallel.megatron_compat.parallel_layers import column_parallel_without_input_communication
from glm_rlhf.parallel.model.packing import ContextShard
from glm_rlhf.parallel.model.varlen_attention import packed_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """Inputs of every layer's attention for one micro-batch; made once per forward pass."""

    share: ContextShard
    """This rank's tokens, and the keys that each of them attends to."""
    cos_TR: torch.Tensor
    """Cosines of this rank's rows, fp32 [T, rotary pairs]."""
    sin_TR: torch.Tensor
    """Sines of this rank's rows, fp32 [T, rotary pairs]."""


class GLMSelfAttention(MegatronModule):
    """Grouped-query attention with partial interleaved RoPE and a bias on query, key and value.

    Tensor-parallel ranks split the heads. With fewer key/value heads than ranks, a rank holds a copy of the
    one that its query heads use (`linear_q` and `linear_kv` in place of `linear_qkv`);
    `training_state.sum_replicated_gradients` keeps the copies equal. Context-parallel ranks all-gather the
    keys and values of the stream before attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        tp = self.tp_group.size()
        self.head_size = config.kv_channels
        self.num_heads = config.num_attention_heads // tp
        self.num_kv_heads = max(1, config.num_query_groups // tp)
        query_size = config.num_attention_heads * self.head_size
        options = {
            "config": config,
            "init_method": config.init_method,
            "bias": config.add_qkv_bias,
            "gather_output": False,
            "tp_group": self.tp_group,
        }
        self.has_replicated_kv = config.num_query_groups < tp
        if self.has_replicated_kv:
            self.linear_q = column_parallel_without_input_communication(
                config.hidden_size, query_size, **options
            )
            kv_size = 2 * self.head_size * tp  # one key and one value head per rank
            self.linear_kv = column_parallel_without_input_communication(
                config.hidden_size, kv_size, **options
            )
            self._mark_replicas(tp // config.num_query_groups)
        else:
            kv_size = 2 * self.head_size * config.num_query_groups
            self.linear_qkv = ColumnParallelLinear(config.hidden_size, query_size + kv_size, **options)
        self.linear_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_T1D: torch.Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: AttentionInputs,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the projected attention output and no bias.

        Args:
            hidden_T1D: this rank's normalised rows, [T / cp, 1, D], or [T / cp / tp, 1, D] with sequence
                parallelism.
            attention_mask: unused: `packed_seq_params` determines which keys each query sees.
            packed_seq_params: the micro-batch, under the argument name of Megatron-core's layer.

        Returns:
            ([like hidden_T1D], None)
        """
        inputs = packed_seq_params
        query_TNH, key_TKH, value_TKH = self.project(hidden_T1D, inputs)
        if inputs.share.stream_order is not None:
            key_TKH, value_TKH = self._gather_keys_values(key_TKH, value_TKH, inputs.share.stream_order)
        context_TNH = packed_attention(query_TNH, key_TKH, value_TKH, inputs.share.segments)
        return self.linear_proj(context_TNH.reshape(context_TNH.shape[0], 1, -1))

    def project(
        self, hidden_T1D: torch.Tensor, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries [T, N, H], rotated keys and values [T, K, H] of this rank's heads."""
        if self.has_replicated_kv:
            if self.config.sequence_parallel:
                hidden_T1D = gather_from_sequence_parallel_region(hidden_T1D, group=self.tp_group)
            else:
                hidden_T1D = copy_to_tensor_model_parallel_region(hidden_T1D, group=self.tp_group)
            query_TNH = self.linear_q(hidden_T1D)[0].view(-1, self.num_heads, self.head_size)
            key_value_T2H = self.linear_kv(hidden_T1D)[0].view(-1, 2, self.head_size)
            query_TNH = rope(query_TNH, inputs.cos_TR, inputs.sin_TR)
            key_T1H = rope(key_value_T2H[:, :1], inputs.cos_TR, inputs.sin_TR)
            return query_TNH, key_T1H, key_value_T2H[:, 1:]
        heads_per_group = self.num_heads // self.num_kv_heads
        mixed_TM = rope_qkv_in_place(
            self.linear_qkv(hidden_T1D.squeeze(1))[0],
            inputs.cos_TR,
            inputs.sin_TR,
            num_groups=self.num_kv_heads,
            head_size=self.head_size,
        )
        mixed = mixed_TM.view(-1, self.num_kv_heads, heads_per_group + 2, self.head_size)
        query, key_TKH, value_TKH = mixed.split((heads_per_group, 1, 1), dim=2)
        query_TNH = query.reshape(-1, self.num_heads, self.head_size)
        return query_TNH, key_TKH.squeeze(2), value_TKH.squeeze(2)

    def _gather_keys_values(
        self, key_TKH: torch.Tensor, value_TKH: torch.Tensor, stream_order: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the whole stream, in stream order.

        One all-gather over cp of 2 · T/cp · K · H elements; backward is one reduce-scatter.
        """
        local = torch.cat((key_TKH, value_TKH), dim=1)
        gathered = gather_from_sequence_parallel_region(local, group=self.cp_group)[stream_order]
        return gathered.split((self.num_kv_heads, self.num_kv_heads), dim=1)

    def _mark_replicas(self, num_replicas: int) -> None:
        """Mark every copy but the first, so that gradient norms count it once."""
        is_first = self.tp_group.rank() % num_replicas == 0
        for parameter in self.linear_kv.parameters():
            parameter.tensor_model_parallel = is_first
            parameter.num_tp_replicas = num_replicas
