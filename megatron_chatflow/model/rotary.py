"""Rotary position embedding of packed tokens.

Su et al., "RoFormer", 2021, equation 34, with LLaMA's layout: the two halves of a head are the real
and imaginary parts. Positions count from the beginning of each document. The angles of a
micro-batch are computed once, not once per layer.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.architectures import RopeScaling, dynamic_base
from megatron_chatflow.kernels import cpu as cpu_kernels


@dataclass(frozen=True)
class Rotary:
    """The settings of a rotary embedding.

    Kinds of scaling have the names and formulas of `transformers`. ``linear``
    (Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
    2023) divides all frequencies. ``dynamic`` is NTK-aware scaling, a larger base for a longer
    text: transformers computes the base for each text's length, while training uses the base of its
    sequence length for every document. ``llama3`` divides only low frequencies, with a ramp towards
    high ones. ``yarn`` (Peng et al., "YaRN: Efficient Context Window Extension of Large Language
    Models", 2023) does the same with a ramp over the index of the frequency, and multiplies queries
    and keys by `attention_factor`.

    Attributes:
        head_dim: Size of an attention head.
        base: The slowest angle's base, 10,000 in LLaMA-2.
        scaling: Kind of scaling.
        factor: By how much the context is extended.
        low_freq_factor: For ``llama3``: wavelengths over ``original_length / this`` are divided.
        high_freq_factor: For ``llama3``: wavelengths under ``original_length / this`` are kept.
        original_length: Context length of the unscaled model in tokens.
        beta_fast: For ``yarn``: frequencies of more turns in ``original_length`` are kept.
        beta_slow: For ``yarn``: frequencies of fewer turns in ``original_length`` are divided.
        rounds: For ``yarn``: whether the ramp begins and ends at a frequency, not between two.
        attention_factor: For ``yarn``: factor of the cosines and sines, and so of queries and keys.
        length: For ``dynamic``: length in tokens of the text that determines the base.
    """

    head_dim: int
    base: float
    scaling: RopeScaling | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rounds: bool = True
    attention_factor: float = 1.0
    length: int = 1

    @classmethod
    def of(cls, model: ModelConfig, length: int | None = None) -> "Rotary":
        """Returns the settings of a model, for texts of ``length`` tokens."""
        return cls(
            head_dim=model.head_dim,
            base=model.rotary_base,
            scaling=model.rope_scaling_type,
            factor=model.rope_scaling_factor or 1.0,
            low_freq_factor=model.rope_low_freq_factor or 1.0,
            high_freq_factor=model.rope_high_freq_factor or 4.0,
            original_length=(
                model.rope_original_max_position_embeddings or model.max_position_embeddings
            ),
            beta_fast=model.yarn_beta_fast or 32.0,
            beta_slow=model.yarn_beta_slow or 1.0,
            rounds=model.yarn_correction_range_round_to_int is not False,
            attention_factor=_attention_factor(model),
            length=length or model.max_position_embeddings,
        )

    @property
    def softmax_scale(self) -> float | None:
        """Factor on the attention scores that includes `attention_factor`; None for the usual one.

        Scores are products of queries and keys, so the factor of both is applied here, where no
        kernel has to know it.
        """
        if self.attention_factor == 1:
            return None
        return float(self.head_dim**-0.5 * self.attention_factor**2)

    def inverse_frequencies(self, device: torch.device) -> torch.Tensor:
        """Returns the scaled angles per position ``base^(-2i/head_dim)``, float32[head_dim / 2]."""
        base = self.base
        if self.scaling == "dynamic":
            base = dynamic_base(base, self.head_dim, self.factor, self.original_length, self.length)
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (base ** (steps / self.head_dim))
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "llama3":
            # The position on the ramp: 0 is divided by the factor, 1 is kept.
            turns = self.original_length * frequencies / (2 * math.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - kept) * frequencies / self.factor + kept * frequencies
        if self.scaling == "yarn":
            divided = self._yarn_ramp(device)
            return frequencies / self.factor * divided + frequencies * (1 - divided)
        return frequencies

    def _yarn_ramp(self, device: torch.device) -> torch.Tensor:
        """Returns how far each frequency is divided, from 0 to 1, float32[head_dim / 2]."""

        def index(num_turns: float) -> float:
            """Returns the index of the frequency of so many turns within the original length."""
            turns = self.original_length / (num_turns * 2 * math.pi)
            return self.head_dim * math.log(turns) / (2 * math.log(self.base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.rounds:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        steps = torch.arange(self.head_dim // 2, dtype=torch.float32, device=device)
        # transformers avoids the division by 0 in the same way.
        return ((steps - low) / (high - low or 0.001)).clamp(0.0, 1.0)


def _attention_factor(model: ModelConfig) -> float:
    """Returns the factor of queries and keys, with the formula of transformers for YaRN."""
    if model.rope_scaling_type != "yarn":
        return 1.0
    if model.yarn_attention_factor is not None:
        return model.yarn_attention_factor

    def mscale(weight: float) -> float:
        factor = model.rope_scaling_factor or 1.0
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if model.mscale and model.mscale_all_dim:
        return mscale(model.mscale) / mscale(model.mscale_all_dim)
    return mscale(1.0)


@dataclass(frozen=True)
class RotaryTable:
    """The angles of a micro-batch's tokens, shared by all layers.

    Attributes:
        angles: float32[tokens, 1, head_dim / 2].
        cosines: Cosines of the angles, rounded to `table_dtype`.
        sines: Sines of the angles, rounded to `table_dtype`.
    """

    angles: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor

    @cached_property
    def angles_of_heads(self) -> torch.Tensor:
        """The angles for transformer-engine, float32[tokens, 1, 1, head_dim]."""
        return torch.cat((self.angles, self.angles), dim=-1).unsqueeze(1)


def rotary_table(positions: torch.Tensor, rotary: Rotary, dtype: torch.dtype) -> RotaryTable:
    """Computes every token's angles, their cosines and sines.

    Args:
        positions: int64[tokens], each token's position in its document.
        rotary: The rotary embedding's settings.
        dtype: The dtype of cosines and sines; angles are computed in float32.
    """
    frequencies = rotary.inverse_frequencies(positions.device)
    angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(1)
    return RotaryTable(angles, angles.cos().to(dtype), angles.sin().to(dtype))


class _Rotate(torch.autograd.Function):
    """The rotation, whose backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotate(heads, cosines, sines, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotate(gradient, cosines, sines, -1.0), None, None


def table_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of angles for heads of ``dtype``; the CPU kernel needs fp32."""
    is_fused = cpu_kernels.is_available(torch.empty(0, dtype=dtype, device=device))
    return torch.float32 if is_fused else dtype


def _rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    if cpu_kernels.is_available(heads):
        heads = heads if heads.stride(-1) == 1 else heads.contiguous()
        rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
        angles = cosines.squeeze(1), sines.squeeze(1)
        cpu_kernels.rotate(heads.unsqueeze(0), rotated.unsqueeze(0), angles, direction)
        return rotated
    real, imaginary = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
    rotated_real, rotated_imaginary = rotated.chunk(2, dim=-1)
    torch.mul(real, cosines, out=rotated_real)
    rotated_real.addcmul_(imaginary, sines, value=-direction)
    torch.mul(imaginary, cosines, out=rotated_imaginary)
    rotated_imaginary.addcmul_(real, sines, value=direction)
    return rotated


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, table: RotaryTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys with torch's operations, or with the CPU kernel in bf16.

    Args:
        query: ``[tokens, heads, head_dim]``.
        key: ``[tokens, groups, head_dim]``.
        table: The result of `rotary_table` in `table_dtype`.
    """
    rotated = (
        _Rotate.apply(heads, table.cosines, table.sines)  # type: ignore[no-untyped-call]
        for heads in (query, key)
    )
    return next(rotated), next(rotated)
