"""Bytes of a micro-batch on one rank: activations saved for backward, and temporary memory.

Arithmetic on the shapes of the tensors that the modules of `parallel` save for backward; a test compares it
with the counts of torch's saved-tensor hooks and of the allocator.
"""

from dataclasses import dataclass

from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig

_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Memory that the kernels of a device take in addition to their results."""

    num_attention_copies: int
    """Copies of the attention output that are kept; on a CPU those of single sequences and the joined one."""
    logits_bytes: int
    """Most bytes of logits that the vocabulary head keeps at once."""
    min_logit_rows: int
    """Fewest rows of logits that it keeps at once, whatever their size."""
    logits_itemsize: int | None
    """Bytes of a kept logit; None: those of the model's dtype."""
    num_logit_copies: int
    """Copies of the kept logits that exist at the same time while they are computed."""
    computes_in_fp32: bool
    """Whether element-wise operations hold fp32 copies of their inputs and outputs."""


CUDA = Kernels(
    num_attention_copies=1,
    logits_bytes=1 << 30,
    min_logit_rows=128,
    logits_itemsize=None,
    num_logit_copies=1,
    computes_in_fp32=False,
)
"""Variable-length attention of Transformer Engine or torch, the head of `kernels.lm_head.vocab_head`."""
CPU = Kernels(
    num_attention_copies=2,
    logits_bytes=4 << 23,
    min_logit_rows=16,
    logits_itemsize=4,
    num_logit_copies=3,
    computes_in_fp32=True,
)
"""torch's attention sequence by sequence, the head of `kernels.lm_head.reference_linear_loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """The part of a micro-batch that one rank computes."""

    model: GLMConfig
    layout: Layout
    num_tokens: int
    """T: tokens of the stream, padding included, before context parallelism splits them."""
    itemsize: int
    """Bytes of a weight or activation: 2 or 4."""
    kernels: Kernels = CUDA

    @property
    def rows(self) -> int:
        """Rows inside tensor-parallel regions."""
        return -(-self.num_tokens // self.layout.cp)

    @property
    def residual_rows(self) -> int:
        """Rows between tensor-parallel regions."""
        return -(-self.rows // self.layout.tp) if self.layout.sequence_parallel else self.rows

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residual stream: what a stage sends, and what a recomputed layer keeps."""
        return self.residual_rows * self.model.hidden_size * self.itemsize

    @property
    def hidden_bytes(self) -> int:
        """The same with all rows."""
        return self.rows * self.model.hidden_size * self.itemsize

    @property
    def gate_bytes(self) -> int:
        """Bytes of one half of the gated projection."""
        return self.rows * self.model.ffn_size // self.layout.tp * self.itemsize

    def layer_saved_bytes(self) -> int:
        """Return the bytes that one layer saves for backward."""
        normed = self.residual_bytes + _FP32 * self.residual_rows  # a norm's input, and one number per row
        num_norms = 4 if self.model.has_sandwich_norms else 2
        # The MLP's first matrix saves its input, the gate [gate | up], the second matrix the gated rows.
        return num_norms * normed + self._attention_saved_bytes() + self.residual_bytes + 3 * self.gate_bytes

    def _attention_saved_bytes(self) -> int:
        model, layout = self.model, self.layout
        num_heads, num_kv = model.num_heads // layout.tp, max(1, model.num_kv_heads // layout.tp)
        head = self.rows * model.head_size * self.itemsize
        key_value = 2 * num_kv * head * layout.cp  # of the whole stream
        if model.num_kv_heads < layout.tp:  # the projections' input is gathered once for both
            saved = self.hidden_bytes + num_heads * head
            saved += key_value if layout.cp > 1 else 3 * head  # the rotated key is a tensor of its own
        else:
            saved = self.residual_bytes
            is_copied = num_kv > 1  # queries of several groups are no view of the projection
            if is_copied:
                saved += num_heads * head
            if layout.cp > 1:
                saved += key_value
            if layout.cp == 1 or not is_copied:
                saved += (num_heads + 2 * num_kv) * head
        num_copies = self.kernels.num_attention_copies + (layout.cp > 1)
        return saved + num_copies * num_heads * head + _FP32 * self.rows * num_heads

    def chunk_saved_bytes(self, num_layers: int, *, recomputes: bool) -> int:
        """Return the bytes that one pass through `num_layers` layers keeps until its backward."""
        return num_layers * (self.residual_bytes if recomputes else self.layer_saved_bytes())

    def backward_workspace_bytes(self, *, recomputes: bool) -> int:
        """Return the peak bytes of one layer's backward, in addition to those saved by forward."""
        matrix = self.model.ffn_size // self.layout.tp * self.model.hidden_size * self.itemsize
        gathered = self.hidden_bytes if self.layout.sequence_parallel else 0
        gradient = self.residual_bytes + gathered
        second_matrix = gradient + self.gate_bytes + matrix
        gate = self.residual_bytes + 2 * self.gate_bytes  # the gated rows are freed by then
        if self.kernels.computes_in_fp32 and self.itemsize != _FP32:
            gate += 5 * self.gate_bytes * _FP32 // self.itemsize  # [gate | up], its gradient, the rows'
        first_matrix = gradient + self.hidden_bytes - self.gate_bytes + 2 * matrix
        return max(second_matrix, gate, first_matrix) + (self.layer_saved_bytes() if recomputes else 0)

    def forward_workspace_bytes(self) -> int:
        """Return the peak bytes of a pass without gradients, which is in the gated MLP."""
        return 3 * self.residual_bytes + self.hidden_bytes + 3 * self.gate_bytes

    def policy_loss_bytes(self, num_targets: int) -> tuple[int, int]:
        """Return the bytes of the vocabulary head's loss: at its peak, and until backward.

        Args:
            num_targets: rows of this rank that are trained on.
        """
        model, layout, kernels = self.model, self.layout, self.kernels
        num_columns = model.rows_per_rank(layout.tp)
        logit = kernels.logits_itemsize or self.itemsize
        chunk = max(kernels.min_logit_rows, kernels.logits_bytes // (num_columns * logit))
        num_kept = min(num_targets, chunk)
        weight_itemsize = self.itemsize if num_targets <= chunk and logit == self.itemsize else _FP32
        weight_gradient = num_columns * model.hidden_size * weight_itemsize
        hidden_gradient = num_targets * model.hidden_size * (logit if logit == _FP32 else self.itemsize)
        # The last norm and the head save their inputs; with sequence parallelism the head's is gathered.
        kept = self.residual_bytes + self.hidden_bytes + weight_gradient + hidden_gradient
        logits = num_kept * num_columns * logit
        product = num_kept * model.hidden_size * _FP32
        return kept + max(kernels.num_logit_copies * logits, logits + product), kept

    def value_loss_bytes(self) -> tuple[int, int]:
        """Return the same for the scalar head, which reads the hidden states in fp32."""
        in_fp32 = self.rows * self.model.hidden_size * _FP32
        kept = self.residual_bytes + in_fp32
        return kept + in_fp32 + (self.hidden_bytes if self.itemsize != _FP32 else 0), kept
