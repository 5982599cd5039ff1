"""Stand-ins for the layers: linear, norm followed by linear, and norm.

What transformer-engine computes in one kernel is one operator, so that a simulated GPU counts one.
"""

import torch
import torch.distributed as dist
from torch.utils.flop_counter import register_flop_formula

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, record
from transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    check_user_buffer,
    get_dummy_wgrad,
)
from transformer_engine.pytorch.tensor import QuantizedTensor, quantized
from transformer_engine.pytorch.tensor.operands import (
    Operand,
    accumulate_product,
    gather,
    product,
    quantize,
)

__all__ = ["LayerNormLinear", "Linear", "RMSNorm", "TransformerEngineBaseModule"]


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


@register_flop_formula(torch.ops.te_standin.accumulate)
def _(main_grad, rows, columns, *_, **__):
    return 2 * rows[0] * rows[1] * columns[1]


def _reduce_gradient(grad_x, layer):
    if layer.is_column and layer.tp_size > 1:
        return _reduce(grad_x, layer.tp_group, scatter=layer.sequence_parallel)
    return grad_x


def _dummy_gradient(parameter):
    parameter.grad_added_to_main_grad = True
    return get_dummy_wgrad(parameter.shape, parameter.dtype)


class _Product(torch.autograd.Function):
    """The product of a layer, with its collectives and its gradients."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        assert not isinstance(weight, QuantizedTensor), "a product in bf16 of a weight in FP8"
        whole = gather(x, layer.tp_group) if layer.gathers else x
        record(whole, weight)
        if layer.overlaps:
            check_user_buffer(whole)
        y = whole @ weight.t()
        return _reduce(y, layer.tp_group, scatter=layer.sequence_parallel) if layer.reduces else y

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        if layer.reduces and layer.sequence_parallel:
            gradient = gather(gradient, layer.tp_group)
        whole = gather(x, layer.tp_group) if layer.gathers else x
        parameter = layer.weight  # what autograd has saved may have been offloaded
        grad_x = _reduce_gradient(gradient @ weight, layer)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        rows, columns = gradient.flatten(0, -2).t(), whole.flatten(0, -2)
        if not layer.fuse_wgrad_accumulation:
            return grad_x, rows @ columns, None
        _accumulate(parameter.main_grad, rows, columns)
        return grad_x, _dummy_gradient(parameter), None


class _QuantizedProduct(torch.autograd.Function):
    """The same in FP8. Autograd keeps one copy of the input in FP8, or the input itself.

    What is gathered is gathered in FP8: one copy of an operand with one scale, whose other copy
    every rank makes of it, but the copy that a product needs of one whose blocks have scales.
    """

    @staticmethod
    def forward(ctx, x, weight, layer, quantized_weight):
        recipe = ctx.recipe = FP8GlobalStateManager.recipe
        ctx.layer, ctx.weight = layer, quantized_weight
        group = layer.tp_group if layer.gathers else None
        rows, columns = quantize(x.flatten(0, -2), recipe, recipe.kinds[0], group)
        if layer.save_original_input:
            ctx.save_for_backward(x)
        else:
            kept = rows if layer.gathers and not recipe.has_blocks else columns
            ctx.save_for_backward(kept.data, kept.scale)
        del columns
        if layer.gathers:
            rows = rows.gathered(group)
        record(rows.data, weight)
        if layer.overlaps:
            check_user_buffer(rows.data, recipe)
        y = product(rows, quantized_weight.rows, "nt")
        y = y.view(-1, *x.shape[1:-1], y.shape[-1])
        return _reduce(y, layer.tp_group, scatter=layer.sequence_parallel) if layer.reduces else y

    @staticmethod
    def backward(ctx, gradient):
        layer, recipe = ctx.layer, ctx.recipe
        forward_kind, gradient_kind = recipe.kinds
        gathers_gradient = layer.reduces and layer.sequence_parallel
        group = layer.tp_group if gathers_gradient else None
        rows, columns = quantize(gradient.flatten(0, -2), recipe, gradient_kind, group)
        if gathers_gradient:
            rows = rows.gathered(group)
            columns = columns.gathered(group) if recipe.has_blocks else rows.transposed()
        grad_x = product(rows, ctx.weight.columns, "nn")
        del rows
        grad_x = _reduce_gradient(grad_x.view(-1, *gradient.shape[1:-1], grad_x.shape[-1]), layer)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        if layer.save_original_input:
            (x,) = ctx.saved_tensors
            _, inputs = quantize(x.flatten(0, -2), recipe, forward_kind)
        else:
            inputs = Operand(*ctx.saved_tensors, forward_kind)
        if layer.gathers:
            inputs = inputs.gathered(layer.tp_group)
            inputs = inputs if recipe.has_blocks else inputs.transposed()
        parameter = layer.weight
        if not layer.fuse_wgrad_accumulation:
            return grad_x, product(columns, inputs, "tn"), None, None
        accumulate_product(parameter.main_grad, columns, inputs)
        return grad_x, _dummy_gradient(parameter), None, None


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
        self.use_bias = bias
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
        self._fp8_workspaces = {}  # copies of a bf16 weight, which micro-batches share
        recipe = FP8GlobalStateManager.recipe_of_weights
        if recipe is not None:
            # What the memory holds before the weights are drawn or loaded.
            self.weight = torch.nn.Parameter(quantized(weight.zero_(), recipe))
            unset = [torch.full_like(weight, torch.nan, device="cpu")]
            self.weight.get_high_precision_init_val = lambda: unset[0]
            self.weight.clear_high_precision_init_val = unset.clear
        self.weight.tensor_model_parallel, self.weight.partition_stride = True, 1
        self.weight.partition_dim = 1 if is_row else 0
        init_method(self.weight)
        if bias:
            self.bias = torch.nn.Parameter(weight.new_zeros(self.out_features))
            self.bias.tensor_model_parallel, self.bias.partition_stride = self.is_column, 1
            self.bias.partition_dim = 0

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return self._multiply(inp, is_first_microbatch)

    def _multiply(self, x, is_first_microbatch):
        if FP8GlobalStateManager.recipe is None:
            y = _Product.apply(x, self.weight, self)
        else:
            quantized_weight = self._quantized_weight(is_first_microbatch)
            y = _QuantizedProduct.apply(x, self.weight, self, quantized_weight)
        return y + self.bias if self.use_bias else y

    @torch.no_grad()
    def _quantized_weight(self, is_first_microbatch):
        if isinstance(self.weight, QuantizedTensor):
            return self.weight
        if is_first_microbatch is None:
            return quantized(self.weight, FP8GlobalStateManager.recipe)
        cached = self._fp8_workspaces.get("weight")
        if cached is None:
            cached = quantized(self.weight, FP8GlobalStateManager.recipe)
            self._fp8_workspaces["weight"] = cached
        elif is_first_microbatch:
            cached.quantize_(self.weight)
        return cached


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
        return self._multiply(x, is_first_microbatch)


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ):
        super().__init__()
        self.eps, size = eps, normalized_shape or hidden_size
        device = kwargs.get("device", "cuda")
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, input, *extra_inputs, **kwargs):
        assert not extra_inputs and not kwargs
        return _rms_norm(input, self.weight, self.eps)[0]
