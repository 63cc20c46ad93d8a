"""The forward pass of generation: tensor operations on the training module's parameters.

No copies of weights, no autograd, no module calls: Megatron-core's wrappers cost more time than the
arithmetic of a decode step. The same function runs eagerly on a CPU and is captured in a graph on CUDA.
Tensor-parallel ranks hold all rows (sequence parallelism saves nothing with one token per sequence);
otherwise the layout of the parameters is unchanged.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from glm_rlhf.kernels.layers.rope import rope_table
from glm_rlhf.parallel.inference.kv_cache import KVCache
from glm_rlhf.parallel.inference.layer_ops import LayerOps, layer_ops
from glm_rlhf.parallel.inference.step_inputs import DecodeBatch
from glm_rlhf.parallel.inference.weight_views import ChunkWeights, LayerWeights
from glm_rlhf.parallel.model.varlen_attention import packed_attention


class ChunkDecoder:
    """One model chunk for generation over a cache."""

    def __init__(self, weights: ChunkWeights, cache: KVCache, first_layer: int) -> None:
        """Use a chunk's parameters; its first layer uses layer `first_layer` of the cache."""
        glm, topology = weights.glm, weights.topology
        self.weights, self.cache = weights, cache
        self.pools = [cache.layer(first_layer + index) for index in range(len(weights.layers))]
        self.tp_group = topology.tp_group if topology.layout.tp > 1 else None
        longest = min(glm.max_positions, cache.page_size * cache.num_pages)
        self.rotary_table = rope_table(longest, glm.rotary_size, glm.rope_theta, device=topology.device)

    @torch.inference_mode()
    def forward(self, batch: DecodeBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """Return this chunk's output for a step; writes keys and values to the cache.

        The tensor-parallel group communicates: two all-reduces of [T, D] per layer, one for the embedding.
        On CUDA the host does not wait.

        Args:
            batch: the rows.
            hidden_TD: the previous chunk's output; None for the first chunk.

        Returns:
            The residual stream [T, D]; from the last chunk the normalised hidden states of the sampled rows.
        """
        residual = self._embed(batch.tokens_T) if hidden_TD is None else hidden_TD
        ops = layer_ops(
            batch,
            self.rotary_table,
            page_size=self.cache.page_size,
            epsilon=self.weights.glm.norm_epsilon,
        )
        layers, final_norm_D = self.weights.layers, self.weights.final_norm_D
        normed = ops.norm(residual, layers[0].input_norm)
        for index, (layer, pools) in enumerate(zip(layers, self.pools, strict=True)):
            is_last = index + 1 == len(layers)
            context = self._attention(normed, layer, pools, batch, ops)
            if is_last and final_norm_D is not None and batch.sampled_rows is not None:
                # After the last attention only the sampled rows are needed.
                context, residual = context[batch.sampled_rows], residual[batch.sampled_rows]
            branch = self._reduce(F.linear(context, layer.output))
            if layer.attention_norm is not None:
                branch = ops.norm(branch, layer.attention_norm)
            normed, residual = ops.add_norm(branch, residual, layer.mlp_norm)
            branch = self._reduce(F.linear(ops.gate(F.linear(normed, layer.gate_up)), layer.down))
            if layer.branch_norm is not None:
                branch = ops.norm(branch, layer.branch_norm)
            if not is_last:
                normed, residual = ops.add_norm(branch, residual, layers[index + 1].input_norm)
        if final_norm_D is None:
            return residual + branch
        return ops.add_norm(branch, residual, final_norm_D)[0]

    @torch.inference_mode()
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns of the logits without padding, fp32 [B, V / tp], not rounded to bf16."""
        weight_VD = self.weights.head_VD
        assert weight_VD is not None, "only the last chunk has logits"
        if self.tp_group is not None:
            first = self.tp_group.rank() * len(weight_VD)
            weight_VD = weight_VD[: self.weights.glm.vocab_size - first]
        if hidden_BD.dtype == torch.float32:
            return F.linear(hidden_BD, weight_VD)
        if hidden_BD.is_cuda:
            return torch.mm(hidden_BD, weight_VD.t(), out_dtype=torch.float32)
        return F.linear(hidden_BD.float(), weight_VD.float())

    def _attention(
        self,
        normed_TD: torch.Tensor,
        layer: LayerWeights,
        pools: torch.Tensor,
        batch: DecodeBatch,
        ops: LayerOps,
    ) -> torch.Tensor:
        """Return the attention of every row, [T, N · H].

        A group of heads consists of its queries, its key and its value, in this order.
        """
        parts = [F.linear(normed_TD, weight, bias) for weight, bias in layer.projections]
        mixed_TM = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        mixed_TGSH = mixed_TM.view(len(mixed_TM), self.weights.num_kv_heads, -1, self.weights.glm.head_size)
        ops.rotate(mixed_TGSH)
        ops.write(mixed_TGSH, pools)
        query_TKGH, num_decodes, outputs = mixed_TGSH[:, :, :-2], batch.num_decodes, []
        if num_decodes:
            outputs.append(ops.attend(query_TKGH[:num_decodes], pools))
        if batch.prefill is not None:
            key, value = mixed_TGSH[num_decodes:, :, -2], mixed_TGSH[num_decodes:, :, -1]
            if batch.key_slots_S is not None:
                key, value = (pool.flatten(0, 1)[batch.key_slots_S] for pool in pools.unbind(0))
            query_TNH = query_TKGH[num_decodes:].flatten(1, 2)
            outputs.append(packed_attention(query_TNH, key, value, (batch.prefill,)).flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        weight_VD = self.weights.embedding_VD
        if self.tp_group is None:
            return F.embedding(tokens_T, weight_VD)
        local_T = tokens_T - self.tp_group.rank() * len(weight_VD)
        is_here_T = (local_T >= 0) & (local_T < len(weight_VD))
        hidden_TD = F.embedding(local_T.where(is_here_T, 0), weight_VD)
        return self._reduce(hidden_TD * is_here_T.unsqueeze(1))

    def _reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.tp_group is not None and partial.numel():  # the size is equal on all ranks
            dist.all_reduce(partial, group=self.tp_group)
        return partial


def chunk_decoders(chunks: Sequence[ChunkWeights], cache: KVCache) -> list[ChunkDecoder]:
    """Return a decoder per chunk of this rank, each with its own layers of the cache."""
    decoders, first_layer = [], 0
    for chunk in chunks:
        decoders.append(ChunkDecoder(chunk, cache, first_layer))
        first_layer += len(chunk.layers)
    return decoders
