"""The operations of a decoder's layers other than matrix products, for the rows of one step.

`KernelOps` calls the kernels. `TorchOps` uses torch directly on a CPU: there a decode step is so short that
argument checks and dispatch cost as much as the operation, and values common to all layers are computed once.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from glm_rlhf.kernels.decoding.paged_attention import paged_attention
from glm_rlhf.kernels.decoding.paged_write import paged_write
from glm_rlhf.kernels.decoding.reference_paged_attention import visible_slots
from glm_rlhf.kernels.dispatch.launch import uses_triton
from glm_rlhf.kernels.layers.reference_rope import rotate_complex_in_place
from glm_rlhf.kernels.layers.rmsnorm import add_rms_norm, rms_norm
from glm_rlhf.kernels.layers.rope import rope_qkv_in_place
from glm_rlhf.kernels.layers.swiglu import swiglu
from glm_rlhf.parallel.inference.step_inputs import DecodeBatch


class LayerOps(Protocol):
    """The operations between a layer's matrix products; the kernels define their numerics."""

    def norm(self, hidden_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        """Return the RMSNorm of `hidden_TD`."""

    def add_norm(
        self, branch_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (RMSNorm of the sum, the sum)."""

    def gate(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up."""

    def rotate(self, heads_TGSH: torch.Tensor) -> None:
        """Rotate all but the last head of each group by its row's position, in place (contiguous)."""

    def write(self, heads_TGSH: torch.Tensor, pools: torch.Tensor) -> None:
        """Store keys and values, the last two heads of each group, of all rows in a layer's pools."""

    def attend(self, query_BKGH: torch.Tensor, pools: torch.Tensor) -> torch.Tensor:
        """Return the attention of the decoding rows over their pages in a layer's pools, [B, N · H]."""


def layer_ops(
    batch: DecodeBatch, table: tuple[torch.Tensor, torch.Tensor], *, page_size: int, epsilon: float
) -> LayerOps:
    """Return the operations for one step.

    Args:
        batch: the rows.
        table: cosines and sines [P, R] of all positions.
        page_size: positions per page.
        epsilon: of the norms.
    """
    cos_TR, sin_TR = (part.index_select(0, batch.positions_T) for part in table)
    if uses_triton(batch.tokens_T):
        return KernelOps(batch, cos_TR, sin_TR, epsilon)
    return TorchOps(batch, cos_TR, sin_TR, epsilon, page_size)


class KernelOps:
    """The operations by kernels."""

    def __init__(
        self, batch: DecodeBatch, cos_TR: torch.Tensor, sin_TR: torch.Tensor, epsilon: float
    ) -> None:
        self._batch, self._cos_TR, self._sin_TR, self._epsilon = batch, cos_TR, sin_TR, epsilon

    def norm(self, hidden_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_TD, weight_D, epsilon=self._epsilon)

    def add_norm(
        self, branch_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(branch_TD, residual_TD, weight_D, epsilon=self._epsilon)

    def gate(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up_TF2)

    def rotate(self, heads_TGSH: torch.Tensor) -> None:
        num_groups, head_size = heads_TGSH.shape[1], heads_TGSH.shape[3]
        rope_qkv_in_place(
            heads_TGSH.flatten(1), self._cos_TR, self._sin_TR, num_groups=num_groups, head_size=head_size
        )

    def write(self, heads_TGSH: torch.Tensor, pools: torch.Tensor) -> None:
        keys, values = pools.unbind(0)
        paged_write(heads_TGSH[:, :, -2], heads_TGSH[:, :, -1], keys, values, self._batch.slots_T)

    def attend(self, query_BKGH: torch.Tensor, pools: torch.Tensor) -> torch.Tensor:
        batch = self._batch
        context_BNH = paged_attention(
            query_BKGH.flatten(1, 2), *pools.unbind(0), batch.page_table_BP, batch.lengths_B
        )
        return context_BNH.flatten(1)


class TorchOps:
    """The operations in fp32 torch on a CPU, rounded where the kernels round."""

    def __init__(
        self,
        batch: DecodeBatch,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        epsilon: float,
        page_size: int,
    ) -> None:
        # A pair of elements is a complex number; multiplication by a unit complex number rotates it.
        self._angle_T11R = torch.complex(cos_TR, sin_TR)[:, None, None]
        self._epsilon = torch.tensor(epsilon)
        self._slots_T = batch.slots_T
        self._padding_rows = None
        if batch.num_decodes:
            slots_BL, bias_B1L = visible_slots(
                batch.page_table_BP, batch.lengths_B, page_size=page_size, num_new=1
            )
            self._context_shape = slots_BL.shape
            self._context_slots, self._bias_B11L = slots_BL.flatten(), bias_B1L[:, None]
            if int(batch.lengths_B.min()) == 0:
                self._padding_rows = (batch.lengths_B == 0).nonzero()[:, 0]

    def norm(self, hidden_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        wide_TD = _wide(hidden_TD)
        norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
        rstd_T1 = torch.addcmul(self._epsilon, norm_T1, norm_T1, value=1.0 / hidden_TD.shape[-1]).rsqrt_()
        return _narrow(wide_TD * rstd_T1, hidden_TD.dtype).mul_(weight_D)

    def add_norm(
        self, branch_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total_TD = branch_TD + residual_TD
        return self.norm(total_TD, weight_D), total_TD

    def gate(self, gate_up_TF2: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = _wide(gate_up_TF2).chunk(2, dim=-1)
        return _narrow(F.silu(gate_TF).mul_(up_TF), gate_up_TF2.dtype)

    def rotate(self, heads_TGSH: torch.Tensor) -> None:
        num_pairs = self._angle_T11R.shape[-1]
        if heads_TGSH.dtype == torch.float32 and heads_TGSH.shape[-1] % 2 == 0:
            pairs_TGSP = heads_TGSH.view(torch.complex64)
            pairs_TGSP[:, :, :-1, :num_pairs].mul_(self._angle_T11R)
        else:
            rotate_complex_in_place(heads_TGSH[:, :, :-1], self._angle_T11R[:, 0, 0])

    def write(self, heads_TGSH: torch.Tensor, pools: torch.Tensor) -> None:
        slots, new_2TKH = self._slots_T, heads_TGSH[:, :, -2:].permute(2, 0, 1, 3)
        if self._padding_rows is not None:
            rows = (slots >= 0).nonzero()[:, 0]
            slots, new_2TKH = slots[rows], new_2TKH[:, rows]
        pools.flatten(1, 2).index_copy_(1, slots, new_2TKH)

    def attend(self, query_BKGH: torch.Tensor, pools: torch.Tensor) -> torch.Tensor:
        # Gather the cache rows at every position of the decoding sequences, all heads of a row in one copy.
        _, _, _, num_kv_heads, head_size = pools.shape
        rows_2RM = pools.view(2, -1, num_kv_heads * head_size).index_select(1, self._context_slots)
        held_2BLKH = _wide(rows_2RM).view(2, *self._context_shape, num_kv_heads, head_size)
        key_BKLH, value_BKLH = held_2BLKH.transpose(2, 3).unbind(0)
        context_BKGH = F.scaled_dot_product_attention(
            _wide(query_BKGH), key_BKLH, value_BKLH, attn_mask=self._bias_B11L
        )
        if self._padding_rows is not None:
            context_BKGH[self._padding_rows] = 0.0
        return _narrow(context_BKGH.flatten(1), query_BKGH.dtype)


# A conversion to the same dtype still costs a call.


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _narrow(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return wide if dtype == torch.float32 else wide.to(dtype)
