"""Stand-in for CUDA graphs: a graph calls the part that it was captured from again."""

import torch


def set_capture_start():
    pass


def set_capture_end():
    pass


def save_fp8_tensors(modules, recipe):
    return None


def restore_fp8_tensors(modules, fp8_tensors):
    pass


class _Graph:
    """A captured part of a layer. Like a CUDA graph it accepts only the shapes of its capture."""

    def __init__(self, layer, sample):
        self._layer = layer
        self._sample = sample  # a CUDA graph reads its inputs from them

    def __call__(self, *args, is_first_microbatch=None):
        assert self._layer is not None, "a deleted graph was replayed"
        for given, captured in zip(args, self._sample, strict=True):
            assert (given.shape, given.dtype) == (captured.shape, captured.dtype)
        return self._layer._te_cuda_graph_capture(*args)

    def reset(self):
        self._layer = None


def make_graphed_callables(
    modules,
    sample_args,
    num_warmup_iters=3,
    allow_unused_input=False,
    sample_kwargs=None,
    fp8_enabled=None,
    fp8_calibrating=None,
    fp8_recipe=None,
    fp8_group=None,
    fp8_weight_caching=None,
    enabled=None,
    calibrating=None,
    recipe=None,
    amax_reduction_group=None,
    cache_quantized_params=None,
    _order=None,
    _num_layers_per_chunk=None,
    pool=None,
    retain_graph_in_backward=False,
    _reuse_graph_input_output_buffers=False,
):
    """Runs every part forward and backward, as a capture does, and returns a graph of each."""
    assert not any(sample_kwargs), "the captured part takes hidden states only"
    num_micro_batches = len(sample_args) // len(modules)
    graphs, position = [], 0
    for num_layers in _num_layers_per_chunk:
        layers = modules[position : position + num_layers]
        position += num_layers
        graphs += [layer for _ in range(num_micro_batches) for layer in layers]
    for layer, sample in zip(graphs, sample_args, strict=True):
        (output,) = layer(*sample)
        torch.autograd.backward(output, torch.zeros_like(output))
    return tuple(_Graph(*both) for both in zip(graphs, sample_args, strict=True))
