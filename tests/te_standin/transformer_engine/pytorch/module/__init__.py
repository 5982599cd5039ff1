"""Stand-ins for the layers: linear, norm followed by linear, and norm.

What transformer-engine computes in one kernel is one operator, so that a simulated GPU counts one.
"""

import torch
import torch.distributed as dist

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, quantize, record
from transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    check_user_buffer,
)
from transformer_engine.pytorch.tensor import QuantizedTensor, quantized

__all__ = ["LayerNormLinear", "Linear", "RMSNorm", "TransformerEngineBaseModule"]


def _gather(rows, group):
    whole = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
    return whole


def _reduce(rows, group, *, scatter):
    if not scatter:
        dist.all_reduce(rows, group=group)
        return rows
    own = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous(), group=group)
    return own


@torch.library.custom_op("te_standin::accumulate", mutates_args=("main_grad",))
def _accumulate(main_grad: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    main_grad.add_(rows @ columns)


@_accumulate.register_fake
def _(main_grad, rows, columns):
    return None


class _Product(torch.autograd.Function):
    """The product of a layer, with its collectives and its gradients."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.layer, ctx.recipe = layer, FP8GlobalStateManager.recipe
        ctx.save_for_backward(x, weight)
        whole = _gather(x, layer.tp_group) if layer.gathers else x
        record(whole, weight)
        if layer.overlaps:
            check_user_buffer(whole, ctx.recipe is not None)
        if ctx.recipe is not None:
            whole, weight = (quantize(t, ctx.recipe.fp8_format.value[0]) for t in (whole, weight))
        assert not isinstance(weight, QuantizedTensor), "a product in bf16 of a weight in FP8"
        y = whole @ weight.t()
        return _reduce(y, layer.tp_group, scatter=layer.sequence_parallel) if layer.reduces else y

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        if layer.reduces and layer.sequence_parallel:
            gradient = _gather(gradient, layer.tp_group)
        whole = _gather(x, layer.tp_group) if layer.gathers else x
        parameter = layer.weight  # what autograd has saved may have been offloaded
        if ctx.recipe is not None:
            forward_type, gradient_type = ctx.recipe.fp8_format.value
            whole = quantize(whole, forward_type)
            if isinstance(weight, QuantizedTensor):
                weight = weight.dequantize(transposed=True)
            else:
                weight = quantize(weight, forward_type)
            gradient = quantize(gradient, gradient_type)
        grad_x = gradient @ weight
        if layer.is_column and layer.tp_size > 1:
            grad_x = _reduce(grad_x, layer.tp_group, scatter=layer.sequence_parallel)
        rows, columns = gradient.flatten(0, -2).t(), whole.flatten(0, -2)
        if not layer.fuse_wgrad_accumulation:
            return grad_x, rows @ columns, None
        _accumulate(parameter.main_grad, rows, columns)
        parameter.grad_added_to_main_grad = True
        # A tensor for autograd, whose values nobody may read.
        unset = torch.empty_like(parameter)
        return grad_x, unset if unset.is_cuda else unset.fill_(float("nan")), None


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert not bias, "the stand-in has no biases"
        self.use_bias = False
        self.tp_group, self.tp_size = tp_group, tp_size
        self.is_column, is_row = parallel_mode == "column", parallel_mode == "row"
        self.in_features = in_features // (tp_size if is_row else 1)
        self.out_features = out_features // (tp_size if self.is_column else 1)
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.overlaps = ub_overlap_ag or ub_overlap_rs
        assert not self.overlaps or ub_name in ("qkv", "proj", "fc1", "fc2")
        self.save_original_input = save_original_input  # megatron-core sets it with FP8
        self.gathers = self.is_column and self.sequence_parallel
        self.reduces = is_row and tp_size > 1
        weight = torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        if FP8GlobalStateManager.has_fp8_weights:
            # What the memory holds before the weights are drawn or loaded.
            self.weight = torch.nn.Parameter(quantized(weight.zero_()))
            unset = [torch.full_like(weight, torch.nan, device="cpu")]
            self.weight.get_high_precision_init_val = lambda: unset[0]
            self.weight.clear_high_precision_init_val = unset.clear
        self.weight.tensor_model_parallel, self.weight.partition_stride = True, 1
        self.weight.partition_dim = 1 if is_row else 0
        init_method(self.weight)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return _Product.apply(inp, self.weight, self)


@torch.library.custom_op("te_standin::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale * weight.float()).to(x.dtype), scale


@torch.library.custom_op("te_standin::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    unit, grad_unit = x.float() * scale, gradient.float() * weight.float()
    grad_x = scale * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    grad_weight = (gradient.float() * unit).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(gradient, x, weight, scale):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, gradient, _):
    return *_rms_norm_backward(gradient, *ctx.saved_tensors), None


_rms_norm.register_autograd(_gradients, setup_context=_keep)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            init_method=init_method,
            bias=bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_name=ub_name,
        )
        assert normalization == "RMSNorm"
        assert not return_layernorm_output and not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        x, _ = _rms_norm(inp, self.layer_norm_weight, self.eps)
        return _Product.apply(x, self.weight, self)


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **options,
    ):
        super().__init__()
        self.eps, size = eps, normalized_shape or hidden_size
        device = options.get("device", "cuda")
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return _rms_norm(x, self.weight, self.eps)[0]
