"""The layers of the model: which implementation a run uses, and megatron-core's spec of each.

- ``transformer_engine``: the layers that megatron-core builds from transformer-engine, with fused
  norms and linear layers, and with `te_attention.PackedTEAttention`. They are used on GPUs wherever
  transformer-engine is installed.
- ``local``: megatron-core's own linear layers, `kernels.rms_norm.RMSNorm` and
  `attention.PackedCausalAttention`, for every other machine.

Both compute the same function. Their parameters have the same shapes, and the same names in
checkpoints, so that a run may change the implementation when it is resumed.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from packaging.version import Version

from megatron_chatflow.config import ParallelConfig, TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.attention import (
    MAX_LENGTH,
    QUERY_CHUNK,
    Facts,
    choose,
    obstacle,
    unavailable,
)
from megatron_chatflow.kernels.rms_norm import RMSNorm
from megatron_chatflow.kernels.swiglu import SwiGLUMLP
from megatron_chatflow.kernels.weight_gradient import fuse_weight_gradients
from megatron_chatflow.model.attention import COMPOSED, PackedCausalAttention

TRANSFORMER_ENGINE = "transformer_engine"
LOCAL = "local"
# Values of --attention-backend that transformer-engine's attention follows, and megatron-core's
# names for them. It turns them into the environment variables of transformer-engine.
_THEIR_ATTENTION = {"auto": "auto", TRANSFORMER_ENGINE: "auto", "flash": "flash", "cudnn": "fused"}
# The oldest compute capability and the oldest transformer-engine of each recipe, from
# transformer-engine's documentation and megatron-core's `fp8_utils`.
_OLDEST = {
    "delayed": ((8, 9), "1.0"),
    "tensorwise": ((8, 9), "2.2"),
    "blockwise": ((9, 0), "2.3"),
    "mxfp8": ((10, 0), "2.1"),
    "nvfp4": ((10, 0), "2.7"),
}


@dataclass(frozen=True)
class Layers:
    """The implementation of a run's layers.

    Attributes:
        implementation: ``transformer_engine`` or ``local``.
        backend: The attention back end of local layers, one of `kernels.attention.BACKENDS`, or
            the name of one of megatron-core's ``AttnBackend``.
        descriptions: What computes each part and why, for the log.
    """

    implementation: str
    backend: str
    descriptions: Mapping[str, str]

    @property
    def are_transformer_engine(self) -> bool:
        """Whether they are transformer-engine's."""
        return self.implementation == TRANSFORMER_ENGINE

    def weight_gradients(
        self, device: torch.device, dtype: torch.dtype, *, requested: bool
    ) -> tuple[bool, str]:
        """Returns whether weight gradients are added to the gradient buffer, and a description.

        Args:
            device: The device of this process.
            dtype: The dtype of weights and activations.
            requested: ``--gradient-accumulation-fusion``.
        """
        if not self.are_transformer_engine:
            return fuse_weight_gradients(device, dtype, requested=requested)
        if not requested:
            return False, "a product and a sum: --no-gradient-accumulation-fusion"
        # The configuration that says so makes megatron-core ask for Apex on account of its own
        # linear layers. The only one here is the output layer, which computes no product.
        layers._grad_accum_fusion_available = True
        return True, "transformer-engine's, added to the gradient buffer"


def choose_layers(train: TrainConfig, facts: Facts) -> Layers:
    """Chooses the layers' implementation.

    Args:
        train: The run's settings.
        facts: The facts about the machine.

    Raises:
        UserError: What is requested cannot be used.
    """
    reason = _reason_against(train, facts)
    if reason is None:
        return _theirs(facts, train.attention_backend)
    for setting in ("transformer_impl", "attention_backend"):
        if getattr(train, setting) == TRANSFORMER_ENGINE:
            raise UserError(
                f"train.{setting}: transformer_engine cannot be used: {reason}; change that, or "
                "use auto"
            )
    return _ours(facts, train.attention_backend, reason)


def _reason_against(train: TrainConfig, facts: Facts) -> str | None:
    """Returns why a run does not use transformer-engine's layers; None if it does."""
    if train.transformer_impl == LOCAL:
        return "--transformer-impl local"
    if train.attention_backend not in _THEIR_ATTENTION:
        return f"--attention-backend {train.attention_backend} is a part of local layers"
    if train.attention_backend == "flash" and not any("flash_attn" in n for n in facts.installed):
        return "--attention-backend flash needs flash-attn in them, which is not installed"
    if train.transformer_impl == TRANSFORMER_ENGINE:
        reason = unavailable(TRANSFORMER_ENGINE, facts)
    else:
        reason = obstacle(TRANSFORMER_ENGINE, facts)
    return reason or _obstacle_to_window(train.attention_backend, facts)


def _obstacle_to_window(backend: str, facts: Facts) -> str | None:
    """Returns why transformer-engine has no sliding window on this machine; None if it has one.

    Of its kernels for packed documents, flash-attn's have windows. cuDNN's have them since 9.6, on
    GPUs since sm_90, and transformer-engine does not use 9.10.0 and 9.10.1. See
    ``nvte_get_fused_attn_backend`` in its ``fused_attn.cpp``.
    """
    has_flash = any("flash_attn" in name for name in facts.installed) and backend != "cudnn"
    if facts.window is None or facts.capability is None or has_flash:
        return None
    version = facts.cudnn_version
    is_old = version is not None and (version < 90600 or version in (91000, 91001))
    if facts.capability >= (9, 0) and not is_old:
        return None
    major, minor = facts.capability
    found = "" if version is None else f" and cuDNN {version // 10000}.{version // 100 % 100}"
    return (
        "its sliding window for packed documents needs flash-attn, or cuDNN 9.6 (not 9.10.0 or "
        f"9.10.1) on sm_90 or newer; here are sm_{major}{minor}{found}"
    )


def _theirs(facts: Facts, backend: str) -> Layers:
    version = facts.installed[TRANSFORMER_ENGINE]
    attention = "which selects a kernel (NVTE_DEBUG=1 logs it)"
    if _THEIR_ATTENTION[backend] != "auto":
        attention = f"with the kernels of {'flash-attn' if backend == 'flash' else 'cuDNN'}"
    return Layers(
        TRANSFORMER_ENGINE,
        _THEIR_ATTENTION[backend],
        {
            "layers": f"transformer-engine {version}, through megatron-core",
            "attention": f"transformer-engine's, {attention}",
            "norm": "transformer-engine's, fused with the linear layer behind it",
            "rotary embedding": "transformer-engine's, angles once a micro-batch",
            "SwiGLU": _swiglu(facts),
        },
    )


def _ours(facts: Facts, backend: str, reason: str) -> Layers:
    chosen, attention = choose(facts, backend)
    is_fused = facts.capability is None and facts.dtype == torch.bfloat16
    fused = cpu_kernels.description() if is_fused else None
    composed = COMPOSED
    if facts.window is not None and facts.window + QUERY_CHUNK - 1 <= MAX_LENGTH:
        composed = COMPOSED.partition(";")[0]  # no document needs the other kernel
    return Layers(
        LOCAL,
        chosen,
        {
            "layers": f"megatron-core's own linear layers; not transformer-engine's: {reason}",
            "attention": composed if fused else attention,
            "norm": fused or "torch's rms_norm",
            "rotary embedding": fused or "composed in torch, angles once a micro-batch",
            "SwiGLU": fused or _swiglu(facts),
        },
    )


def _swiglu(facts: Facts) -> str:
    if facts.capability is None:
        return "composed in torch"
    return "megatron-core's, fused by torch's compiler"


def check_layers(train: TrainConfig, parallel: ParallelConfig, facts: Facts, layers: str) -> None:
    """Checks that the layers, on this machine, can do what was requested of them.

    Args:
        train: The run's settings.
        parallel: The parallel layout.
        facts: The facts about the machine.
        layers: The implementation of the layers.

    Raises:
        UserError: They cannot.
    """
    recipes = {
        "train.fp8_format": train.fp8_recipe if train.fp8_format else None,
        "train.fp4_format": "nvfp4" if train.fp4_format else None,
    }
    requested = [name for name, recipe in recipes.items() if recipe is not None]
    requested += ["parallel.tp_comm_overlap"] if parallel.tp_comm_overlap else []
    requested += ["train.cuda_graph_impl"] if train.cuda_graph_impl != "none" else []
    offloading = "train.fine_grained_activation_offloading"
    requested += [offloading] if train.fine_grained_activation_offloading else []
    if requested and layers == LOCAL:
        advice = "install it"
        reason = unavailable(TRANSFORMER_ENGINE, facts)
        if reason is None:
            advice = "change that"
            reason = _reason_against(train, facts) or "another implementation is in use"
        raise UserError(
            f"{requested[0]}: needs the layers of transformer-engine, and {reason}; {advice}, or "
            "remove the setting"
        )
    of_gpus = {
        "train.cuda_graph_impl": train.cuda_graph_impl != "none",
        "parallel.use_nccl_ub": parallel.use_nccl_ub,
        offloading: train.fine_grained_activation_offloading,
    }
    for name, is_set in of_gpus.items():
        if is_set and facts.capability is None:
            raise UserError(f"{name}: needs a GPU, and this run is on CPUs; remove the setting")
    for name, recipe in recipes.items():
        if recipe is not None:
            _check_recipe(name, recipe, facts)
    if parallel.tp_comm_overlap and train.fp8_format is not None:
        _check_overlapped_fp8(train, facts)
    if train.fp8_param_gather:
        # A graph replays kernels with the transposed weights of its capture. Since 2.12,
        # transformer-engine updates those in place.
        has_graphs = train.cuda_graph_impl != "none"
        oldest, installed = "2.12" if has_graphs else "2.2", facts.installed[TRANSFORMER_ENGINE]
        if Version(installed) < Version(oldest):
            raise UserError(
                f"train.fp8_param_gather: needs transformer-engine {oldest}"
                f"{' with train.cuda_graph_impl' if has_graphs else ''}, and {installed} is "
                "installed; install a newer version, or remove the setting"
            )
    if train.fine_grained_activation_offloading:
        # Since this version, transformer-engine offloads in another way unless it is told not to,
        # and megatron-core relies on the earlier one.
        is_new = Version(facts.installed[TRANSFORMER_ENGINE]) >= Version("2.10")
        if is_new and os.environ.get("NVTE_CPU_OFFLOAD_V1") != "1":
            raise UserError(
                f"{offloading}: transformer-engine 2.10 and newer would offload weights as well; "
                "set the environment variable NVTE_CPU_OFFLOAD_V1=1"
            )


def _check_overlapped_fp8(train: TrainConfig, facts: Facts) -> None:
    """Checks that user buffers of the installed transformer-engine hold what FP8 needs."""
    installed = facts.installed[TRANSFORMER_ENGINE]
    for is_set, what, oldest in (
        (train.fp8_recipe == "mxfp8", "train.fp8_recipe mxfp8", "2.4"),
        (train.first_last_layers_bf16, "train.first_last_layers_bf16", "2.7"),
    ):
        if is_set and Version(installed) < Version(oldest):
            raise UserError(
                f"parallel.tp_comm_overlap: with {what} it needs transformer-engine {oldest}, and "
                f"{installed} is installed; install a newer version, or remove one of the settings"
            )


def _check_recipe(name: str, recipe: str, facts: Facts) -> None:
    capability, version = _OLDEST[recipe]
    if facts.capability is not None and facts.capability < capability:
        found = ".".join(map(str, facts.capability))
        raise UserError(
            f"{name}: {recipe} needs a GPU of compute capability "
            f"{capability[0]}.{capability[1]}, and this one has {found}; use another recipe, or "
            "bf16"
        )
    installed = facts.installed[TRANSFORMER_ENGINE]
    if Version(installed) < Version(version):
        raise UserError(
            f"{name}: {recipe} needs transformer-engine {version}, and {installed} is "
            "installed; install a newer version, or use another recipe"
        )


def describe_precision(train: TrainConfig) -> str:
    """Returns a description of the precision of the model's products for the log."""
    if not train.bf16:
        return "fp32"
    if train.fp8_format is None and train.fp4_format is None:
        return "bf16"
    if train.fp4_format is not None:
        text = "layers in NVFP4"
    else:
        text = f"layers in FP8 ({train.fp8_format}, {train.fp8_recipe})"
    if train.fp8_param_gather:
        text += ", their matrices stored in FP8"
    if train.first_last_layers_bf16:
        text += (
            f" except the first {train.num_layers_at_start_in_bf16} and the last "
            f"{train.num_layers_at_end_in_bf16}"
        )
    return f"{text}; everything else in bf16"


def start_user_buffers(config: TransformerConfig, num_tokens: int) -> None:
    """Allocates the buffers of transformer-engine's overlapped tensor-parallel collectives.

    Call it on every rank after the parallel groups exist and before the layers are built.

    Args:
        config: megatron-core's configuration.
        num_tokens: Tokens of a micro-batch on the ranks of a tensor-parallel group.

    Raises:
        UserError: transformer-engine cannot set them up on this machine.
    """
    from transformer_engine.pytorch.module import base

    base.destroy_ub()  # those of an earlier run of this process
    options: dict[str, Any] = {"use_fp8": config.fp8 is not None}
    if hasattr(base, "UserBufferQuantizationMode"):  # since transformer-engine 2.7
        kinds = base.UserBufferQuantizationMode
        modes = [kinds.NONE if config.fp8 is None else kinds.FP8]
        if config.fp8 is not None and config.first_last_layers_bf16:
            modes.append(kinds.NONE)
        options = {"quantization_modes": modes}
    try:
        base.initialize_ub(
            shape=[num_tokens, config.hidden_size],
            tp_size=config.tensor_model_parallel_size,
            dtype=config.params_dtype,
            bootstrap_backend=config.tp_comm_bootstrap_backend,
            **options,
        )
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"parallel.tp_comm_overlap: transformer-engine cannot set up its user buffers: "
            f"{reason}; set what it names, or turn the overlap off"
        ) from error


@contextmanager
def without_offloading(config: TransformerConfig) -> Iterator[None]:
    """Lets forward passes without backward passes keep their activations.

    Otherwise megatron-core counts their micro-batches as ones of a training step, and waits for
    their backward passes.
    """
    if not config.fine_grained_activation_offloading:
        yield
        return
    manager = PipelineOffloadManager.get_instance()
    config.fine_grained_activation_offloading = False
    manager.disable_offload()
    try:
        yield
    finally:
        manager.enable_offload()
        config.fine_grained_activation_offloading = True


def block_spec(
    chosen: Layers, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Returns the spec of the layers of a model chunk and of the norm behind them.

    Args:
        chosen: The implementation of the layers.
        config: megatron-core's configuration.
        vp_stage: The chunk's number if this process holds several.
    """
    if chosen.are_transformer_engine:
        layer, norm = _of_transformer_engine(config)
    else:
        layer, norm = _local(chosen.backend, config), RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _of_transformer_engine(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    from megatron_chatflow.model.te_attention import PackedTEAttention

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.submodules.core_attention = PackedTEAttention
    return layer, TENorm


def _local(backend: str, config: TransformerConfig) -> ModuleSpec:
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=PackedCausalAttention, params={"backend": backend}),
            linear_proj=RowParallelLinear,
            **norms,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            # As a class: megatron-core warns of specs, of most classes or, since 0.19, of all.
            mlp=SwiGLUMLP,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints have the names of transformer-engine's layers, as Megatron-LM's have.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
