"""Translates Megatron-LM flags that ChatFlow does not have under the same name.

`TABLE` contains every flag of Megatron-LM's training arguments, from core 0.7 (2024) to August
2026, that is not also a flag of ChatFlow. Each flag is handled in one of three ways:

* *accepted*: it requests the behavior that always applies, or has no effect on the result,
* *mapped*: it is replaced by other flags or settings,
* *refused*: it is an error, and the message names an alternative or the reason.

`translate` applies the table to a command line. `tools/docs_reference.py` generates a page from it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import UserError

PAGE = "docs/coming_from_megatron.md"
DEFAULT_SPLIT = "969,30,1"
"""Megatron-LM's default of --split for --data-path."""


@dataclass(frozen=True)
class Accepted:
    """A flag that requests the behavior that always applies, or that has no effect."""

    reason: str  # why the flag needs no action
    values: tuple[str, ...] | None = None  # the values that are accepted, or None for any value


@dataclass(frozen=True)
class Mapped:
    """A flag that is replaced by other flags or settings."""

    shown: str  # the replacement as text for notes and documentation
    # The replacement as arguments, with ``{}`` for the flag's value. None if the flag needs code of
    # its own in `_apply`.
    arguments: str | None = None


@dataclass(frozen=True)
class Refused:
    """A flag for a feature that is not supported."""

    instead: str  # the alternative, or the reason why there is none


Treatment = Accepted | Mapped | Refused

_ACCEPTED: tuple[tuple[str, str], ...] = (
    # Flags, optionally with the accepted values after `=`, and the reason.
    ("--swiglu", "the MLP is SwiGLU"),
    ("--normalization=RMSNorm", "the norm is RMSNorm"),
    ("--position-embedding-type=rope", "positions are rotary"),
    ("--use-rotary-position-embeddings --no-position-embedding", "positions are rotary"),
    ("--rope-type=rope --rotary-percent=1", "whole heads are rotated"),
    ("--disable-bias-linear", "linear layers have no bias"),
    ("--attention-dropout=0 --hidden-dropout=0", "there is no dropout"),
    ("--group-query-attention", "--num-query-groups enables it"),
    ("--softmax-type=vanilla", "the softmax has no offset"),
    ("--attention-softmax-in-fp32", "softmax is computed in fp32"),
    ("--use-mcore-models --legacy-tokenizer", "the model is megatron-core's"),
    (
        "--use-flash-attn --flash-attention-version",
        "the fastest installed attention is used; see --attention-backend",
    ),
    (
        "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion "
        "--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm "
        "--no-gradient-accumulation-fusion --no-gradient-reduce-div-fusion "
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --fused-residual-rmsnorm "
        "--use-te-activation-func --use-transformer-engine-op-fuser --disable-jit-fuser "
        "--fp16-lm-cross-entropy",
        "no effect: --transformer-impl selects the implementation of the layers",
    ),
    ("--calculate-per-token-loss", "the loss is a mean over the global batch's loss tokens"),
    (
        "--accumulate-allreduce-grads-in-fp32 --main-grads-dtype=fp32 --main-params-dtype=fp32 "
        "--exp-avg-dtype=fp32 --exp-avg-sq-dtype=fp32",
        "gradients, master weights and moments are fp32",
    ),
    (
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
        "no effect: only fp16 scales the loss",
    ),
    ("--fp8-margin=0 --fp8-interval=1", "this is what transformer-engine uses"),
    ("--fp4-recipe=nvfp4", "it is the only recipe of --fp4-format"),
    ("--optimizer=adam", "the optimizer is AdamW"),
    ("--weight-decay-incr-style=constant", "the weight decay is constant"),
    ("--override-opt-param-scheduler --override-opt_param-scheduler", "the configuration decides"),
    (
        "--load-main-params-from-ckpt",
        "master weights are always initialized from the loaded weights at full precision",
    ),
    (
        "--no-load-rng --no-save-rng",
        "no random state is saved: everything random follows from the seed",
    ),
    (
        "--use-cpu-initialization --no-initialization --init-model-with-meta-device",
        "no effect on the weights",
    ),
    (
        "--ckpt-format=torch_dist --dist-ckpt-format=torch_dist",
        "checkpoints always have this format",
    ),
    (
        "--use-dist-ckpt --auto-detect-ckpt-format --ckpt-fully-parallel-save "
        "--no-ckpt-fully-parallel-save --disable-ckpt-fully-parallel-save "
        "--ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo "
        "--ckpt-fully-parallel-load-per-rank-objects --ckpt-fully-parallel-load-process-group "
        "--ckpt-fully-parallel-save-process-group --ckpt-assume-constant-structure "
        "--ckpt-pg-tensors-cache-create --ckpt-pg-tensors-cache-path "
        "--ckpt-drop-redundant-extra-state --use-persistent-ckpt-worker --async-strategy "
        "--async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm "
        "--dist-ckpt-workers --dist-ckpt-strictness --dist-ckpt-optim-fully-reshardable "
        "--distrib-optim-fully-reshardable-mem-efficient --dist-ckpt-save-pre-mcore-014 "
        "--no-ckpt-load-validate-sharding-integrity "
        "--disable-ckpt-load-validate-sharding-integrity "
        "--no-stream-ckpt-dequant --disable-stream-ckpt-dequant --load-model-opt-format "
        "--verify-integrity --log-progress --no-save-tokenizer-assets "
        "--disable-save-tokenizer-assets",
        "no effect: every rank writes its shards, and any layout can load them",
    ),
    (
        "--exit-signal-handler --exit-signal-handler-for-training",
        "on SIGTERM and SIGUSR1, a run always saves and exits",
    ),
    (
        "--exit-signal=SIGTERM|SIGUSR1|SIGINT --exit-signal-handler-for-dataloader",
        "on these signals, a run always saves and exits",
    ),
    (
        "--num-workers --num-dataset-builder-threads --data-cache-path --no-mmap-bin-files "
        "--mid-level-dataset-surplus --dataloader-fast-cache-load "
        "--dataloader-defer-npy-index-mmap --no-data-sharding --allow-ambiguous-pad-tokens",
        "no effect: samples are read from the mapped files, without an index",
    ),
    ("--dataloader-type=single|cyclic", "no effect: each epoch of a source has its own order"),
    ("--no-create-attention-mask-in-dataloader", "no attention mask is created"),
    ("--multiple-validation-sets", "every source is validated separately"),
    ("--renormalize-blend-weights", "weights are normalized"),
    ("--distributed-backend=nccl", "NCCL on GPUs, gloo on CPUs"),
    ("--local-rank --local_rank", "torchrun sets it in the environment"),
    (
        "--no-async-tensor-model-parallel-allreduce "
        "--disable-async-tensor-model-parallel-allreduce "
        "--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush "
        "--no-scatter-gather-tensors-in-pipeline --no-delay-grad-reduce --delay-param-gather "
        "--no-align-grad-reduce --disable-align-grad-reduce --no-align-param-gather "
        "--overlap-param-gather-with-optimizer-step --ddp-bucket-size --ddp-num-buckets "
        "--ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw "
        "--no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding "
        "--defer-embedding-wgrad-compute --wgrad-deferral-limit --delay-wgrad-compute "
        "--pipeline-model-parallel-comm-backend=nccl --high-priority-stream-groups "
        "--disable-gloo-process-groups --distributed-timeout-seconds-after-init "
        "--suggested-communication-unit-size --no-use-layer-wise-param-layout --use-nccl-ub "
        "--disable-symmetric-registration --create-all-gather-group --use-sharp "
        "--sharp-enabled-group --symmetric-ar-type --optimizer-cuda-graph --train-sync-interval "
        "--empty-unused-memory-level --no-manual-gc-eval --disable-manual-gc-eval "
        "--disable-bf16-reduced-precision-matmul --te-rng-tracker --onnx-safe --lazy-mpu-init "
        "--use-tp-pp-dp-mapping --cp-comm-type "
        "--microbatch-group-size-per-virtual-pipeline-stage",
        "no effect on the result: communication and memory use fixed settings",
    ),
    ("--tp-comm-*", "no effect on the result: --tp-comm-overlap uses the library's defaults"),
    ("--no-tp-comm-* --disable-tp-comm-*", "no effect on the result"),
    ("--expert-model-parallel-size=1 --expert-tensor-parallel-size=1", "there are no experts"),
    ("--num-distributed-optimizer-instances=1", "there is only one instance"),
    (
        "--encoder-tensor-model-parallel-size=0 --encoder-pipeline-model-parallel-size=0",
        "there is no encoder",
    ),
    ("--vocab-extra-ids=0", "the tokenizer defines all ids"),
    ("--manual-gc", "--manual-gc-interval enables it"),
    (
        "--recompute-modules=core_attn",
        "selective recomputation always recomputes the attention core",
    ),
    ("--rerun-mode=disabled", "steps are not rerun"),
    ("--log-throughput", "every log line includes the throughput"),
    (
        "--log-params-norm --log-num-zeros-in-grad --log-max-attention-logit --log-energy "
        "--log-memory-interval --log-device-memory-used --log-memory-to-tensorboard "
        "--log-timers-to-tensorboard --log-batch-size-to-tensorboard "
        "--log-world-size-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--no-log-loss-scale-to-tensorboard --disable-log-loss-scale-to-tensorboard "
        "--no-log-learnig-rate-to-tensorboard --timing-log-level --timing-log-option "
        "--no-barrier-with-level-1-timing --tensorboard-log-interval --tensorboard-queue-size "
        "--logging-level --config-logger-dir --dump-param-to-param-group-map",
        "no effect: the recorded metrics are fixed",
    ),
    (
        "--straggler-ctrlr-port --disable-straggler-on-startup --nvtx-ranges --record-shapes "
        "--pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra "
        "--pytorch-profiler-collect-shapes",
        "no effect: --log-straggler and --profile have no such option",
    ),
    (
        "--one-logger-* --enable-one-logger --no-one-logger --app-tag-run-name "
        "--app-tag-run-version --otel-* --run-workload-inspector-server --calc-ft-timeouts "
        "--ft-num-warmup-iters",
        "no effect: these services are not used",
    ),
    ("--enable-experimental --disable-msc --no-pin-cpu-grads --no-pin-cpu-params", "no effect"),
)

_MAPPED: tuple[tuple[str, str, str | None], ...] = (
    # Flag, `Mapped.shown` ("" to show the arguments) and `Mapped.arguments`.
    ("--recompute-activations", "", "--recompute-granularity selective"),
    (
        "--checkpoint-activations",
        "",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    (
        "--tensorboard-dir",
        "`--tensorboard`; the files are in `tensorboard/` in the folder of --save",
        None,
    ),
    (
        "--reset-position-ids",
        "`boundaries: isolate` of every source: positions and attention stay within a document",
        None,
    ),
    ("--reset-attention-mask", "`boundaries: isolate` of every source", None),
    ("--dataloader-inter-document-masking", "`boundaries: isolate` of every source", None),
    (
        "--eod-mask-loss",
        "`boundaries: isolate` of every source: no loss on the first token of the next document",
        None,
    ),
    (
        "--data-path",
        "sources with constant weights, which replace those of the YAML file; `--split "
        "969,30,1` unless documents are held out in another way",
        None,
    ),
    ("--data-args-path", "--data-path with the arguments in the file", None),
    ("--train-data-path", "sources with constant weights and no split", None),
    ("--valid-data-path", "`validation_paths` of the sources of --train-data-path", None),
    (
        "--lr-warmup-fraction",
        "--lr-warmup-iters or --lr-warmup-samples, as this fraction of the decay's length",
        None,
    ),
    ("--encoder-num-layers", "", "--num-layers {}"),
    ("--decoder-num-layers", "", "--num-layers {}"),
    ("--encoder-seq-length", "", "--seq-length {}"),
    ("--decoder-seq-length", "", "--seq-length {}"),
    ("--batch-size", "", "--micro-batch-size {}"),
    ("--model-parallel-size", "", "--tensor-model-parallel-size {}"),
    (
        "--rotary-seq-len-interpolation-factor",
        "",
        "--rope-scaling-type linear --rope-scaling-factor {}",
    ),
    (
        "--use-rope-scaling",
        "",
        "--rope-scaling-type llama3 --rope-scaling-factor 8 "
        "--rope-original-max-position-embeddings 8192",
    ),
    ("--save-retain-interval", "", "--save-keep-every {} --save-retain 1"),
    ("--padded-vocab-size", "", "--vocab-size {}"),
)

_NOT_LLAMA = "only LLaMA models are supported"
_REFUSED: tuple[tuple[str, str], ...] = (
    ("--test-data-path", "tools/evaluate.py, to evaluate checkpoints on unseen text"),
    (
        "--per-split-data-args-path",
        "set `paths` and `validation_paths` of each source in the YAML file",
    ),
    ("--mock-data", "tools/benchmark.py train, which needs no data"),
    ("--fim-*", "fill-in-the-middle is not supported; transform the text before preprocessing"),
    ("--sft", "preprocess with --format chat and set `loss: response` of the source"),
    ("--sft-tokenizer-prompt-format", "--chat-template of tools/preprocess_data.py"),
    ("--chat-template", "--chat-template of tools/preprocess_data.py"),
    ("--dataloader-type", "external data loaders are not supported"),
    ("--hybrid-context-parallel --max-seqlen-per-dp-cp-rank", "--context-parallel-size"),
    (
        "--per-dataset-sequences-path --object-storage-cache-path --s3-cache-path",
        "only local files are supported",
    ),
    ("--enable-msc", "only local files and mounted file systems are supported"),
    ("--vocab-file", "--tokenizer-model with the folder's tokenizer.json or tokenizer.model"),
    ("--merge-file", "--tokenizer-model with the folder's tokenizer.json"),
    ("--tiktoken-*", "convert the tokenizer to a tokenizer.json for --tokenizer-model"),
    (
        "--tokenizer-metadata --tokenizer-special-tokens --tokenizer-hf-* "
        "--tokenizer-sentencepiece-* --no-tokenizer-* --disable-tokenizer-* --trust-remote-code "
        "--use-gigatoken",
        "--tokenizer-model: the tokenizer's files define these settings",
    ),
    ("--no-use-tokenizer-model-from-checkpoint-args", "--tokenizer-model is always required"),
    ("--disable-use-tokenizer-model-from-checkpoint-args", "--tokenizer-model is always required"),
    ("--null-tokenizer-*", "--tokenizer-model"),
    ("--no-pad-vocab-size --disable-pad-vocab-size", "--make-vocab-size-divisible-by 1"),
    ("--vocab-extra-ids", "tools/extend_vocab.py"),
    ("--fp16", "--bf16, or --no-bf16 for fp32"),
    ("--fp32-residual-connection", "--no-bf16 computes everything in fp32"),
    (
        "--fp8-param-gather --fp4-param-gather --keep-fp8-* --reuse-grad-buf-for-mxfp8-param-ag",
        "--fp8-format: weights are stored in bf16",
    ),
    (
        "--fp8-* --no-fp8-* --disable-fp8-* --fp4-* --te-precision-config-file",
        "--fp8-format and --fp8-recipe",
    ),
    (
        "--use-precision-aware-optimizer",
        "moments are fp32; --use-distributed-optimizer shards them",
    ),
    (
        "--main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype",
        "these types are always fp32",
    ),
    ("--megatron-fsdp-*", "--use-distributed-optimizer"),
    (
        "--use-megatron-fsdp --use-torch-fsdp2 --use-custom-fsdp --fsdp-* --torch-fsdp2-* "
        "--data-parallel-sharding-strategy --outer-dp-sharding-strategy "
        "--enable-full-sharding-in-hsdp --no-strict-fsdp-dtensor-load "
        "--disable-strict-fsdp-dtensor-load --num-distributed-optimizer-instances "
        "--ddp-param-name-patterns-for-fp32-local-accumulation "
        "--ddp-reduce-scatter-with-fp32-accumulation",
        "--use-distributed-optimizer",
    ),
    (
        "--optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d "
        "--use-torch-optimizer-for-cpu-offload --cpu-offloading-* "
        "--fine-grained-activation-offloading --fine-grained-offloading-* --offload-modules "
        "--activation-offload-fraction --delay-offload-until-cuda-graph "
        "--delta-offload-bytes-across-pp-ranks --min-offloaded-tensor-size",
        "more GPUs, --use-distributed-optimizer or --recompute-granularity full",
    ),
    ("--distribute-saved-activations", "--sequence-parallel"),
    ("--recompute-modules", "--recompute-granularity full"),
    ("--optimizer", "AdamW is the only optimizer"),
    ("--muon-* --lion-* --sgd-momentum", "AdamW is the only optimizer"),
    (
        "--decoupled-lr --decoupled-min-lr --head-lr-mult",
        "--lr: all weights have the same learning rate",
    ),
    ("--lr-wsd-*", "--lr-decay-style cosine, linear or constant"),
    ("--warmup", "--lr-warmup-iters"),
    ("--start-weight-decay --end-weight-decay --weight-decay-incr-style", "--weight-decay"),
    ("--no-weight-decay-cond-type --apply-wd-to-qk-layernorm", "--weight-decay"),
    ("--use-checkpoint-opt-param-scheduler", "a resume uses the configuration's values"),
    ("--use-checkpoint-opt_param-scheduler", "a resume uses the configuration's values"),
    ("--rampup-batch-size", "change --global-batch-size when you resume"),
    ("--step-batch-size-schedule", "change --global-batch-size when you resume"),
    (
        "--decrease-batch-size-if-needed",
        "a --global-batch-size that is divisible by the number of data-parallel ranks",
    ),
    ("--iterations-to-skip --phase-transition-iterations", "--on-nan skip, or edit the schedule"),
    ("--skip-train", "tools/evaluate.py"),
    ("--full-validation", "a large --eval-iters: a validation ends after the last held-out sample"),
    ("--eval-global-batch-size --eval-micro-batch-size", "--eval-iters"),
    ("--start-eval-at-iter --validation-set-names --test-mode", "--eval-interval"),
    ("--ckpt-step --override-ckpt-iteration", "--load RUN/iter_0000100"),
    (
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args",
        "--load-hf takes the model's sizes from the folder's config.json",
    ),
    ("--exit-on-missing-checkpoint", "--pretrained-checkpoint, which must exist"),
    ("--no-save-optim", "tools/convert_checkpoint.py export writes only the weights"),
    ("--ckpt-convert-*", "tools/convert_checkpoint.py"),
    ("--ckpt-format --dist-ckpt-format", "tools/convert_checkpoint.py reads other formats"),
    ("--non-persistent-* --persistent-save-interval", "--save-interval"),
    ("--replication --replication-*", "--save on a file system that every node sees"),
    ("--adlr-*", "--exit-duration-in-mins, or SIGTERM"),
    ("--exit-signal", "SIGTERM or SIGUSR1"),
    ("--inprocess-*", "torchrun --max-restarts"),
    ("--enable-ft-package", "ft_launcher in place of torchrun"),
    ("--no-check-for-nan-in-loss-and-grad", "--on-nan stop, skip or rollback"),
    ("--check-for-spiky-loss --check-for-large-grads", "--loss-spike-factor with --on-nan"),
    ("--rerun-mode --error-injection-*", "--on-nan, and --ckpt-verify for files"),
    (
        "--gpu-sniff-test-interval --check-weight-hash-across-dp-replicas-interval",
        "--log-straggler",
    ),
    (
        "--flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*",
        "torch's own variables such as TORCH_NCCL_TRACE_BUFFER_SIZE; --hang-timeout-minutes",
    ),
    ("--record-memory-history --memory-snapshot-path", "--profile --use-pytorch-profiler"),
    (
        "--save-activations-interval --save-dgrads-interval --save-params-interval "
        "--save-tokens-per-expert-interval --save-wgrads-interval",
        "--profile",
    ),
    ("--yaml-cfg", "--config"),
    ("--spec --kitchen-* --use-kitchen-attention", _NOT_LLAMA),
    (
        "--normalization --position-embedding-type --rope-type --rotary-percent "
        "--attention-dropout --hidden-dropout --softmax-type",
        _NOT_LLAMA,
    ),
    (
        "--openai-gelu --squared-relu --quick-geglu --glu-linear-offset "
        "--activation-func-clamp-value --use-fused-weighted-squared-relu --add-qkv-bias "
        "--apply-layernorm-1p --apply-query-key-layer-scaling "
        "--apply-residual-connection-post-layernorm --attention-output-gate --qk-layernorm "
        "--qk-l2-norm --qk-clip* --rotary-interleaved --rotary-scaling-factor --no-rope-freq "
        "--yarn-* --no-yarn-* --mrope-section --mscale* --relative-attention-* --window-size "
        "--window-attn-skip-freq --embedding-init-method-std --init-method-xavier-uniform "
        "--output-logit-dtype --bert-no-binary-head",
        _NOT_LLAMA,
    ),
    ("--data-parallel-random-init", "--seed"),
    ("--moe-* --num-experts --expert-* --overlap-moe-* --overlap-dispatch-*", _NOT_LLAMA),
    ("--ep-overlap-* --use-grouped-gemm-* --high-priority-a2a-comm-stream", _NOT_LLAMA),
    (
        "--multi-latent-attention --mla-* --cache-mla-latents --q-lora-rank --kv-lora-rank "
        "--qk-head-dim --qk-pos-emb-head-dim --v-head-dim --dsa-* --no-dsa-* --disable-dsa-* "
        "--experimental-attention-variant --linear-* --gdp-*",
        _NOT_LLAMA,
    ),
    ("--mtp-* --mup-* --use-mup --mhc-* --enable-mhc-connections", _NOT_LLAMA),
    ("--mamba-* --disable-mamba-* --is-hybrid-model --hybrid-*", _NOT_LLAMA),
    ("--heterogeneous-*", _NOT_LLAMA),
    ("--use-legacy-models", "the model is megatron-core's"),
    ("--retro-* --retriever-* --ict-* --biencoder-* --bert-* --indexer-*", _NOT_LLAMA),
    (
        "--block-data-path --embedding-path --evidence-data-path --titles-data-path "
        "--query-in-block-prob --use-one-sent-docs --short-seq-prob --mask-* --sample-rate "
        "--output-bert-embeddings --result-rejected-tracker-filename",
        _NOT_LLAMA,
    ),
    (
        "--vision-* --dino-* --swin-* --img-* --num-channels --num-classes --patch-dim "
        "--classes-fraction --data-per-class-fraction --iter-per-epoch --freeze-all-layers",
        _NOT_LLAMA,
    ),
    (
        "--rl-* --grpo-* --langrl-* --perform-rl-step --refit-method",
        "reinforcement learning is not supported",
    ),
    ("--use-same-sampling-seed-across-dp-ranks", "reinforcement learning is not supported"),
    ("--logits-*", "distillation is not supported"),
    (
        "--inference-* --flash-decode --enable-chunked-prefill --disable-chunked-prefill "
        "--decode-only-cuda-graphs --num-speculative-tokens --max-tokens-to-oom "
        "--mlp-chunks-for-* --nccl-all-reduce-for-prefill --use-legacy-static-engine "
        "--batch-invariant-*",
        "tools/generate.py, or export to Hugging Face and serve with vLLM",
    ),
    ("--cuda-graph-* --enable-cuda-graph --external-cuda-graph", "CUDA graphs are not supported"),
    (
        "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
        "--account-for-* --standalone-embedding-stage --pipeline-model-parallel-split-rank "
        "--pipeline-model-parallel-layout --encoder-tensor-model-parallel-size "
        "--encoder-pipeline-model-parallel-size",
        "--pipeline-model-parallel-size: all stages have the same number of layers",
    ),
    ("--pipeline-model-parallel-comm-backend --distributed-backend", "NCCL on GPUs, gloo on CPUs"),
    ("--use-ring-exchange-p2p --nccl-communicator-config-path", "NCCL's environment variables"),
    ("--hierarchical-context-parallel-sizes", "--context-parallel-size"),
    ("--tensor-parallel-num-weight-shards --gtp-*", "--tensor-model-parallel-size"),
    ("--fake-process-group", "--dry-run --world-size"),
)

# Replacements for values of flags that exist in both Megatron-LM and ChatFlow.
VALUES: dict[tuple[str, str], str] = {
    ("--tokenizer-type", "GPTSentencePieceTokenizer"): "Llama2Tokenizer",
    ("--attention-backend", "fused"): "cudnn",
    ("--attention-backend", "unfused"): "sdpa",
    ("--attention-backend", "local"): "sdpa",
}

# Megatron-LM's defaults of flags that exist in both but have another default in ChatFlow.
DEFAULTS: dict[str, str] = {
    "--adam-beta2": "0.999",
    "--async-save": "off",
    "--bf16": "off (fp32)",
    "--distributed-timeout-minutes": "10",
    "--eval-iters": "100",
    "--fp8-recipe": "delayed",
    "--log-interval": "100",
    "--lr-decay-style": "linear",
    "--tokenizer-type": "none",
    "--transformer-impl": "transformer_engine",
    "--untie-embeddings-and-output-weights": "off (tied)",
    "--weight-decay": "0.01",
}


def _build_table() -> dict[str, list[Treatment]]:
    """Builds the table of treatments by flag. A name that ends with ``*`` is a prefix of flags."""
    table: dict[str, list[Treatment]] = {}
    for flags, reason in _ACCEPTED:
        for entry in flags.split():
            name, _, values = entry.partition("=")
            given = tuple(values.split("|")) if values else None
            table.setdefault(name, []).append(Accepted(reason, given))
    for name, shown, arguments in _MAPPED:
        text = shown or f"`{(arguments or '').replace('{}', 'VALUE')}`"
        table.setdefault(name, []).append(Mapped(text, arguments))
    for flags, instead in _REFUSED:
        for name in flags.split():
            table.setdefault(name, []).append(Refused(instead))
    return table


TABLE = _build_table()


def treatments(flag: str) -> list[Treatment]:
    """Returns the treatments of a flag in order of precedence, or an empty list if it is unknown.

    The first treatment that fits the flag's values applies.
    """
    if flag in TABLE:
        return TABLE[flag]
    families = [name for name in TABLE if name.endswith("*") and flag.startswith(name[:-1])]
    return TABLE[max(families, key=len)] if families else []


@dataclass
class Translation:
    """A translated command line."""

    arguments: list[str] = field(default_factory=list)  # the arguments for ChatFlow's own parser
    # values by section and field that were set by flags without an equivalent flag
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    # one line for each Megatron-LM flag that was accepted or mapped
    notes: list[str] = field(default_factory=list)
    # flags that exist in neither Megatron-LM nor ChatFlow
    unknown: list[str] = field(default_factory=list)
    # Megatron-LM flags that are not supported, and what to use instead
    refused: list[tuple[str, str]] = field(default_factory=list)


def translate(arguments: Sequence[str], known: Collection[str]) -> Translation:
    """Replaces Megatron-LM flags in a command line.

    Args:
        arguments: The command line.
        known: ChatFlow's own flags. They are kept; only values in `VALUES` are replaced.

    Raises:
        UserError: If the value of a mapped flag is invalid.
    """
    result = Translation()
    mapped: list[str] = []
    blends: dict[str, list[str]] = {}
    for words in _groups(arguments):
        flag, values = _parse_group(words)
        if not flag or flag in known:
            own = [VALUES.get((flag, value), value) for value in values]
            result.notes += [
                f"{flag} {value}: {new}"
                for value, new in zip(values, own, strict=True)
                if value != new
            ]
            result.arguments += words if own == values else [flag, *own]
            continue
        found = _fitting(flag, values)
        match found:
            case None:
                result.unknown.append(flag)
            case Accepted(reason):
                result.notes.append(f"{' '.join([flag, *values])}: {reason}")
            case Mapped(shown, None):
                result.notes.append(f"{flag}: {shown}")
                _apply(flag, values, result, blends)
            case Mapped(shown, template):
                assert template is not None
                if ("{}" in template) != (len(values) == 1):
                    needed = "one value" if "{}" in template else "no value"
                    raise UserError(f"{flag}: takes {needed}, not {len(values)}; see {PAGE}")
                mapped += template.replace("{}", "".join(values)).split()
                result.notes.append(f"{flag}: {shown}")
            case Refused(instead):
                result.refused.append((" ".join([flag, *values[:1]]), instead))
    # ChatFlow's own flags come last, so they override the replacements of Megatron-LM flags.
    result.arguments = [*mapped, *result.arguments]
    _set_blend(blends, result)
    return result


def _groups(arguments: Iterable[str]) -> Iterator[list[str]]:
    """Yields each flag with its values. Values before the first flag form a group of their own."""
    words: list[str] = []
    for word in arguments:
        if words and (word.startswith("--") or word == "-h"):
            yield words
            words = []
        words.append(word)
    if words:
        yield words


def _parse_group(words: list[str]) -> tuple[str, list[str]]:
    """Splits a group into its flag ("" if there is none) and its values, also after ``=``."""
    if not words[0].startswith("--"):
        return "", words
    flag, is_joined, value = words[0].partition("=")
    return flag, [value, *words[1:]] if is_joined else words[1:]


def _fitting(flag: str, values: Sequence[str]) -> Treatment | None:
    found = treatments(flag)
    for one in found:
        if not isinstance(one, Accepted) or one.values is None:
            return one
        if len(values) == 1 and any(_same(values[0], value) for value in one.values):
            return one
    if not found:
        return None
    allowed = [value for one in found if isinstance(one, Accepted) for value in one.values or ()]
    return Refused(f"only {' or '.join(allowed)}")


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _apply(flag: str, values: list[str], result: Translation, blends: dict[str, list[str]]) -> None:
    """Applies a mapped flag that cannot be expressed as arguments."""
    match flag:
        case "--tensorboard-dir":
            result.arguments.append("--tensorboard")
        case "--lr-warmup-fraction":
            result.values.setdefault("optimizer", {})["lr_warmup_fraction"] = _fraction(values)
        case "--data-args-path":
            if len(values) != 1:
                raise UserError("--data-args-path: takes one file")
            try:
                blends["--data-path"] = Path(values[0]).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--data-args-path: {values[0]}: {error}") from None
        case "--data-path" | "--train-data-path" | "--valid-data-path":
            blends[flag] = values
        case _:
            result.values.setdefault("data", {})["boundaries"] = "isolate"


def _fraction(values: Sequence[str]) -> float:
    try:
        (fraction,) = map(float, values)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise UserError(f"--lr-warmup-fraction: must be one number from 0 to 1, not {values}")
    return fraction


def read_blend(flag: str, words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Parses a Megatron-LM blend: ``0.7 a 0.3 b``, or ``a b`` without weights.

    Args:
        flag: The flag's name, for messages.
        words: The values of the flag.

    Returns:
        The dataset prefixes, and their weights or None.

    Raises:
        UserError: If the words have neither form, or the weights are invalid.
    """
    numbers = [_number(word) for word in words]
    prefixes, weights = list(words[1::2]), numbers[0::2]
    if len(words) % 2 == 0 and words and None not in weights:
        if not any(number is not None for number in numbers[1::2]):
            given = [weight for weight in weights if weight is not None]
            if min(given) < 0 or not sum(given) > 0 or sum(given) == float("inf"):
                raise UserError(f"{flag}: weights must be 0 or more, and one of them above 0")
            return prefixes, given
    if words and all(number is None for number in numbers):
        return list(words), None
    raise UserError(
        f"{flag}: give prefixes of datasets, or a weight before each: {flag} 0.7 data/en_document "
        "0.3 data/zh_document"
    )


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return None if number != number else number


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Derives a unique source name from each dataset prefix, without the preprocessing suffixes."""
    names: list[str] = []
    for prefix in prefixes:
        stem = re.sub(r"(_(text|content|messages))?_(document|sentence)$", "", Path(prefix).name)
        name, number = stem or "data", 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def _set_blend(blends: Mapping[str, list[str]], result: Translation) -> None:
    """Sets the sources and a constant schedule from --data-path or --train-data-path."""
    flag = next((name for name in ("--data-path", "--train-data-path") if name in blends), None)
    if flag is None:
        if blends:
            raise UserError("--valid-data-path: needs --train-data-path")
        return
    if "--data-path" in blends and len(blends) > 1:
        raise UserError(
            "--data-path: applies to all splits; remove --train-data-path and --valid-data-path"
        )
    prefixes, weights = read_blend(flag, blends[flag])
    sources: dict[str, dict[str, Any]]
    if weights is None:  # one source of all datasets, so each epoch contains each sample once
        name = source_names(prefixes)[0] if len(prefixes) == 1 else "data"
        sources, shares = {name: {"paths": prefixes}}, {name: 1.0}
    else:
        names = source_names(prefixes)
        sources = {name: {"paths": [path]} for name, path in zip(names, prefixes, strict=True)}
        shares = dict(zip(names, weights, strict=True))
    if "--valid-data-path" in blends:
        _set_validation(sources, read_blend("--valid-data-path", blends["--valid-data-path"])[0])
    data = result.values.setdefault("data", {})
    data["sources"] = sources
    data["schedule"] = {"knots": [{"at": 0, "weights": shares}]}
    if flag == "--data-path":
        data["default_split"] = DEFAULT_SPLIT


def _set_validation(sources: Mapping[str, dict[str, Any]], paths: list[str]) -> None:
    if len(sources) == 1:
        next(iter(sources.values()))["validation_paths"] = paths
        return
    if len(paths) != len(sources):
        raise UserError(
            f"--valid-data-path: {len(paths)} datasets for {len(sources)} of --train-data-path; "
            "give one for each, or name validation_paths in the YAML file"
        )
    for source, path in zip(sources.values(), paths, strict=True):
        source["validation_paths"] = [path]
