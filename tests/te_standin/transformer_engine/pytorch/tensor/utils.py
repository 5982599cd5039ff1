"""Stand-ins for what megatron-core's distributed optimizer does with FP8 weights."""

import torch
import torch.distributed as dist

from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor


def replace_raw_data(tensor, new_raw_data):
    if isinstance(tensor, MXFP8Tensor):
        raise NotImplementedError("replace_raw_data for MXFP8Tensor is not supported yet")
    new_raw_data.detach().copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(
    model_weights,
    master_weights,
    start_offsets,
    group,
    fsdp_shard_model_weights=None,
    manual_post_all_gather_processing=False,
):
    masters = [
        None if master is None else master.to(weight.dtype)
        for weight, master in zip(model_weights, master_weights, strict=True)
    ]
    device = model_weights[0].device
    largest = torch.zeros(len(masters), device=device)
    for number, master in enumerate(masters):
        if master is not None:
            largest[number] = master.abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for weight, master, begin, one in zip(
        model_weights, masters, start_offsets, largest, strict=True
    ):
        empty = torch.zeros(0, dtype=weight.dtype, device=device)
        weight.quantize_range(*((empty, 0) if master is None else (master, begin)), one)


def post_all_gather_processing(model_weights):
    for weight in model_weights:
        if not isinstance(weight, MXFP8Tensor):
            weight.transpose_again()
