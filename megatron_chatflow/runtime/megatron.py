"""The typed boundary between the runtime and megatron-core's parallel state.

In: sizes. Out: `Ranks`, and the process groups that other layers reduce over. megatron-core ships
no types; this module states them.
"""

from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_chatflow.runtime.ranks import ProcessRank, Ranks


def initialize_groups(
    *,
    process: ProcessRank,
    device: torch.device,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    num_model_chunks: int,
    context_parallel_size: int,
    timeout: timedelta,
) -> Ranks:
    """Makes megatron-core's process groups and says where this process stands in them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks if num_model_chunks > 1 else None,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
        # gloo copies of the groups are for CPU tensors beside NCCL; over gloo they are the same.
        create_gloo_process_groups=device.type == "cuda",
    )
    return Ranks(
        process=process,
        device=device,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=tensor_model_parallel_size,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=pipeline_model_parallel_size,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=context_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def seed_model_parallel(seed: int) -> None:
    """Seeds megatron-core's random tracker, each tensor-parallel rank with its own stream."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def tensor_parallel_group() -> ProcessGroup:
    """Ranks that hold slices of the same layers."""
    group: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def pipeline_parallel_group() -> ProcessGroup:
    """Ranks that hold consecutive layers of one replica."""
    group: ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group


def context_parallel_group() -> ProcessGroup:
    """Ranks that hold different tokens of the same samples."""
    group: ProcessGroup = parallel_state.get_context_parallel_group()
    return group


def data_parallel_group(*, with_context_parallel: bool = False) -> ProcessGroup:
    """Ranks that hold the same weights and read different samples (or parts of samples)."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(
        with_context_parallel=with_context_parallel
    )
    return group


def destroy_groups() -> None:
    """Forgets megatron-core's groups, so that a process may make others."""
    parallel_state.destroy_model_parallel()
