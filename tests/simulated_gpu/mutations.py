"""Faults that the simulated GPU has found, re-introduced by replacing functions."""

from typing import Any

import torch


def pin_expanded_tensors() -> None:
    """Pins tensors as they are; expanded ones, as with one sample, cannot be pinned."""
    from megatron_chatflow.model import forward

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    forward.to_device = to_device


def read_a_value_in_a_layer() -> None:
    """Reads the greatest activation on the host, in every layer."""
    from megatron_chatflow.kernels.rms_norm import RMSNorm

    forward = RMSNorm.forward

    def read(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        assert hidden_states.max().item() < 1e9
        return forward(norm, hidden_states)

    RMSNorm.forward = read


def leave_a_tensor_on_the_cpu() -> None:
    """Looks up bytes of labels in a table that was left on the CPU."""
    from megatron_chatflow.model.forward import ForwardStep

    build = ForwardStep.build.__func__

    def keep(cls: Any, *args: Any, **kwargs: Any) -> Any:
        step = build(cls, *args, **kwargs)
        object.__setattr__(step, "num_bytes_per_id", torch.ones(len(step.num_bytes_per_id)).long())
        return step

    ForwardStep.build = classmethod(keep)


def add_a_cpu_tensor() -> None:
    """Adds a bias that was left on the CPU to the activations."""
    from megatron_chatflow.kernels.rms_norm import RMSNorm

    forward = RMSNorm.forward

    def add(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(hidden_states.shape[-1], dtype=hidden_states.dtype)
        return forward(norm, hidden_states + bias)

    RMSNorm.forward = add


def forget_a_shape_function() -> None:
    """Uses an operator that has no shape function."""
    from megatron_chatflow.kernels.rms_norm import RMSNorm

    @torch.library.custom_op("mutations::double", mutates_args=())
    def double(values: torch.Tensor) -> torch.Tensor:
        return values + values

    forward = RMSNorm.forward

    def call(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return double(forward(norm, hidden_states))

    RMSNorm.forward = call
