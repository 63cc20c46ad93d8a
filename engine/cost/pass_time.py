"""Estimated time of passes, decode steps, messages and optimizer steps on one rank, from rates."""

from dataclasses import dataclass, replace

from glm_rlhf.engine.cost.activations import RankMicroBatch
from glm_rlhf.engine.cost.hardware import Cluster
from glm_rlhf.engine.cost.workload import Choice, Workload
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.shard_sizes import chunk_sizes

_FP32 = 4
_OPTIMIZER_BYTES = 44
"""Bytes read and written per weight of a rank's optimizer shard: gradient, fp32 weight, two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of some work, split into computation and communication."""

    compute_s: float = 0.0
    """Arithmetic and memory access."""
    communication_s: float = 0.0
    """Collectives."""

    @property
    def total_s(self) -> float:
        """Their sum: they do not overlap."""
        return self.compute_s + self.communication_s

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            compute_s=self.compute_s + other.compute_s,
            communication_s=self.communication_s + other.communication_s,
        )

    def times(self, factor: float) -> "Cost":
        """Return the cost multiplied by `factor`."""
        return Cost(compute_s=self.compute_s * factor, communication_s=self.communication_s * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """Costs of the passes of one micro-batch through one chunk of a model."""

    cluster: Cluster
    choice: Choice
    batch: RankMicroBatch
    """A micro-batch, with its actual number of tokens."""
    length: int
    """Tokens per sequence, which determine the cost of attention."""
    has_scalar_head: bool
    """Whether the model is a critic or reward model."""
    num_targets: int
    """Rows of the vocabulary head."""

    @property
    def _layers(self) -> int:
        layout = self.choice.layout
        return self.batch.model.num_layers // (layout.pp * layout.vpp)

    def forward(self, *, is_last: bool, trains: bool) -> Cost:
        """Return the cost of a forward pass; in the last chunk with the head, whose gradients it computes.

        Args:
            is_last: whether the chunk has the head.
            trains: whether backward follows.
        """
        rates = self.cluster.rates
        layers = self._layers_once()
        head_s = 0.0
        if is_last and not self.has_scalar_head:
            columns = self.batch.model.rows_per_rank(self.choice.layout.tp)
            products = 3 if trains else 1
            head_s = (
                products * 2 * self.num_targets * columns * self.batch.model.hidden_size / rates.flop_per_s
            )
        return layers + Cost(compute_s=rates.pass_s + head_s)

    def backward(self) -> Cost:
        """Return the cost of a backward pass, with a forward pass in it if layers are recomputed."""
        layers = self._layers_once()
        factor = self.cluster.rates.backward_factor + self.choice.recompute_layers
        # Sequence parallelism gathers a layer's inputs once more, for the gradients of the weights.
        gathers = 1.5 if self.choice.layout.sequence_parallel else 1.0
        recomputed = 1.0 if self.choice.recompute_layers else 0.0
        return Cost(
            compute_s=layers.compute_s * factor + self.cluster.rates.pass_s,
            communication_s=layers.communication_s * (gathers + recomputed),
        )

    def hop_s(self) -> float:
        """Return the time to send the residual stream to the next stage."""
        layout, cluster = self.choice.layout, self.cluster
        if layout.pp == 1:
            return 0.0
        stride = cluster.num_gpus // layout.pp
        bandwidth, latency = cluster.link(num_ranks=2, stride=stride)
        return latency + self.batch.residual_bytes / bandwidth

    def _layers_once(self) -> Cost:
        """Return the cost of a forward pass through the chunk's layers."""
        rates, batch, layout = self.cluster.rates, self.batch, self.choice.layout
        model = batch.model
        products = 2 * batch.rows * layer_matrix_elements(model, layout)
        attention = 2 * batch.rows * self.length * (model.num_heads // layout.tp) * model.head_size
        # Norms, rotation, gate and residuals each read and write their tensors once.
        moved = 10 * batch.residual_bytes + 6 * batch.gate_bytes
        compute_s = (
            products / rates.flop_per_s
            + attention / rates.attention_flop_per_s
            + moved / rates.bytes_per_s
            + rates.layer_s
        )
        return Cost(compute_s=compute_s, communication_s=self._layer_communication_s()).times(self._layers)

    def _layer_communication_s(self) -> float:
        batch, layout = self.batch, self.choice.layout
        seconds = 0.0
        if layout.tp > 1:  # two all-reduces, or all-gathers and reduce-scatters
            bandwidth, latency = self.cluster.link(num_ranks=layout.tp, stride=1)
            seconds += 2 * all_reduce_s(batch.hidden_bytes, layout.tp, bandwidth, latency)
        if layout.cp > 1:
            bandwidth, latency = self.cluster.link(num_ranks=layout.cp, stride=layout.tp)
            num_kv = max(1, batch.model.num_kv_heads // layout.tp)
            gathered = 2 * num_kv * batch.model.head_size * batch.num_tokens * batch.itemsize
            seconds += latency + gathered * (layout.cp - 1) / layout.cp / bandwidth
        return seconds


def all_reduce_s(num_bytes: float, num_ranks: int, bandwidth: float, latency_s: float) -> float:
    """Return the time of a ring all-reduce; an all-gather or a reduce-scatter takes half of it."""
    return latency_s + 2 * num_bytes * (num_ranks - 1) / num_ranks / bandwidth


def layer_matrix_elements(model: GLMConfig, layout: Layout) -> int:
    """Return the number of elements of a layer's matrices on a rank."""
    kv_heads = max(model.num_kv_heads, layout.tp)  # replicated where there are fewer than ranks
    attention = (2 * model.num_heads + 2 * kv_heads) * model.head_size
    return model.hidden_size * (attention + 3 * model.ffn_size) // layout.tp


def forward_flop(
    model: GLMConfig, num_sequences: float, mean_tokens: float, num_targets: float = 0.0
) -> float:
    """Return the FLOP of a forward pass over `num_sequences` sequences, on all ranks together.

    Matrix products of the layers, causal attention at the mean length, and the vocabulary head at
    `num_targets` tokens.
    """
    layers = model.num_layers * layer_matrix_elements(model, Layout())
    flop = 2 * num_sequences * mean_tokens * layers
    flop += 2 * num_sequences * mean_tokens**2 * model.num_layers * model.num_heads * model.head_size
    return flop + 2 * num_targets * model.vocab_size * model.hidden_size


def optimizer_step(
    model: GLMConfig, cluster: Cluster, choice: Choice, *, itemsize: int, has_scalar_head: bool
) -> Cost:
    """Return the cost after a step's last backward pass: reduce gradients, update and gather weights."""
    layout, rates = choice.layout, cluster.rates
    sizes = [
        chunk_sizes(model, layout, has_scalar_head=has_scalar_head, stage=layout.pp - 1, chunk=chunk)
        for chunk in range(layout.vpp)
    ]
    count = sum(chunk.num_model_dtype + chunk.num_fp32 for chunk in sizes)
    num_shards = layout.dp(cluster.num_gpus) * layout.cp
    touched = 2 * _FP32 * count + _OPTIMIZER_BYTES * count / num_shards  # gradients are also cleared
    communication_s = 0.0
    if num_shards > 1:
        bandwidth, latency = cluster.link(num_ranks=num_shards, stride=layout.tp)
        share = (num_shards - 1) / num_shards
        communication_s = 2 * latency + (_FP32 + itemsize) * count * share / bandwidth
    return Cost(compute_s=touched / rates.bytes_per_s + rates.step_s, communication_s=communication_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCosts:
    """Costs of steps of generation on one rank of a stage."""

    cluster: Cluster
    choice: Choice
    work: Workload
    policy: GLMConfig

    @property
    def _layers(self) -> int:
        return self.policy.num_layers // self.choice.layout.pp

    def step(self, num_rows: int, *, context: float, is_last: bool) -> Cost:
        """Return the cost of one decode step on a stage: `num_rows` sequences of `context` tokens each."""
        rates, layout, model = self.cluster.rates, self.choice.layout, self.policy
        itemsize = self.work.itemsize
        elements = layer_matrix_elements(model, layout) * self._layers
        kv_heads = max(1, model.num_kv_heads // layout.tp)
        cached = 2 * self._layers * kv_heads * model.head_size * context * num_rows
        head = model.rows_per_rank(layout.tp) * model.hidden_size if is_last else 0
        moved_s = (elements + cached + head) * itemsize / rates.bytes_per_s
        product_s = 2 * num_rows * (elements + head) / rates.flop_per_s
        compute_s = max(moved_s, product_s) + self._layers * rates.decode_layer_s + rates.turn_s
        return Cost(compute_s=compute_s, communication_s=self._reductions_s(num_rows))

    def prefill(self, num_tokens: int, *, length: int) -> Cost:
        """Return the cost of prefilling `num_tokens` tokens of prompts of `length` on a stage.

        Reading the weights is not included.
        """
        plain = replace(self.choice, layout=Layout(tp=self.choice.layout.tp, pp=self.choice.layout.pp))
        batch = RankMicroBatch(
            model=self.policy, layout=plain.layout, num_tokens=num_tokens, itemsize=self.work.itemsize
        )
        costs = PassCosts(
            cluster=self.cluster,
            choice=plain,
            batch=batch,
            length=length,
            has_scalar_head=True,
            num_targets=0,
        )
        return costs.forward(is_last=False, trains=False)

    def hop_s(self, num_rows: int) -> float:
        """Return the time to send a step's hidden states to the next stage."""
        layout = self.choice.layout
        if layout.pp == 1:
            return 0.0
        bandwidth, latency = self.cluster.link(num_ranks=2, stride=self.cluster.num_gpus // layout.pp)
        return latency + num_rows * self.policy.hidden_size * self.work.itemsize / bandwidth

    def _reductions_s(self, num_rows: int) -> float:
        tp = self.choice.layout.tp
        if tp == 1:
            return 0.0
        bandwidth, latency = self.cluster.link(num_ranks=tp, stride=1)
        num_bytes = num_rows * self.policy.hidden_size * self.work.itemsize
        return 2 * self._layers * all_reduce_s(num_bytes, tp, bandwidth, latency)
