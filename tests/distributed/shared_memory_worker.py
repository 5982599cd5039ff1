"""A rank of `test_shared_memory.py`: compares collectives through shared memory with gloo's.

``torchrun --nproc-per-node N shared_memory_worker.py MODE``:

- ``compare`` compares every collective with gloo's.
- ``apart``: rank 1 finds no shared memory, as on another machine.
- ``kill``: rank 1 is killed between two collectives.
- ``late``: rank 1 stays away from a collective.
- ``other``: rank 1 calls a collective with another size.

In the last three modes the other ranks print the resulting error and end.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels import shared_group
from megatron_chatflow.kernels import shared_group as shared_memory

SIZES = (1, 7, 5000)
LARGE = 300_001  # More than one chunk in each lane.


def compare(group: dist.ProcessGroup, plain: dist.ProcessGroup) -> None:
    """Compares each collective for each size and dtype.

    Results are exact for two ranks and agree to rounding for more.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    for number, name in enumerate(cpu_kernels.instruction_sets()):
        cpu_kernels.use_instruction_set(name)
        for dtype in (torch.bfloat16, torch.float32):
            for count in SIZES if number else (*SIZES, LARGE):
                own = torch.randn(size * count, generator=generator).to(dtype)
                parts = [torch.empty_like(own) for _ in range(size)]
                dist.all_gather(parts, own, group=plain)
                total = torch.stack(parts).double().sum(dim=0).float().to(dtype)
                highest = torch.stack(parts).amax(dim=0)
                check(group, own, parts, total, highest, name)
    doubles = torch.ones(3, dtype=torch.float64)
    dist.all_reduce(doubles, group=group)
    assert doubles.tolist() == [size] * 3, "what is not taken goes through gloo"


def check(
    group: dist.ProcessGroup,
    own: torch.Tensor,
    parts: list[torch.Tensor],
    total: torch.Tensor,
    highest: torch.Tensor,
    what: str,
) -> None:
    """Checks one tensor in every collective, contiguous and strided."""
    rank, size = dist.get_rank(), dist.get_world_size()
    count = len(own) // size
    reduced, strided = own.clone(), torch.empty(len(own), 2, dtype=own.dtype)[:, 0].copy_(own)
    dist.all_reduce(reduced, group=group)
    torch.testing.assert_close(reduced, total, msg=lambda text: f"{what}: {text}")
    handle = dist.all_reduce(strided, group=group, async_op=True)
    assert handle is not None and handle.wait()
    assert torch.equal(strided, reduced)
    top = own.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    assert torch.equal(top, highest)
    gathered = torch.empty(size, len(own), dtype=own.dtype)
    dist.all_gather_into_tensor(gathered, own, group=group)
    assert torch.equal(gathered, torch.stack(parts))
    scattered = torch.empty(count, dtype=own.dtype)
    dist.reduce_scatter_tensor(scattered, own, group=group)
    # The same sums in the same order give the bits of an all-reduce.
    assert torch.equal(scattered, reduced[rank * count : (rank + 1) * count])
    same = [torch.empty_like(reduced) for _ in range(size)]
    dist.all_gather(same, reduced)
    assert all(torch.equal(same[0], other) for other in same), "ranks differ"


def main() -> None:
    mode = sys.argv[1]
    torch.set_num_threads(2)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    plain = dist.new_group()
    group = dist.new_group()
    assert shared_group.supports(torch.ones(1))
    if mode == "apart" and rank == 1:
        shared_memory._open_file = lambda *_: None
    description = shared_memory.share(group, timeout_seconds=2 if mode == "late" else 60)
    if mode == "apart":
        ones = torch.ones(5)
        dist.all_reduce(ones, group=group)
        assert ones.tolist() == [size] * 5
        dist.destroy_process_group()
        print(description)
        return
    assert description == "shared memory"
    if mode == "compare":
        compare(group, plain)
        dist.destroy_process_group()
        print(f"rank {rank}: equal")
        return
    # Wait: torchrun ends the other ranks once one has failed, but their errors are needed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    count = 1 << 20
    dist.all_reduce(torch.ones(count), group=group)
    if rank == 1 and mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and mode == "late":
        time.sleep(10)
    try:
        dist.all_reduce(torch.ones(count + (rank == 1)), group=group)
    except RuntimeError as error:
        print(f"rank {rank} of {size}: {error}", flush=True)
    sys.exit(3)


if __name__ == "__main__":
    main()
