"""Predicts the time of a training step on GPUs from the model's shape and the parallel layout.

`predict_step` adds up, for the slowest pipeline stage:

* matrix products, at a share of the peak that depends on their shape,
* attention, at its kernel's share of the peak,
* elementwise passes and the optimizer, at memory bandwidth,
* the tensor-, context-, pipeline- and data-parallel exchange that compute does not hide,
* the bubble of the pipeline,
* the host's time, where launching kernels takes longer than running them.

Six constants were fitted to 226 published measurements of megatron-core and are listed in
`FittedConstants`. The others are data-sheet values or are fixed and stated below. The measurements
are in `tests/data/published_throughput.csv`; `python tests/unit/simulate/published.py` repeats the
fit and prints the errors on measurements that were held out.

The prediction is the time of a tuned software stack. It knows nothing of slow nodes, of a congested
network or of a host that is busy otherwise. No torch is needed.

Units: seconds, bytes, bytes per second in one direction, FLOPs (a multiplication and an addition
count as two).
"""

import math
from dataclasses import astuple, dataclass, replace
from typing import Literal

from megatron_chatflow.config import RunConfig, TrainConfig
from megatron_chatflow.config.problems import did_you_mean
from megatron_chatflow.config.shape import head_counts, num_model_chunks, padded_vocab_size
from megatron_chatflow.errors import UserError

Family = Literal["ampere", "hopper", "blackwell"]
Precision = Literal["bf16", "fp8", "blockwise", "mxfp8"]
Attention = Literal["flash", "flash2", "unfused"]
Sharding = Literal["none", "optimizer", "weights"]


@dataclass(frozen=True)
class GpuSpec:
    """Data-sheet values of a GPU and of the network that its maker's reference systems have.

    Attributes:
        bf16: Peak FLOP/s of dense bf16 matrix products.
        fp8: Peak FLOP/s of dense fp8 matrix products; 0 if there are none.
        hbm: Memory bandwidth.
        nvlink: Bandwidth to the GPUs of the same NVLink domain.
        network: Network bandwidth per GPU.
        domain: Number of GPUs that NVLink joins.
        memory: Memory size.
        num_sms: Number of streaming multiprocessors.
        attention: Share of the bf16 peak that fused attention reaches on long sequences.
        family: Generation, which selects the fitted share of the peak.
        clock: Clock that a lower power limit leaves, relative to the usual one.
    """

    bf16: float
    fp8: float
    hbm: float
    nvlink: float
    network: float
    domain: int
    memory: int
    num_sms: int
    attention: float
    family: Family
    clock: float = 1.0


_GIB = 1 << 30
# Peaks and bandwidths: NVIDIA's data sheets. Attention: the papers on FlashAttention-2 (A100) and
# FlashAttention-3 (H100) and the release notes of cuDNN, with the forward and the backward pass
# weighted 1 : 2.5.
GPUS = {
    "a100-80": GpuSpec(312e12, 0, 2039e9, 300e9, 25e9, 8, 80 * _GIB, 108, 0.58, "ampere"),
    "h100": GpuSpec(989.5e12, 1979e12, 3350e9, 450e9, 50e9, 8, 80 * _GIB, 132, 0.53, "hopper"),
    "h200": GpuSpec(989.5e12, 1979e12, 4800e9, 450e9, 50e9, 8, 141 * _GIB, 132, 0.53, "hopper"),
    "b200": GpuSpec(2250e12, 4500e12, 8000e9, 900e9, 50e9, 8, 180 * _GIB, 148, 0.50, "blackwell"),
    "gb200": GpuSpec(2450e12, 4900e12, 8e12, 900e9, 50e9, 64, 186 * _GIB, 148, 0.50, "blackwell"),
    "gb300": GpuSpec(2450e12, 4900e12, 8e12, 900e9, 100e9, 64, 279 * _GIB, 148, 0.55, "blackwell"),
}
"""GPUs by name. A100 and H100 are the SXM versions."""


def find_gpu(name: str) -> GpuSpec:
    """Returns the GPU of this name. Upper and lower case are the same.

    Raises:
        UserError: If there is no such GPU.
    """
    if name.lower() not in GPUS:
        raise UserError(
            f"GPU {name!r}: is not known{did_you_mean(name.lower(), GPUS)}; use one of "
            f"{', '.join(GPUS)}"
        )
    return GPUS[name.lower()]


@dataclass(frozen=True)
class FittedConstants:
    """The constants that were fitted to published measurements.

    Attributes:
        ampere: Share of the bf16 peak that a large matrix product reaches, from A100 on.
        hopper: The same from H100 on.
        blackwell: The same from B200 on.
        fp8: The share that an fp8 product reaches of its peak, relative to that of bf16.
        tensor: Share of the tensor-parallel exchange that is not hidden if products overlap it.
        data: Share of the data-parallel exchange that is not hidden although compute could hide it.
    """

    ampere: float = 0.758
    hopper: float = 0.645
    blackwell: float = 0.560
    fp8: float = 0.828
    tensor: float = 0.673
    data: float = 0.122


# Fixed constants.
HBM_SHARE = 0.80  # of the memory bandwidth: what elementwise passes and the optimizer reach
NVLINK_SHARE = 0.75  # of NVLink's bandwidth: what collectives reach
NETWORK_SHARE = 0.85  # of the network's bandwidth: what collectives reach
TILE_ROWS, TILE_COLUMNS = 128, 256  # of a result: what one multiprocessor computes at a time
LOST_WAVES = 0.25  # rounds over all multiprocessors that the end of a matrix product loses
COLLECTIVE_SECONDS = 8e-6  # latency of a collective within an NVLink domain
HOP_SECONDS = 15e-6  # latency between two nodes
MOST_HOPS = 24  # of a collective over many nodes, whose rings NCCL turns into trees
BUCKET_BYTES = 160e6  # of a gradient bucket: 40 million values in fp32
UNOVERLAPPED_TENSOR_SHARE = 0.85  # of the tensor-parallel exchange: not hidden without overlap
STEP_SECONDS = 0.010  # host work, norms and one synchronization of every step
LAUNCH_SECONDS = 10e-6  # host time for one kernel, including Python's and autograd's
LAYER_LAUNCHES = (12, 21)  # kernels of a transformer-engine layer, counted by the simulation
TENSOR_COLLECTIVES = (4, 6)  # gathers and reduce-scatters of a layer, forward and backward
EAGER_FACTOR = 1.6  # memory traffic of elementwise operations that are not fused
FLASH2_FACTOR = 0.65  # speed of FlashAttention-2 on GPUs after those that it was written for
SMALL_HEAD_FACTOR = 0.75  # speed of attention with heads of fewer than 96 values
# Bytes per gathered value of a layer's products in the forward and the backward pass. FP8 values
# are gathered as such; with scales of blocks, gradients are gathered by rows and by columns.
GATHERED_BYTES: dict[Precision, tuple[float, float]] = {
    "bf16": (2, 2),
    "fp8": (1, 1),
    "blockwise": (1 + 4 / 128, 2 + 8 / 128),
    "mxfp8": (1 + 1 / 32, 2 + 2 / 32),
}
ATTENTION_RAMP = 512  # tokens: the sequence length at which attention reaches half of its speed


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a transformer as it is computed: with padded heads and a padded vocabulary.

    Attributes:
        num_layers: Number of layers.
        hidden_size: Size of the hidden states.
        ffn_hidden_size: Size of the intermediate activations of the MLP.
        query_size: Number of query heads times their size.
        key_value_size: Number of key/value heads times their size.
        head_dim: Size of a head.
        vocab_size: Number of embedding rows.
        is_gated: Whether the MLP is gated, as SwiGLU is.
        is_tied: Whether the embedding and the output layer share their weights.
        window: Number of tokens of the sliding window of attention; None for none.
        has_qk_norm: Whether the queries and the keys of each head are normalized.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    query_size: int
    key_value_size: int
    head_dim: int
    vocab_size: int
    is_gated: bool = True
    is_tied: bool = False
    window: int | None = None
    has_qk_norm: bool = False

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int) -> "TransformerShape":
        """Returns the shape of a run's model.

        Args:
            config: The configuration of the run.
            vocab_size: Size of the tokenizer's vocabulary before padding.
        """
        model, counts = config.model, head_counts(config.model, config.parallel)
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            query_size=counts.query_size,
            key_value_size=counts.key_value_size,
            head_dim=counts.head_dim,
            vocab_size=padded_vocab_size(model, config.parallel, vocab_size),
            is_tied=not model.untie_embeddings_and_output_weights,
            window=model.window,
            has_qk_norm=model.qk_layernorm,
        )

    @property
    def fc1_size(self) -> int:
        """Number of outputs of the first matrix of the MLP."""
        return (2 if self.is_gated else 1) * self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        """Number of parameters in the matrices of one layer."""
        attention = 2 * self.query_size + 2 * self.key_value_size
        return self.hidden_size * (attention + self.fc1_size + self.ffn_hidden_size)

    @property
    def table_parameters(self) -> int:
        """Number of parameters of the embedding, which equals that of the output layer."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Stack:
    """What the training software decides. The defaults describe this project.

    Attributes:
        precision: Precision of the layers' matrix products. ``fp8`` has one scale for a tensor.
        bf16_layers: Share of the layers that compute in bf16 in any case.
        weight_bytes: Bytes per value of the layers' matrices when data-parallel ranks gather them.
        gradient_bytes: Bytes per gradient in the data-parallel reduction.
        overlaps_tensor_exchange: Whether matrix products overlap the tensor-parallel exchange
            (`tp_comm_overlap` of transformer-engine).
        rotates_keys: Whether keys and values go round the context-parallel ranks while attention
            computes (ring attention). Otherwise they are gathered first.
        attention: Kernel: ``flash`` (cuDNN, FlashAttention-3 or newer), ``flash2``
            (FlashAttention-2) or ``unfused`` (stores the scores).
        fuses_elementwise: Whether elementwise operations are fused.
    """

    precision: Precision = "bf16"
    bf16_layers: float = 0.0
    weight_bytes: float = 2.0
    gradient_bytes: int = 4
    overlaps_tensor_exchange: bool = False
    rotates_keys: bool = False
    attention: Attention = "flash"
    fuses_elementwise: bool = True


def _precision(train: TrainConfig) -> Precision:
    """Returns the precision of the layers' products; FP4 counts as mxfp8, for want of figures."""
    if train.fp4_format is not None or (train.fp8_format and train.fp8_recipe == "mxfp8"):
        return "mxfp8"
    if train.fp8_format is None:
        return "bf16"
    return "blockwise" if train.fp8_recipe == "blockwise" else "fp8"


def _stack(config: RunConfig) -> Stack:
    parallel, train = config.parallel, config.train
    precision, bf16_layers = _precision(train), 0.0
    if train.first_last_layers_bf16:
        num_bf16 = train.num_layers_at_start_in_bf16 + train.num_layers_at_end_in_bf16
        bf16_layers = num_bf16 / config.model.num_layers
    weight_bytes = 2.0
    # Matrices in MXFP8 are gathered in bf16, through the gradient buffer.
    if train.fp8_param_gather and precision != "mxfp8":
        weight_bytes = 1 + bf16_layers
    is_flash2 = train.attention_backend in ("flash_attn_2", "flash", "sdpa")
    return Stack(
        precision=precision,
        bf16_layers=bf16_layers,
        weight_bytes=weight_bytes,
        gradient_bytes=2 if config.has_bf16_gradients else 4,
        overlaps_tensor_exchange=parallel.tp_comm_overlap,
        attention="flash2" if is_flash2 else "flash",
    )


@dataclass(frozen=True)
class StepLayout:
    """How a step is divided over GPUs.

    Attributes:
        num_gpus: Number of GPUs.
        tensor: Tensor-parallel size.
        pipeline: Number of pipeline stages.
        chunks: Number of model chunks per stage; above 1 the schedule is interleaved.
        context: Context-parallel size.
        seq_length: Tokens per sample.
        micro_batch_size: Samples per forward pass of a rank.
        global_batch_size: Samples per step.
        sequence_parallel: Whether norms and residuals are divided over the tensor-parallel ranks.
        recomputes_attention: Whether the backward pass recomputes the attention core.
        recomputes_mlp: Whether the backward pass recomputes the MLP.
        recomputed_layers: Share of the layers that the backward pass recomputes as a whole.
        sharding: What data-parallel ranks divide: nothing, the optimizer's state (the distributed
            optimizer), or the weights as well (FSDP).
        overlaps_grad_reduce: Whether the reduction of gradients overlaps the backward pass.
        overlaps_param_gather: Whether the gather of parameters overlaps the forward pass.
        domain: Number of GPUs that NVLink joins; None for the GPU's usual number.
        network: Network bandwidth per GPU; None for the GPU's usual one.
        layer_launches: Kernels that a layer launches in its forward and its backward pass, without
            collectives.
        stack: The training software.
    """

    num_gpus: int
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1
    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int = 256
    sequence_parallel: bool = True
    recomputes_attention: bool = False
    recomputes_mlp: bool = False
    recomputed_layers: float = 0.0
    sharding: Sharding = "optimizer"
    overlaps_grad_reduce: bool = True
    overlaps_param_gather: bool = True
    domain: int | None = None
    network: float | None = None
    layer_launches: tuple[float, float] = LAYER_LAUNCHES
    stack: Stack = Stack()

    @classmethod
    def of(cls, config: RunConfig, world_size: int, network: float | None = None) -> "StepLayout":
        """Returns the layout of a run, and the precision and overlap of its layers.

        Args:
            config: The configuration of the run.
            world_size: Number of GPUs, which the configuration is valid for.
            network: Network bandwidth per GPU; None for the GPU's usual one.
        """
        parallel, train = config.parallel, config.train
        chunks = num_model_chunks(config.model, parallel)
        recomputed = 0.0
        if train.recompute_granularity == "full":
            layers = config.model.num_layers // parallel.pipeline_model_parallel_size // chunks
            is_block = train.recompute_method == "block"
            recomputed = (train.recompute_num_layers or 0) / layers if is_block else 1.0
        return cls(
            num_gpus=world_size,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            chunks=chunks,
            context=parallel.context_parallel_size,
            seq_length=config.data.seq_length,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            sequence_parallel=parallel.sequence_parallel,
            recomputes_attention=train.recomputes("core_attn"),
            recomputes_mlp=train.recomputes("mlp"),
            recomputed_layers=recomputed,
            sharding="optimizer" if parallel.use_distributed_optimizer else "none",
            overlaps_grad_reduce=parallel.overlap_grad_reduce,
            overlaps_param_gather=parallel.overlap_param_gather,
            network=network,
            stack=_stack(config),
        )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.num_gpus // (self.tensor * self.pipeline * self.context)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of a pipeline per step."""
        return max(1, round(self.global_batch_size / (self.data * self.micro_batch_size)))

    @property
    def tokens(self) -> float:
        """Number of tokens of a micro-batch on one rank."""
        return self.micro_batch_size * self.seq_length / self.context

    @property
    def residual_parts(self) -> int:
        """Number of ranks that the norms and residuals of a token are divided over."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a step, by what takes it. All values are seconds.

    Attributes:
        layers: Compute of the layers.
        model_parallel: Exchange of tensor and context parallelism that compute does not hide.
        launches: Waiting for the host to launch the kernels of the layers.
        output_layer: The output layer and the loss, and waiting for stages with more layers.
        bubble: Stages that wait for the first and the last micro-batches.
        sends: Messages between pipeline stages.
        data_parallel: Reduction of gradients and gather of weights that compute does not hide.
        optimizer: Update of the weights, gradient norm and host work.
    """

    layers: float
    model_parallel: float
    launches: float
    output_layer: float
    bubble: float
    sends: float
    data_parallel: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Time of the whole step."""
        return self.layers + sum(self.losses.values())

    @property
    def losses(self) -> dict[str, float]:
        """Everything except the compute of the layers, by name."""
        names = {
            "tensor/context exchange": self.model_parallel,
            "kernel launches": self.launches,
            "output layer": self.output_layer,
            "pipeline bubble": self.bubble,
            "pipeline sends": self.sends,
            "data-parallel exchange": self.data_parallel,
            "optimizer": self.optimizer,
        }
        return names

    @property
    def largest_loss(self) -> tuple[str, float]:
        """Name of the largest loss, and its share of the step."""
        name = max(self.losses, key=lambda each: self.losses[each])
        return name, self.losses[name] / self.seconds


def predict_step(
    shape: TransformerShape,
    layout: StepLayout,
    gpu: GpuSpec,
    constants: FittedConstants | None = None,
) -> StepTime:
    """Predicts the time of a training step.

    Args:
        shape: The model.
        layout: How the step is divided.
        gpu: The GPU.
        constants: The fitted constants; those of this module if None.
    """
    constants = constants or FittedConstants()
    num_micro_batches, pipeline = layout.num_micro_batches, layout.pipeline
    layer = _mean_layer_time(shape, layout, gpu, constants)
    stages = [number * layer.seconds for number in stage_layers(shape, layout)]
    stages[-1] += _output_seconds(shape, layout, gpu, constants)
    # On average over the stages, because a stage with fewer layers waits for the others anyway.
    own_layers = num_micro_batches * shape.num_layers / pipeline
    optimizer, data_parallel = _update_seconds(shape, layout, gpu, constants, layer, max(stages))
    return StepTime(
        layers=own_layers * layer.compute,
        model_parallel=own_layers * layer.exchange,
        launches=own_layers * layer.launches,
        output_layer=num_micro_batches * max(stages) - own_layers * layer.seconds,
        bubble=(pipeline - 1) / layout.chunks * sum(stages) / pipeline,
        sends=_send_seconds(shape, layout, gpu),
        data_parallel=data_parallel,
        optimizer=optimizer,
    )


def stage_layers(shape: TransformerShape, layout: StepLayout) -> list[int]:
    """Returns the number of layers of each pipeline stage.

    If the layers cannot be divided evenly, the embedding and the output layer count as one layer
    each, as in NVIDIA's recipes for LLaMA-3 405B. Runs of this project divide them evenly.
    """
    if shape.num_layers % (layout.pipeline * layout.chunks) == 0:
        return [shape.num_layers // layout.pipeline] * layout.pipeline
    middle = math.ceil((shape.num_layers + 2) / layout.pipeline)
    return [middle - 1, *[middle] * (layout.pipeline - 2), middle - 1]


def matmul_seconds(
    rows: float,
    columns: float,
    inner: float,
    gpu: GpuSpec,
    constants: FittedConstants,
    *,
    precision: Precision = "bf16",
    out_bytes: int = 2,
) -> float:
    """Returns the time of a matrix product.

    Args:
        rows: Number of rows of the result.
        columns: Number of columns of the result.
        inner: Length of the sums.
        gpu: The GPU.
        constants: The fitted constants.
        precision: Precision of the factors.
        out_bytes: Bytes per value that are read and written for the result: 2 for a bf16 result,
            8 for an fp32 result that is added to.
    """
    share: float = getattr(constants, gpu.family) * gpu.clock
    is_fp8 = precision != "bf16"
    peak = gpu.fp8 * constants.fp8 if is_fp8 else gpu.bf16
    tiles = math.ceil(rows / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS)
    share *= tiles / (tiles + LOST_WAVES * gpu.num_sms)
    moved = (rows * inner + inner * columns) * (1 if is_fp8 else 2) + rows * columns * out_bytes
    return max(2 * rows * columns * inner / (peak * share), moved / (gpu.hbm * HBM_SHARE))


def attention_seconds(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec
) -> tuple[float, float]:
    """Returns the time of the causal attention core of one layer and micro-batch on one rank.

    Returns:
        Forward and backward time without recomputation.
    """
    flops = 4 * layout.seq_length * shape.query_size / layout.tensor * layout.tokens
    peak = gpu.bf16 * gpu.clock
    if layout.stack.attention == "unfused":  # all scores are computed and stored
        num_heads = shape.query_size / shape.head_dim / layout.tensor
        passes = 13 * layout.seq_length * num_heads * layout.tokens / (gpu.hbm * HBM_SHARE)
        return flops / (peak * 0.5) + passes, 2 * flops / (peak * 0.5) + 1.5 * passes
    # Without a window, half of the scores are computed. With one, only the first tokens of a sample
    # see less than it. A kernel that computes few scores per query is as slow as on a short sample.
    num_seen = min(layout.seq_length, shape.window or layout.seq_length)
    computed = num_seen / layout.seq_length * (1 - num_seen / (2 * layout.seq_length))
    share = gpu.attention * num_seen / (num_seen + ATTENTION_RAMP)
    if layout.stack.attention == "flash2" and gpu.family != "ampere":
        share *= FLASH2_FACTOR
    if shape.head_dim < 96:
        share *= SMALL_HEAD_FACTOR
    # The backward pass has 2.5 times the work and is slower: 1.15 and 0.94 give the share of
    # forward and backward pass together.
    forward, backward = flops * computed / (peak * share * 1.15), flops * computed * 2.5
    return forward, backward / (peak * share * 0.94)


def ring_bytes(size: float, num_ranks: int) -> float:
    """Returns the bytes that each rank sends in a gather or a reduce-scatter of ``size`` bytes.

    In a ring, every rank sends all shards but one.
    """
    return size * (num_ranks - 1) / num_ranks


def collective_seconds(
    size: float, num_ranks: int, num_per_node: int, gpu: GpuSpec, layout: StepLayout
) -> float:
    """Returns the time of a gather or a reduce-scatter.

    Args:
        size: Bytes of the whole tensor.
        num_ranks: Number of ranks.
        num_per_node: How many of them share an NVLink domain, and with it the domain's network.
        gpu: The GPU.
        layout: The layout, for the network.
    """
    if num_ranks <= 1:
        return 0.0
    bandwidth, latency = gpu.nvlink * NVLINK_SHARE, COLLECTIVE_SECONDS
    num_nodes = num_ranks / num_per_node
    if num_nodes > 1:
        bandwidth = min(bandwidth, num_per_node * _network(gpu, layout))
        latency = HOP_SECONDS * min(num_nodes - 1, MOST_HOPS)
    num_buckets = max(1.0, size / BUCKET_BYTES)
    return ring_bytes(size, num_ranks) / bandwidth + num_buckets * latency


def exposed_seconds(exchange: float, window: float, constants: FittedConstants) -> float:
    """Returns the part of an exchange that compute does not hide.

    Args:
        exchange: Time of the exchange.
        window: Time of the compute that overlaps it.
        constants: The fitted constants.
    """
    return max(0.0, exchange - window) + constants.data * min(exchange, window)


@dataclass(frozen=True)
class _LayerTime:
    """Seconds of one layer and micro-batch on one rank.

    Attributes:
        forward: Compute of the forward pass.
        backward: Compute of the backward pass, including recomputation.
        exchange_forward: Exchange of the forward pass that is not hidden.
        exchange_backward: Exchange of the backward pass that is not hidden.
        launches_forward: Time by which launching the forward pass takes longer than running it.
        launches_backward: The same of the backward pass.
    """

    forward: float
    backward: float
    exchange_forward: float
    exchange_backward: float
    launches_forward: float
    launches_backward: float

    @property
    def compute(self) -> float:
        return self.forward + self.backward

    @property
    def exchange(self) -> float:
        return self.exchange_forward + self.exchange_backward

    @property
    def launches(self) -> float:
        return self.launches_forward + self.launches_backward

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange + self.launches

    @property
    def forward_share(self) -> float:
        """Share of the forward pass in the layer's time."""
        forward = self.forward + self.exchange_forward + self.launches_forward
        return forward / self.seconds


def _mean_layer_time(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec, constants: FittedConstants
) -> _LayerTime:
    """Returns the mean over layers of the run's precision and those that stay in bf16."""
    layer, stack = _layer_time(shape, layout, gpu, constants), layout.stack
    if not stack.bf16_layers:
        return layer
    in_bf16 = replace(layout, stack=replace(stack, precision="bf16"))
    other, share = _layer_time(shape, in_bf16, gpu, constants), stack.bf16_layers
    return _LayerTime(
        *(
            (1 - share) * mine + share * theirs
            for mine, theirs in zip(astuple(layer), astuple(other), strict=True)
        )
    )


def _layer_time(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec, constants: FittedConstants
) -> _LayerTime:
    forward, backward = _matmul_times(shape, layout, gpu, constants)
    elementwise_forward, elementwise_backward = _elementwise_times(shape, layout, gpu)
    attention_forward, attention_backward = attention_seconds(shape, layout, gpu)
    forward += elementwise_forward + attention_forward
    backward += elementwise_backward + attention_backward
    tensor_forward, tensor_backward = _tensor_exchange(shape, layout, gpu, constants)
    exchange_forward, exchange_backward = tensor_forward, tensor_backward
    if layout.context > 1:
        is_inside = layout.tensor * layout.context <= _domain(gpu, layout)
        bandwidth = gpu.nvlink * NVLINK_SHARE if is_inside else _network(gpu, layout)
        size = layout.tokens * 2 * shape.key_value_size / layout.tensor * 2
        turn = size / bandwidth + 2 * COLLECTIVE_SECONDS
        others = turn * (layout.context - 1)
        if layout.stack.rotates_keys:  # attention hides all turns but the first
            exchange_forward += turn + max(0.0, others - attention_forward)
            exchange_backward += 2 * turn + max(0.0, 2 * others - attention_backward)
        else:  # a gather before attention, and a reduce-scatter of their gradients after it
            exchange_forward += others
            exchange_backward += others
    collectives = TENSOR_COLLECTIVES if layout.tensor > 1 else (0, 0)
    launch_forward, launch_backward = (
        LAUNCH_SECONDS * (kernels + number)
        for kernels, number in zip(layout.layer_launches, collectives, strict=True)
    )
    if layout.recomputes_attention:
        backward += attention_forward
    if layout.recomputes_mlp:
        for outputs, inputs in _matrix_sizes(shape, layout)[2:]:
            backward += matmul_seconds(
                layout.tokens, outputs, inputs, gpu, constants, precision=layout.stack.precision
            )
        backward += (
            6 * shape.ffn_hidden_size / layout.tensor * layout.tokens / (gpu.hbm * HBM_SHARE)
        )
        exchange_backward += tensor_forward / 2
        launch_backward += launch_forward / 2
    backward += layout.recomputed_layers * forward
    exchange_backward += layout.recomputed_layers * exchange_forward
    launch_backward += layout.recomputed_layers * launch_forward
    return _LayerTime(
        forward=forward,
        backward=backward,
        exchange_forward=exchange_forward,
        exchange_backward=exchange_backward,
        launches_forward=max(0.0, launch_forward - forward - exchange_forward),
        launches_backward=max(0.0, launch_backward - backward - exchange_backward),
    )


def _matrix_sizes(shape: TransformerShape, layout: StepLayout) -> list[tuple[float, float]]:
    """Returns outputs and inputs of a rank's matrices: two of attention, then two of the MLP."""
    tensor, hidden = layout.tensor, shape.hidden_size
    return [
        ((shape.query_size + 2 * shape.key_value_size) / tensor, hidden),
        (hidden, shape.query_size / tensor),
        (shape.fc1_size / tensor, hidden),
        (hidden, shape.ffn_hidden_size / tensor),
    ]


def _matmul_times(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec, constants: FittedConstants
) -> tuple[float, float]:
    """Returns forward and backward time of the four matrix products of a layer."""
    tokens, precision = layout.tokens, layout.stack.precision
    forward = backward = 0.0
    for outputs, inputs in _matrix_sizes(shape, layout):
        forward += matmul_seconds(tokens, outputs, inputs, gpu, constants, precision=precision)
        backward += matmul_seconds(tokens, inputs, outputs, gpu, constants, precision=precision)
        # Weight gradients are added to fp32 buffers.
        backward += matmul_seconds(
            outputs, inputs, tokens, gpu, constants, precision=precision, out_bytes=8
        )
    return forward, backward


def _elementwise_times(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec
) -> tuple[float, float]:
    """Returns forward and backward time of norms, residuals, rotation and activation."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    rotated = 4 * (shape.query_size + shape.key_value_size)
    # Bytes per token: norms and residuals are divided by sequence parallelism, the others by
    # tensor parallelism.
    divided_forward: float = rotated + (6 if shape.is_gated else 4) * ffn
    divided_backward: float = rotated + (10 if shape.is_gated else 6) * ffn
    if shape.has_qk_norm:  # reads and writes; the backward pass also reads the inputs again
        divided_forward, divided_backward = (
            divided_forward + rotated,
            divided_backward + 1.5 * rotated,
        )
    if layout.stack.precision != "bf16":  # casts and their transposes
        divided_forward += 4 * (hidden + shape.query_size + ffn)
        divided_backward += 4 * (hidden + shape.query_size + shape.fc1_size + shape.key_value_size)
    if layout.stack.precision == "mxfp8":  # a scale for every 32 values
        divided_forward, divided_backward = 1.2 * divided_forward, 1.2 * divided_backward
    seconds = layout.tokens / (gpu.hbm * HBM_SHARE)
    if not layout.stack.fuses_elementwise:
        seconds *= EAGER_FACTOR
    forward = seconds * (20 * hidden / layout.residual_parts + divided_forward / layout.tensor)
    backward = seconds * (28 * hidden / layout.residual_parts + divided_backward / layout.tensor)
    return forward, backward


def _tensor_exchange(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec, constants: FittedConstants
) -> tuple[float, float]:
    """Returns forward and backward time of the tensor-parallel exchange that is not hidden."""
    if layout.tensor == 1:
        return 0.0, 0.0
    is_inside = layout.tensor <= _domain(gpu, layout)
    bandwidth = gpu.nvlink * NVLINK_SHARE if is_inside else _network(gpu, layout)
    size = ring_bytes(layout.tokens * shape.hidden_size * 2, layout.tensor)
    # Two gathers and two reduce-scatters each way, or two all-reduces of twice the bytes. With
    # sequence parallelism the backward pass has two more gathers, which its products always hide.
    # Only gathers are in the precision of the products.
    precision = layout.stack.precision if layout.sequence_parallel else "bf16"
    is_hidden = layout.stack.overlaps_tensor_exchange
    share = constants.tensor if is_hidden else UNOVERLAPPED_TENSOR_SHARE
    forward, backward = (
        share * (2 * size * (1 + gathered / 2) / bandwidth + 4 * COLLECTIVE_SECONDS)
        for gathered in GATHERED_BYTES[precision]
    )
    return forward, backward


def _output_seconds(
    shape: TransformerShape, layout: StepLayout, gpu: GpuSpec, constants: FittedConstants
) -> float:
    """Returns the time of the output layer, in bf16, and of the loss for a micro-batch."""
    tokens, vocab, hidden = layout.tokens, shape.vocab_size / layout.tensor, shape.hidden_size
    return (
        matmul_seconds(tokens, vocab, hidden, gpu, constants)
        + matmul_seconds(tokens, hidden, vocab, gpu, constants)
        + matmul_seconds(vocab, hidden, tokens, gpu, constants, out_bytes=8)
        + 20 * vocab * tokens / (gpu.hbm * HBM_SHARE)  # the loss's passes over the logits
    )


def _send_seconds(shape: TransformerShape, layout: StepLayout, gpu: GpuSpec) -> float:
    """Returns the time of the messages between stages that compute does not hide."""
    if layout.pipeline == 1:
        return 0.0
    size = layout.tokens * shape.hidden_size * 2 / layout.residual_parts
    is_inside = layout.num_gpus <= _domain(gpu, layout)
    bandwidth = gpu.nvlink * NVLINK_SHARE if is_inside else _network(gpu, layout)
    once = size / bandwidth + 2 * HOP_SECONDS
    # The interleaved schedule overlaps most of its more numerous messages.
    share = 0.6 if layout.chunks == 1 else 0.25
    number = layout.num_micro_batches * layout.chunks * share + layout.pipeline - 1
    return 2 * number * once


def _update_seconds(
    shape: TransformerShape,
    layout: StepLayout,
    gpu: GpuSpec,
    constants: FittedConstants,
    layer: _LayerTime,
    slowest: float,
) -> tuple[float, float]:
    """Returns the time of the optimizer and of the data-parallel exchange that is not hidden.

    Args:
        shape: The model.
        layout: How the step is divided.
        gpu: The GPU.
        constants: The fitted constants.
        layer: Times of a layer.
        slowest: Time of a micro-batch on the slowest stage.
    """
    matrices = shape.num_layers / layout.pipeline * shape.layer_parameters / layout.tensor
    num_tables = 1 if layout.pipeline > 1 or shape.is_tied else 2
    parameters = matrices + num_tables * shape.table_parameters / layout.tensor
    ranks = layout.data * layout.context
    per_node = max(1, min(ranks, _domain(gpu, layout) // layout.tensor))
    shards = 1 if layout.sharding == "none" else ranks
    moved = 30 * parameters / shards + 8 * parameters
    optimizer = moved / (gpu.hbm * HBM_SHARE) + STEP_SECONDS
    if ranks == 1:
        return optimizer, 0.0

    if layout.sharding == "weights":  # every micro-batch gathers twice and reduces once
        gather = collective_seconds(2 * parameters, ranks, per_node, gpu, layout)
        scatter = collective_seconds(2 * parameters, ranks, per_node, gpu, layout)
        forward = slowest * layer.forward_share
        exposed = exposed_seconds(gather, forward, constants)
        exposed += exposed_seconds(gather + scatter, slowest - forward, constants)
        return optimizer, layout.num_micro_batches * exposed

    scatter = collective_seconds(
        layout.stack.gradient_bytes * parameters, ranks, per_node, gpu, layout
    )
    # The gradients of a chunk are complete after its last backward pass. Chunks follow each other.
    chunks = layout.chunks
    spread = 1.0
    if chunks > 1:
        spread = min(layout.pipeline, layout.num_micro_batches) * (chunks - 1) / chunks
    forward = slowest * layer.forward_share * spread
    backward = slowest * spread - forward
    if layout.sharding == "none":  # an all-reduce
        reduce, gather = 2 * scatter, 0.0
    else:
        reduce = scatter
        size = layout.stack.weight_bytes * matrices + 2 * (parameters - matrices)
        gather = collective_seconds(size, ranks, per_node, gpu, layout)
    if layout.overlaps_grad_reduce:
        reduce = exposed_seconds(reduce, backward, constants)
    if layout.overlaps_param_gather:
        gather = exposed_seconds(gather, forward, constants)
    return optimizer, reduce + gather


def _domain(gpu: GpuSpec, layout: StepLayout) -> int:
    return layout.domain or gpu.domain


def _network(gpu: GpuSpec, layout: StepLayout) -> float:
    """Returns the network bandwidth per GPU that collectives reach."""
    return (layout.network or gpu.network) * NETWORK_SHARE
