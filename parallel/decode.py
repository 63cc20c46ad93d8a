"""A forward pass for generation: plain tensor operations over the training module's own parameters.

No copies of weights, no autograd, no module calls: Megatron-core's wrappers cost more than the
mathematics of a decode step. The same function runs eagerly on a CPU and can be captured on CUDA.
Tensor-parallel ranks hold all rows (sequence parallelism saves nothing at a token a sequence); the
model's layout is otherwise the one it trains in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer

from glm_rlhf.kernels.attention import paged_attention
from glm_rlhf.kernels.paged_write import paged_write
from glm_rlhf.kernels.rmsnorm import add_rms_norm, rms_norm
from glm_rlhf.kernels.rope import rope, rope_qkv_in_place
from glm_rlhf.kernels.swiglu import swiglu
from glm_rlhf.parallel.core_attention import packed_attention
from glm_rlhf.parallel.decode_batch import DecodeBatch
from glm_rlhf.parallel.glm import GLMModel
from glm_rlhf.parallel.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The parameters of one layer, as they stand in the module: an optimizer step changes them in place."""

    input_norm: torch.Tensor
    projections: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    """(weight, bias) of the joint query-key-value projection, or of query and of key-value apart."""
    output: torch.Tensor
    attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    branch_norm: torch.Tensor | None

    @classmethod
    def of(cls, layer: TransformerLayer) -> "LayerWeights":
        """Return the parameters of a training layer."""
        attention = layer.self_attention
        linears = (
            (attention.linear_q, attention.linear_kv)
            if attention.has_replicated_kv
            else (attention.linear_qkv,)
        )
        norms = [add.norm for add in (layer.self_attn_bda, layer.mlp_bda)]
        attention_norm, branch_norm = [None if norm is None else norm.weight for norm in norms]
        return cls(
            input_norm=layer.input_layernorm.weight,
            projections=tuple((linear.weight, linear.bias) for linear in linears),
            output=attention.linear_proj.weight,
            attention_norm=attention_norm,
            mlp_norm=layer.pre_mlp_layernorm.weight,
            gate_up=layer.mlp.linear_fc1.weight,
            down=layer.mlp.linear_fc2.weight,
            branch_norm=branch_norm,
        )


class ChunkDecoder:
    """One model chunk, ready to generate over a cache."""

    def __init__(self, chunk: GLMModel, cache: KVCache, first_layer: int) -> None:
        """Take the parameters of `chunk`, whose layers use the cache's from `first_layer` on."""
        attention = chunk.decoder.layers[0].self_attention
        self.chunk, self.cache = chunk, cache
        self.layers = [LayerWeights.of(layer) for layer in chunk.decoder.layers]
        self.pools = [cache.layer(first_layer + i) for i in range(len(self.layers))]
        self.tp_group = chunk.topology.tp_group if chunk.topology.layout.tp > 1 else None
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.epsilon = chunk.glm.norm_epsilon

    @torch.no_grad()
    def forward(self, batch: DecodeBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """Return this chunk's output for a step, keys and values written to the cache.

        The tensor-parallel group communicates: two all-reduces of [T, D] a layer, and one for the embedding.

        Args:
            batch: the rows.
            hidden_TD: the former chunk's output; None for the first chunk.

        Returns:
            The residual stream [T, D]; from the last chunk the normed hidden states of the sampled rows.
        """
        if hidden_TD is None:
            hidden_TD = self._embed(batch.tokens_T)
        longest = min(self.chunk.glm.max_positions, self.cache.page_size * self.cache.num_pages)
        cos_PR, sin_PR = self.chunk.rotary_table(longest)
        cos_TR, sin_TR = cos_PR[batch.positions_T], sin_PR[batch.positions_T]
        residual = hidden_TD
        normed = rms_norm(hidden_TD, self.layers[0].input_norm, epsilon=self.epsilon)
        for index, (layer, pools) in enumerate(zip(self.layers, self.pools, strict=True)):
            branch = self._attention(normed, layer, pools, batch, cos_TR, sin_TR)
            if layer.attention_norm is not None:
                branch = rms_norm(branch, layer.attention_norm, epsilon=self.epsilon)
            normed, residual = add_rms_norm(branch, residual, layer.mlp_norm, epsilon=self.epsilon)
            branch = self._reduce(F.linear(swiglu(F.linear(normed, layer.gate_up)), layer.down))
            if layer.branch_norm is not None:
                branch = rms_norm(branch, layer.branch_norm, epsilon=self.epsilon)
            is_last = index + 1 == len(self.layers)
            if not is_last:
                next_norm = self.layers[index + 1].input_norm
                normed, residual = add_rms_norm(branch, residual, next_norm, epsilon=self.epsilon)
        if not self.chunk.post_process:
            return residual + branch
        rows = batch.sampled_rows
        final = self.chunk.decoder.final_layernorm.weight
        return add_rms_norm(branch[rows], residual[rows], final, epsilon=self.epsilon)[0]

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns of the logits, fp32 [B, V / tp]: never rounded to bf16."""
        weight_VD = self.chunk.output_weight_VD
        if hidden_BD.dtype == torch.float32:
            return hidden_BD @ weight_VD.t()
        if hidden_BD.is_cuda:
            return torch.mm(hidden_BD, weight_VD.t(), out_dtype=torch.float32)
        return hidden_BD.float() @ weight_VD.float().t()

    def _attention(
        self,
        normed_TD: torch.Tensor,
        layer: LayerWeights,
        pools: tuple[torch.Tensor, torch.Tensor],
        batch: DecodeBatch,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
    ) -> torch.Tensor:
        query, key, value = self._project(normed_TD, layer, cos_TR, sin_TR)
        paged_write(key, value, *pools, batch.slots_T)
        num_decodes, outputs = batch.num_decodes, []
        if num_decodes:
            outputs.append(paged_attention(query[:num_decodes], *pools, batch.page_table_BP, batch.lengths_B))
        if batch.prefill is not None:
            key, value = key[num_decodes:], value[num_decodes:]
            if batch.key_slots_S is not None:
                key, value = (pool.flatten(0, 1)[batch.key_slots_S] for pool in pools)
            outputs.append(packed_attention(query[num_decodes:], key, value, (batch.prefill,)))
        context = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self._reduce(F.linear(context.reshape(context.shape[0], -1), layer.output))

    def _project(
        self, normed_TD: torch.Tensor, layer: LayerWeights, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head_size = self.chunk.glm.head_size
        outputs = [F.linear(normed_TD, weight, bias) for weight, bias in layer.projections]
        if len(outputs) == 2:
            query_TNH = rope(outputs[0].view(-1, self.num_heads, head_size), cos_TR, sin_TR)
            key_value = outputs[1].view(-1, 2, head_size)
            return query_TNH, rope(key_value[:, :1], cos_TR, sin_TR), key_value[:, 1:]
        group = self.num_heads // self.num_kv_heads
        mixed = rope_qkv_in_place(
            outputs[0], cos_TR, sin_TR, num_groups=self.num_kv_heads, head_size=head_size
        ).view(-1, self.num_kv_heads, group + 2, head_size)
        query_TNH = mixed[:, :, :group].reshape(-1, self.num_heads, head_size)
        return query_TNH, mixed[:, :, group], mixed[:, :, group + 1]

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        embedding = self.chunk.embedding.word_embeddings
        if self.tp_group is None:
            return F.embedding(tokens_T, embedding.weight)
        local_T = tokens_T - embedding.vocab_start_index
        is_here_T = (local_T >= 0) & (local_T < embedding.weight.shape[0])
        hidden_TD = F.embedding(local_T.where(is_here_T, 0), embedding.weight)
        return self._reduce(hidden_TD * is_here_T.unsqueeze(1))

    def _reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.tp_group is not None:
            dist.all_reduce(partial, group=self.tp_group)
        return partial


def chunk_decoders(chunks: Sequence[GLMModel], cache: KVCache) -> list[ChunkDecoder]:
    """Return a decoder for each of this rank's chunks, in order, sharing the cache's layers out."""
    decoders, first_layer = [], 0
    for chunk in chunks:
        decoders.append(ChunkDecoder(chunk, cache, first_layer))
        first_layer += len(chunk.decoder.layers)
    return decoders
