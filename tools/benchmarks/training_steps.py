"""The subjects of the training benchmark: our step, and the peers' on the same shape and tokens.

Each subject's ``step()`` does a complete training step as its users do: forward, backward, clipping
to norm 1, and AdamW with fp32 master weights or autocast.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.shapes import Shape
from megatron_chatflow.config import RunConfig
from megatron_chatflow.data.loader import GlobalBatch, collate
from megatron_chatflow.data.samples import Sample
from megatron_chatflow.errors import UserError
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import build_llama
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.guard import Guard
from megatron_chatflow.training.loop import train_step
from megatron_chatflow.training.optimizer import build_optimization
from megatron_chatflow.training.weight_average import WeightAverage

LEARNING_RATE = 1e-4
_RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def run_config(
    shape: Shape, ranks: Ranks | None = None, *, bf16: bool = True, **parallel: bool
) -> RunConfig:
    """Returns the configuration of a run of this shape."""
    tensor_parallel_size = ranks.tensor_parallel_size if ranks else 1
    num_replicas = ranks.data_parallel_size if ranks else 1
    return RunConfig.from_dict(
        {
            "model": {k: v for k, v in vars(shape.model_config()).items() if not k.startswith("_")},
            "tokenizer": {"tokenizer_model": "unused"},
            "data": {"seq_length": shape.seq_length, "sources": {"mock": {"paths": ["unused"]}}},
            "parallel": {"tensor_model_parallel_size": tensor_parallel_size, **parallel},
            "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant"},
            "train": {
                "train_iters": 1000,
                "bf16": bf16,
                "micro_batch_size": shape.micro_batch_size,
                "global_batch_size": shape.micro_batch_size * num_replicas,
                **(_RECOMPUTED if shape.recompute else {}),
            },
        }
    )


class Ours:
    """Our training step, including the loss report of every source.

    Attributes:
        config: Configuration of the equivalent run.
        optimization: Model and optimizer.
    """

    def __init__(self, shape: Shape, tokens: torch.Tensor, ranks: Ranks, **parallel: bool) -> None:
        """Builds model and optimizer.

        Args:
            shape: Shape of the model and batch.
            tokens: Token ids with the last label, int64[micro_batch_size, seq_length + 1].
            ranks: Ranks of this process.
            **parallel: Keys of the configuration section ``parallel``.
        """
        config = run_config(shape, ranks, **parallel)
        self.config = config
        with device_mode(ranks.device):
            llama = build_llama(
                config.model, config.parallel, config.train, ranks, vocab_size=shape.vocab_size
            )
        self.optimization = build_optimization(config, llama, ranks)
        self.optimization.set_progress(1, shape.micro_batch_size)
        self._forward_step = ForwardStep.build(
            llama,
            ranks,
            num_bytes_per_id=np.ones(shape.vocab_size, np.int64),
            num_sources=1,
        )
        self._batch = mock_batch(tokens)
        self._ranks = ranks
        self._guard = Guard(config, ["mock"], {})

    def step(self, batch: GlobalBatch | None = None) -> float:
        """Runs one step, on the benchmark's tokens unless another batch is given."""
        result = train_step(
            self._batch if batch is None else batch,
            self.optimization,
            self._forward_step,
            self._ranks,
            self._guard,
        )
        assert result.loss is not None, "every token has a loss"
        return result.loss


class Averaged:
    """Our training step with a moving average of the weights."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self._average = WeightAverage(ours.optimization.optimizer, 0.999)

    def step(self) -> float:
        """Runs one step of the same model, and averages its weights."""
        loss = self._ours.step()
        self._average.update()
        return loss


def mock_batch(tokens: torch.Tensor) -> GlobalBatch:
    """Returns a global batch of tokens, int64[samples, seq_length + 1]."""
    num_samples, length = tokens.shape
    samples = [
        Sample(
            tokens=row.astype(np.int32),
            loss_mask=np.ones(length - 1, np.uint8),
            cu_seqlens=np.array([0, length - 1], np.int32),
        )
        for row in tokens.numpy()
    ]
    numbers = list(range(num_samples))
    return GlobalBatch(
        micro_batches=[collate(samples, [0] * num_samples, numbers)],
        begin=0,
        end=num_samples,
        num_drawn=np.array([num_samples], np.int64),
        sample_digests=torch.zeros(num_samples, 2, dtype=torch.int64),
        sample_positions=torch.arange(num_samples),
    )


class Transformers:
    """transformers' LlamaForCausalLM under bf16 autocast with torch's fused AdamW."""

    def __init__(self, shape: Shape, tokens: torch.Tensor, ranks: Ranks) -> None:
        """Builds model and optimizer."""
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise UserError(
                "--peers: transformers is not installed; run pip install 'megatron-chatflow[hf]'"
            ) from None
        # Typed loosely: transformers wraps `to` in a way that type checkers misread.
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn_hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_query_groups,
                max_position_embeddings=shape.seq_length,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )
        self._model = model.to(ranks.device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )
        # transformers shifts the labels itself, so the same tokens are read and one fewer is
        # predicted.
        self._tokens = tokens[:, :-1].contiguous().to(ranks.device)
        self._device = ranks.device.type

    def step(self) -> float:
        """Runs one training step and returns the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return float(loss)


class PlainMegatron:
    """megatron-core's own GPTModel with the local spec, its loss, and the same optimizer."""

    def __init__(self, shape: Shape, tokens: torch.Tensor, ranks: Ranks) -> None:
        """Builds model and optimizer."""
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from megatron_chatflow.model.llama import Llama, transformer_config
        from megatron_chatflow.model.rotary import Rotary

        config = run_config(shape)
        settings = transformer_config(config.model, config.parallel, config.train, ranks)
        # On GPUs use its own compiled SwiGLU, whatever our step uses.
        settings.bias_activation_fusion = ranks.is_cuda
        with device_mode(ranks.device):
            model = GPTModel(
                config=settings,
                transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
                vocab_size=shape.vocab_size,
                max_sequence_length=shape.seq_length,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            ).to(ranks.device)
        rotary = Rotary.of(config.model)
        vocab_size = shape.vocab_size
        llama = Llama([model], settings, vocab_size, vocab_size, rotary, "its own", {})
        self._optimization = build_optimization(config, llama, ranks)
        self._optimization.set_progress(1, shape.micro_batch_size)
        self._device = ranks.device
        self._tokens = tokens[:, :-1].contiguous().to(ranks.device)
        self._labels = tokens[:, 1:].contiguous().to(ranks.device)
        length = shape.seq_length
        self._positions = torch.arange(length, device=ranks.device).expand_as(self._tokens)
        # Its unfused softmax needs a mask that is True for tokens that must not be attended to.
        causal = torch.ones(length, length, dtype=torch.bool, device=ranks.device).triu(1)
        self._mask = causal[None, None]

    def step(self) -> float:
        """Runs one training step and returns the loss."""
        chunk = self._optimization.chunks[0]
        chunk.zero_grad_buffer()
        self._optimization.optimizer.zero_grad()
        with device_mode(self._device):
            losses = chunk(self._tokens, self._positions, self._mask, labels=self._labels)
            losses.float().sum().backward()
            chunk.finish_grad_sync()
            chunk.scale_gradients(1.0 / self._tokens.numel())
            self._optimization.optimizer.step()
        return float(losses.detach().float().mean())


PEERS: dict[str, type[Transformers] | type[PlainMegatron]] = {
    "transformers": Transformers,
    "megatron_core": PlainMegatron,
}
