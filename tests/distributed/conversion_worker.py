"""Runs a job of one or two processes that creates checkpoints of real models, or loads them.

Tasks are given as JSON on the command line:
`[{"do", "folder", "model", "tp", "pp", "logits"}, ...]`. Writes checkpoints, and the logits of the
model in memory on `token_ids`.
"""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_chatflow.runtime.launch import device_mode, initialize

SHAPE = {
    "num_layers": 2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "num_query_groups": 6,
    "max_position_embeddings": 64,
    "rotary_base": 5000.0,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.2,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 301,
}


def token_ids(vocab_size: int) -> torch.Tensor:
    """Returns int64[40], the same on every rank."""
    return torch.randint(vocab_size, (40,), generator=torch.Generator().manual_seed(3))


def build(task: dict[str, Any], ranks: Any) -> Any:
    from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
    from megatron_chatflow.model.llama import build_llama

    train = TrainConfig(
        train_iters=1,
        micro_batch_size=1,
        global_batch_size=1,
        bf16=task.get("bf16", False),
        seed=task.get("seed", 1),
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=task["tp"], pipeline_model_parallel_size=task["pp"]
    )
    with device_mode(ranks.device):
        model = ModelConfig(**{**SHAPE, **task["model"]})
        return build_llama(model, parallel, train, ranks, vocab_size=model.vocab_size)


def spread_norms(chunk: Any) -> None:
    """Gives every norm weights other than ones, so that a mix-up is detected."""
    for name, module in chunk.named_modules():
        if name.endswith("layernorm") and hasattr(module, "weight"):
            layer = name.split(".")
            number = chunk.decoder.layers[int(layer[2])].layer_number if len(layer) > 2 else 0
            seed = zlib.crc32(f"{number}{layer[-1]}".encode())
            noise = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(seed))
            module.weight.data.add_(noise.to(module.weight.dtype))


def save(task: dict[str, Any], llama: Any, ranks: Any) -> None:
    from megatron_chatflow.checkpoint import megatron
    from megatron_chatflow.checkpoint.layout import (
        assign_shards,
        build_file_image,
        index_files,
        unpadded_shards,
    )
    from megatron_chatflow.runtime.ranks import data_parallel_group

    folder = Path(task["folder"])
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    with device_mode(ranks.device):
        state = {"model": llama.chunks[0].sharded_state_dict()}
        shards, objects, common = megatron.saved_shards(state, {})
    group = data_parallel_group()
    shards = assign_shards(
        unpadded_shards(shards, llama.chunks[0].unpadded_sizes), group.rank(), group.size()
    )
    image = build_file_image(f"__{torch.distributed.get_rank()}_0.distcp", shards, objects)
    content = torch.empty(image.num_bytes, dtype=torch.uint8)
    image.copy(0, image.num_bytes, content)
    (folder / image.plan["file"]).write_bytes(content.numpy().tobytes())
    plans: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(plans, image.plan)
    if torch.distributed.get_rank() == 0:
        for name, content in index_files(plans).items():
            (folder / name).write_bytes(content)
        (folder / "common.pt").write_bytes(common)
        (folder / "metadata.json").write_bytes(megatron.format_file())
        shape = {**SHAPE, **task["model"]}
        state = {"model": shape, "tokenizer": {}, "iteration": 1}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": shape}))


def logits_of(llama: Any, ranks: Any, vocab_size: int) -> torch.Tensor:
    """Returns float32[40, vocab_size] on the last pipeline stage, from megatron-core's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_chatflow.model.packed import pack_tokens
    from megatron_chatflow.runtime import ranks as megatron

    ids = token_ids(vocab_size)
    packed = pack_tokens(
        torch.tensor([0, len(ids)], dtype=torch.int32),
        rotary=llama.rotary,
        dtype=llama.dtype,
        device=ranks.device,
    )

    def collect(hidden: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        local = hidden[0] @ llama.output_weight.T
        parts = [torch.empty_like(local) for _ in range(ranks.tensor_parallel_size)]
        torch.distributed.all_gather(parts, local, group=megatron.tensor_parallel_group())
        return torch.cat(parts, dim=-1)

    def forward(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(batches), None, None, packed_seq_params=packed), collect

    with torch.no_grad(), device_mode(ranks.device):
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([ids.unsqueeze(0)]),
            model=llama.chunks,
            num_microbatches=1,
            seq_length=len(ids),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results[0][:, :vocab_size].float() if results else torch.empty(0)


def main() -> None:
    for task in json.loads(sys.argv[1]):
        ranks = initialize(
            tensor_model_parallel_size=task["tp"], pipeline_model_parallel_size=task["pp"], seed=1
        )
        from megatron_chatflow.checkpoint.store import load_weights
        from megatron_chatflow.runtime import ranks as megatron

        llama = build(task, ranks)
        if task["do"] == "save":
            spread_norms(llama.chunks[0])
            save(task, llama, ranks)
        else:
            load_weights(Path(task["folder"]), llama.chunks, ranks)
        logits = logits_of(llama, ranks, {**SHAPE, **task["model"]}["vocab_size"])
        if ranks.is_last_stage and ranks.tensor_parallel_rank == 0 and "logits" in task:
            torch.save(logits, task["logits"])
        torch.distributed.barrier()
        megatron.destroy_groups()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive their store


if __name__ == "__main__":
    main()
