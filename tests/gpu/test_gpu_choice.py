"""Tests that all installed implementations agree with fp32 at LLaMA-2 7B's widths."""

import pytest
import torch

from megatron_chatflow.kernels.attention import gather_facts
from megatron_chatflow.model.kernel_choice import (
    StepSizes,
    attention_operation,
    choose_fastest,
    step_operations,
)


@pytest.mark.parametrize("num_groups", [32, 8])
def test_a_choice_at_the_width_of_7b(device: torch.device, num_groups: int) -> None:
    sizes = StepSizes(
        num_tokens=4096,
        norm_tokens=4096,
        hidden_size=4096,
        ffn_width=11008,
        num_heads=32,
        num_groups=num_groups,
        head_dim=128,
        vocab_rows=32000,
        dtype=torch.bfloat16,
        device=device,
    )
    facts = gather_facts(device, sizes.dtype, sizes.head_dim, deterministic=False)
    operations = [*step_operations(sizes), attention_operation(sizes, facts, 2048, "torch")]
    for choice, operation in zip(choose_fastest(operations, device), operations, strict=True):
        print(f"{operation.name}: {choice.description}")
        assert choice.name in operation.implementations
        # Every installed implementation that supports these sizes is correct.
        assert "left out" not in choice.description, choice.description
