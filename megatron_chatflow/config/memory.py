"""Estimates the peak memory of the process of a run that needs the most memory.

The estimate needs neither torch nor a GPU. It counts tensors only; the allocator, the CUDA context
and libraries need additional memory. `tests/distributed/test_memory.py` compares the estimate with
real runs.
"""

from dataclasses import dataclass

from megatron_chatflow.config.shape import (
    HeadCounts,
    head_counts,
    num_layer_parameters,
    num_model_chunks,
    padded_vocab_size,
)
from megatron_chatflow.config.validation import RunConfig

# The number of logits that the loss computes at a time: `CHUNK_LOGITS` in `model/loss.py`.
_CHUNK_LOGITS = 1 << 27
# `MAX_LENGTH` and `QUERY_CHUNK` of the CPU attention in `kernels/attention.py`. Attention over
# longer documents stores no scores.
_LONGEST_COMPOSED, _QUERY_CHUNK = 2048, 256
# `WINDOW_CHUNK` in `model/attention.py`.
_WINDOW_CHUNK = 256
# megatron-core's ``min_offloaded_tensor_size``, in values.
_LEAST_OFFLOADED = 1 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory in bytes of the process that needs the most memory.

    Attributes:
        weights: Parameters in the precision of the computation. With FP8 or FP4, also the two
            copies of the layers' matrices that the products read, by rows and by columns (since
            Blackwell, the recipes with one scale need one); with ``fp8_param_gather`` only those.
        gradients: Gradient buffers (fp32, or bf16 with ``grad_reduce_in_bf16`` or
            ``main_grads_dtype``).
        optimizer: Adam's moments, and with bf16 the master weights.
        activations: Activations that forward passes store for the backward passes.
        temporary: Temporary tensors at the peak: the logits and gradients of the loss, or the
            gradients of a layer and what it recomputes; or what the update needs beyond the
            activations, which it does not overlap with.
        saving: The copy from which checkpoints are written, if it is in the same memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    saving: int = 0

    @property
    def total(self) -> int:
        """Total memory in bytes."""
        held = self.weights + self.gradients + self.optimizer + self.saving
        return held + self.activations + self.temporary


def estimate_memory(
    config: RunConfig, vocab_size: int, world_size: int, *, on_cpu: bool = False
) -> MemoryEstimate:
    """Estimates the memory of the process that needs the most memory.

    Args:
        config: The configuration of the run.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        world_size: Number of processes, a multiple of the model-parallel size.
        on_cpu: Whether the run is on CPUs, because CPU kernels store other tensors than GPU
            kernels.
    """
    return max(
        (
            _estimate_stage(config, vocab_size, world_size, stage, on_cpu)
            for stage in range(config.parallel.pipeline_model_parallel_size)
        ),
        key=lambda estimate: estimate.total,
    )


def _estimate_stage(
    config: RunConfig, vocab_size: int, world_size: int, stage: int, on_cpu: bool
) -> MemoryEstimate:
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    is_first, is_last = stage == 0, stage == stages - 1
    table = padded_vocab_size(model, parallel, vocab_size) * model.hidden_size // tensor
    is_shared = not model.untie_embeddings_and_output_weights and is_first and is_last
    num_tables = 1 if is_shared else int(is_first) + int(is_last)
    parameters = model.num_layers // stages * num_layer_parameters(model, parallel) // tensor
    parameters += num_tables * table
    data_parallel = world_size // config.model_parallel_size
    # The distributed optimizer shards its state over the context-parallel processes as well.
    shards = (
        data_parallel * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    )
    num_micro_batches = _num_micro_batches(config, world_size)
    weights, moments = (
        parameters * _value_bytes(config),
        int(parameters * _state_bytes(config, on_cpu)),
    )
    activations = _activation_bytes(config, stage, num_micro_batches, on_cpu)
    share = _quantized_share(config, stage)
    matrices = int(share * (parameters - num_tables * table))
    if share:
        # The blockwise recipe gives 128 x 128 values of a weight one scale.
        is_large = config.train.fp8_format is not None and config.train.fp8_recipe == "blockwise"
        weights += int(2 * matrices * (1 if is_large else _quantized_bytes(config)))
    if config.train.fp8_param_gather:
        weights -= _value_bytes(config) * matrices
    if config.train.reuse_grad_buf_for_mxfp8_param_ag:
        # Updated weights in bf16 are gathered in a buffer of their own, and copied.
        weights += _value_bytes(config) * (parameters - matrices)
    # Data-parallel processes divide the state that they replicate when they save it.
    saved = parameters * (_value_bytes(config) + _saved_state_bytes(config))
    copy = saved // (data_parallel * parallel.context_parallel_size)
    has_copy = config.checkpoint.async_save and config.checkpoint.save is not None
    return MemoryEstimate(
        weights=weights,
        gradients=parameters * (2 if config.has_bf16_gradients else 4),
        optimizer=moments // shards,
        saving=copy if on_cpu and has_copy else 0,
        activations=activations,
        temporary=max(
            _recomputed_bytes(config, stage, on_cpu) + _layer_temporaries(config, stage),
            _loss_temporaries(config, table, is_last, on_cpu),
            parameters // shards * _update_bytes(config) - activations,
        )
        + _dummy_gradient_bytes(config, stage),
    )


def saving_copy_bytes(config: RunConfig, vocab_size: int, world_size: int) -> int:
    """Returns the bytes of host memory for the copy from which a process writes checkpoints.

    Args:
        config: The configuration of the run.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        world_size: Number of processes.
    """
    return estimate_memory(config, vocab_size, world_size, on_cpu=True).saving


def offloaded_bytes(config: RunConfig, vocab_size: int, world_size: int) -> int:
    """Returns the bytes of host memory for the optimizer state that a process offloads.

    These are the fp32 state and a copy of the gradients; 0 without ``optimizer_cpu_offload``.

    Args:
        config: The configuration of the run.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        world_size: Number of processes.
    """
    if not config.optimizer.optimizer_cpu_offload:
        return 0
    state = estimate_memory(config, vocab_size, world_size, on_cpu=True).optimizer
    return int(state * (12 + 4) / 12 * config.optimizer.optimizer_offload_fraction)


def offloaded_activation_bytes(config: RunConfig, world_size: int) -> int:
    """Returns the bytes of host memory for the activations that a process offloads at most.

    Args:
        config: The configuration of the run.
        world_size: Number of processes.
    """
    num_micro_batches = _num_micro_batches(config, world_size)
    passes = [
        _passes_in_flight(config, stage, num_micro_batches)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    num_layers = max(layers * in_flight for layers, in_flight in passes)
    return _offloaded_layer_bytes(config, on_host=True) * (num_layers - 1)


def _num_micro_batches(config: RunConfig, world_size: int) -> int:
    data_parallel = world_size // config.model_parallel_size
    return config.train.global_batch_size // (data_parallel * config.train.micro_batch_size)


def _moment_dtypes(config: RunConfig) -> tuple[str, str]:
    return config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype


def _state_bytes(config: RunConfig, on_cpu: bool) -> float:
    """Returns the bytes of optimizer state per parameter, without what is offloaded."""
    moments = sum(4 if dtype == "fp32" else 2 for dtype in _moment_dtypes(config))
    moments += 4 if config.optimizer.ema_decay is not None else 0
    if config.optimizer.optimizer_cpu_offload:  # in fp32
        return 12 * (1.0 if on_cpu else 1 - config.optimizer.optimizer_offload_fraction)
    if config.optimizer.use_precision_aware_optimizer and not config.train.fp8_param_gather:
        return 2 + moments  # fp16 master weights, or what fp32 ones have beyond the bf16 weights
    return moments + (4 if config.train.bf16 else 0)


def _saved_state_bytes(config: RunConfig) -> int:
    """Returns the bytes of a checkpoint's optimizer state per parameter."""
    moments = sum(2 if dtype == "bf16" else 4 for dtype in _moment_dtypes(config))
    moments += 4 if config.optimizer.ema_decay is not None else 0
    return moments + (4 if config.train.bf16 else 0)


def _update_bytes(config: RunConfig) -> int:
    """Returns the bytes per parameter of the fp32 state that the update computes with."""
    optimizer = config.optimizer
    # The precision-aware optimizer reads bf16 gradients; others convert them to fp32.
    reads_bf16 = optimizer.use_precision_aware_optimizer and not (
        optimizer.optimizer_cpu_offload or config.train.fp8_param_gather
    )
    gradient = 4 if config.has_bf16_gradients and not reads_bf16 else 0
    if config.train.fp8_param_gather and not config.train.reuse_grad_buf_for_mxfp8_param_ag:
        gradient += 2  # masters in bf16, which are quantized
    if optimizer.optimizer_cpu_offload:
        return gradient
    dtypes = (*_moment_dtypes(config), optimizer.main_params_dtype)
    return gradient + 4 * sum(dtype != "fp32" for dtype in dtypes)


def _quantized_bytes(config: RunConfig) -> float:
    """Returns the bytes of a value of the layers' products, with its part of a scale."""
    train = config.train
    if train.fp4_format is not None:
        return 0.5 + 1 / 16
    if train.fp8_format is None:
        return _value_bytes(config)
    return 1 + 1 / 32 if train.fp8_recipe in ("blockwise", "mxfp8") else 1


def _quantized_share(config: RunConfig, stage: int) -> float:
    """Returns the share of a stage's layers whose products are in FP8 or FP4."""
    train, num_layers = config.train, config.model.num_layers
    if train.fp8_format is None and train.fp4_format is None:
        return 0.0
    if not train.first_last_layers_bf16:
        return 1.0
    chunks = num_model_chunks(config.model, config.parallel)
    size = num_layers // config.parallel.pipeline_model_parallel_size // chunks
    first, end = train.num_layers_at_start_in_bf16, num_layers - train.num_layers_at_end_in_bf16
    begins = [
        (chunk * config.parallel.pipeline_model_parallel_size + stage) * size
        for chunk in range(chunks)
    ]
    count = sum(max(0, min(begin + size, end) - max(begin, first)) for begin in begins)
    return count / (size * chunks)


def _value_bytes(config: RunConfig) -> int:
    return 2 if config.train.bf16 else 4


def _num_tokens(config: RunConfig) -> int:
    """Returns the number of tokens of a micro-batch on one process."""
    samples = config.train.micro_batch_size
    return samples * config.data.seq_length // config.parallel.context_parallel_size


def _context_size(config: RunConfig) -> int:
    return config.parallel.context_parallel_size


def residual_bytes(config: RunConfig) -> int:
    """Returns the bytes of a micro-batch's hidden states on one process."""
    tensor = config.parallel.tensor_model_parallel_size
    parts = tensor if config.parallel.sequence_parallel else 1
    return _num_tokens(config) * _value_bytes(config) * config.model.hidden_size // parts


def layer_bytes(config: RunConfig, stage: int, on_cpu: bool) -> int:
    """Returns the bytes of activations that one layer of a stage stores for a micro-batch.

    The formula follows Korthikanti et al. 2022 (arXiv 2205.05198), section 4, with SwiGLU and
    grouped queries instead of their feed-forward block and heads, without dropout, and with
    attention that stores no scores. With a sliding window, torch's attention is called in parts:
    their contexts are stored in addition to the whole one, and on GPUs keys and values of all
    heads. The layer stores the following tensors:

    * norms: their inputs and outputs,
    * norms of queries and keys, if the model has them: see `_head_norm_size`,
    * attention: rotated queries and keys, values, and the context,
    * SwiGLU: both halves and the product.

    If attention is recomputed, the layer stores the whole output of the QKV projection instead of
    the rotated queries, keys and values, because the unrotated ones are views of that output. The
    output is not smaller.

    With FP8 or FP4, the layers store what enters a product as the product reads it: the outputs of
    the norms, and SwiGLU's. Attention stores the context in bf16, which the output projection reads
    again, except with the delayed recipe. The result is the mean over the stage's layers, of which
    some may be in bf16.
    """
    model, train = config.model, config.train
    counts, context = head_counts(model, config.parallel), _context_size(config)
    query, key_value = counts.query_size, counts.key_value_size
    is_fused = on_cpu and train.bf16
    projected, attended = 0, query + 2 * key_value
    if _has_window_masks(config, on_cpu):
        tokens = config.data.seq_length // context
        # Under context parallelism, a process has two chunks of tokens, and the keys before them.
        num_before = 0 if context == 1 else 2 * min(config.model.window or 0, tokens // 2)
        keys_per_token = (tokens + num_before) / tokens
        attended = int(2 * query + 2 * keys_per_token * (key_value if on_cpu else query))
        if context > 1 and on_cpu:  # spans are views of the gathered keys and values
            attended = 2 * query + 2 * context * key_value
    elif context > 1:
        # Keys and values of all tokens. torch's kernels need queries padded to the number of keys.
        attended = 2 * context * key_value + (2 * context if on_cpu else 1) * query
    elif is_fused and (num_keys := _num_composed_keys(config)) <= _LONGEST_COMPOSED:
        # The composed attention stores copies instead of the projection, and the scores of blocks
        # of queries with the keys that one of them sees.
        scores = config.data.seq_length // 2 + min(_QUERY_CHUNK, config.data.seq_length) // 2
        scores = min(scores, num_keys)
        projected, attended = counts.projected_size, counts.heads * scores
    normed = _head_norm_size(config, counts, on_cpu)
    if train.recomputes("core_attn"):
        projected, attended = counts.projected_size, 0
        if model.qk_layernorm:  # normalized queries and keys are no views
            attended = query + key_value
            normed -= 0 if is_fused else counts.projected_size
    num_ffn = 0 if train.recomputes("mlp") else _num_ffn_tensors(config, on_cpu)
    # torch's norm on CPUs also stores the normalized states.
    num_whole = 6.0 if on_cpu and not is_fused else 4.0
    inside = projected + normed + attended + query + num_ffn * float(model.ffn_hidden_size)
    share, size = _quantized_share(config, stage), _value_bytes(config)
    saving = share * (1 - _quantized_bytes(config) / size)
    num_whole -= 2 * saving
    if num_ffn:
        inside -= saving * model.ffn_hidden_size
    if train.fp8_recipe == "delayed":
        inside += share * query / size
    per_token = inside / config.parallel.tensor_model_parallel_size * size
    return int(num_whole * residual_bytes(config) + _num_tokens(config) * per_token)


def _has_window_masks(config: RunConfig, on_cpu: bool) -> bool:
    """Returns whether attention gives torch's kernels masks, as these have no sliding window.

    On GPUs, the estimate assumes torch's kernels unless the run requests another library's.
    """
    train, window = config.train, config.model.window
    if window is None or config.data.seq_length <= window:
        return False
    if on_cpu:
        is_whole = _context_size(config) == 1
        return not (train.bf16 and is_whole and _num_composed_keys(config) <= _LONGEST_COMPOSED)
    requests = train.transformer_impl, train.attention_backend
    if "transformer_engine" in requests or train.fp8_format or train.fp4_format:
        return False
    return not train.attention_backend.startswith("flash_attn")


def _window_mask_bytes(config: RunConfig, on_cpu: bool) -> int:
    """Returns the bytes of the masks of a sliding window, which all layers share."""
    window = config.model.window
    if window is None or not _has_window_masks(config, on_cpu):
        return 0
    chunk = max(_WINDOW_CHUNK, window)
    num_keys = [chunk + window - 1]
    if chunk > window:  # the first chunk of a document
        num_keys.append(chunk)
    if _context_size(config) > 1:  # chunks that begin less than a window behind their document
        num_keys.append(chunk + window - 1)
    return sum(num_keys) * chunk * _value_bytes(config)


def _num_composed_keys(config: RunConfig) -> int:
    """Returns the largest number of keys of a block of queries in the composed attention."""
    length, window = config.data.seq_length, config.model.window
    return length if window is None else min(length, min(_QUERY_CHUNK, length) + window - 1)


def _head_norm_size(config: RunConfig, counts: HeadCounts, on_cpu: bool) -> int:
    """Returns how many values per token the norms of queries and keys store over all TP ranks.

    They store their inputs. Keys are a view of the output of the QKV projection, which is then kept
    as a whole, and so are queries unless the heads of several groups are put together. Compiled
    kernels on CPUs, and transformer-engine, store copies instead, which are not larger.
    """
    if not config.model.qk_layernorm:
        return 0
    both = counts.query_size + counts.key_value_size
    if on_cpu and config.train.bf16:
        return both
    is_copied = counts.heads > counts.groups > config.parallel.tensor_model_parallel_size
    size = counts.projected_size + (counts.query_size if is_copied else 0)
    return size + both if on_cpu else size  # torch's norm on CPUs also stores normalized values


def _offloaded_layer_bytes(config: RunConfig, *, on_host: bool = False) -> int:
    """Returns the bytes of a layer's activations for a micro-batch that offloading frees.

    Attention and the output projection both store the context, so that offloading it with
    attention alone frees nothing, and offloading it with both copies it twice.

    Args:
        config: The configuration of the run.
        on_host: Whether to return the bytes that it needs in host memory instead.
    """
    modules, counts = config.train.offload_modules, head_counts(config.model, config.parallel)
    tokens, tensor = _num_tokens(config), config.parallel.tensor_model_parallel_size
    query = tokens * counts.query_size // tensor
    key = tokens * counts.key_value_size * _context_size(config) // tensor
    sizes: list[int] = []
    if "qkv_linear" in modules:  # input and output of the norm that is fused with the projection
        sizes += [residual_bytes(config) // _value_bytes(config)] * 2
    if "core_attn" in modules:
        sizes += [query, key, key] + [query] * on_host
    if "attn_proj" in modules:  # its input is the context
        sizes.append(query)
    return sum(size for size in sizes if size >= _LEAST_OFFLOADED) * _value_bytes(config)


def _num_ffn_tensors(config: RunConfig, on_cpu: bool) -> int:
    """Returns how many tensors of the size of one half SwiGLU stores."""
    # torch's operations on CPUs also store the activated half.
    return 4 if on_cpu and not config.train.bf16 else 3


def _passes_in_flight(config: RunConfig, stage: int, num_micro_batches: int) -> tuple[int, int]:
    """Returns the layers of a model chunk, and how many passes of chunks a stage holds at most."""
    stages = config.parallel.pipeline_model_parallel_size
    chunks = num_model_chunks(config.model, config.parallel)
    # In the 1F1B schedule, this many forward passes precede the first backward pass.
    ahead = stages - stage - 1
    in_flight = ahead + 1 if chunks == 1 else 2 * ahead + (chunks - 1) * stages + 1
    layers = config.model.num_layers // stages // chunks
    return layers, min(in_flight, max(1, num_micro_batches) * chunks)


def _activation_bytes(config: RunConfig, stage: int, num_micro_batches: int, on_cpu: bool) -> int:
    """Returns the peak bytes of activations on a stage, over all passes in flight."""
    parallel, train = config.parallel, config.train
    layers, in_flight = _passes_in_flight(config, stage, num_micro_batches)
    layer = layer_bytes(config, stage, on_cpu)
    kept = layers * layer
    if train.recompute_granularity == "full":
        number = train.recompute_num_layers or 1
        if train.recompute_method == "uniform":
            kept = residual_bytes(config) * -(-layers // number)
        else:
            kept = residual_bytes(config) * number + (layers - number) * layer
    # Interleaved stages keep the tensors that they have sent. The last stage also stores the input
    # and output of the final norm.
    sent = residual_bytes(config) if num_model_chunks(config.model, parallel) > 1 else 0
    final = 2 * residual_bytes(config) if stage == parallel.pipeline_model_parallel_size - 1 else 0
    offloaded = _offloaded_layer_bytes(config) * (layers * in_flight - 1)  # the last layer's stay
    return (kept + sent) * in_flight + final - offloaded + _window_mask_bytes(config, on_cpu)


def _recomputed_bytes(config: RunConfig, stage: int, on_cpu: bool) -> int:
    """Returns the bytes of activations that a backward pass computes again at a time."""
    train = config.train
    if train.recomputes("mlp"):
        ffn = config.model.ffn_hidden_size // config.parallel.tensor_model_parallel_size
        return _num_tokens(config) * _num_ffn_tensors(config, on_cpu) * ffn * _value_bytes(config)
    if train.recompute_granularity != "full":
        return 0
    is_uniform = train.recompute_method == "uniform"
    number = (train.recompute_num_layers or 1) if is_uniform else 1
    return number * layer_bytes(config, stage, on_cpu)


def _loss_temporaries(config: RunConfig, table: int, is_last: bool, on_cpu: bool) -> int:
    """Returns the bytes of a chunk's logits and of the gradients in the loss's forward pass."""
    if not is_last:
        return 0
    size, tokens = _value_bytes(config), _num_tokens(config)
    num_logits = tokens * (table // config.model.hidden_size)
    is_one_chunk = num_logits <= _CHUNK_LOGITS
    # The gradient of the hidden states: the whole, and a chunk's before and after scaling.
    grad_hidden = tokens * config.model.hidden_size * size * 3
    # The gradient of the weight: chunks are accumulated in fp32.
    grad_weight = table * (size if is_one_chunk else 4 + size)
    logits = min(num_logits, _CHUNK_LOGITS) * (size if on_cpu else size + 4)
    return logits + grad_hidden + grad_weight


def _layer_temporaries(config: RunConfig, stage: int) -> int:
    """Returns the bytes of gradients in a layer's widest part, SwiGLU and its first matrix."""
    model, size = config.model, _value_bytes(config)
    ffn = model.ffn_hidden_size // config.parallel.tensor_model_parallel_size
    # Gradients of SwiGLU's input and output; or those of its input, with both copies in FP8.
    per_token = size * 3.0
    if _quantized_share(config, stage):
        per_token = max(per_token, 2 * size + 4 * _quantized_bytes(config))
    gradients = int(ffn * per_token * _num_tokens(config))
    if not _dummy_gradient_bytes(config, stage):
        gradients += 2 * size * ffn * model.hidden_size
    # What the layer before has offloaded is loaded meanwhile.
    return gradients + _offloaded_layer_bytes(config)


def _dummy_gradient_bytes(config: RunConfig, stage: int) -> int:
    """Returns the bytes of what transformer-engine gives to autograd as gradients of weights.

    It adds the gradients to their buffer itself, and keeps one tensor for every size of a weight.
    The estimate knows that its layers are used where the run needs them for FP8 or FP4.
    """
    if not (_quantized_share(config, stage) and config.train.gradient_accumulation_fusion):
        return 0
    tensor = config.parallel.tensor_model_parallel_size
    return _value_bytes(config) * num_layer_parameters(config.model, config.parallel) // tensor
