"""Tests the precedence of defaults, YAML and flags, and the command line of a run."""

from pathlib import Path

import pytest
import yaml

from megatron_chatflow.config import load_config, load_config_from_argv
from megatron_chatflow.config.flags import FLAGS, build_parser
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.errors import UserError


@pytest.fixture
def path(tmp_path, values):
    """Writes a configuration file."""
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(values({"train.seed": 7, "train.eval_interval": 10})))
    return file


def test_flags_over_yaml_over_defaults(path) -> None:
    run = load_config(path, ["--seed", "8", "--tensor-model-parallel-size=2", "--no-bf16"])
    assert run.train.seed == 8
    assert run.parallel.tensor_model_parallel_size == 2
    assert run.train.bf16 is False
    assert run.train.eval_interval == 10
    assert run.optimizer.weight_decay == 0.1


@pytest.mark.parametrize(
    ("flags", "section", "field", "value"),
    [
        (["--train-iters", "2K"], "train", "train_iters", 2000),
        (["--train-iters", "2_000"], "train", "train_iters", 2000),
        (["--train-iters", "1e3"], "train", "train_iters", 1000),
        (["--lr", "1e-3"], "optimizer", "lr", 1e-3),
        (["--lr", "1"], "optimizer", "lr", 1.0),
        (["--eval-interval", "none"], "train", "eval_interval", None),
        (["--tensor-model-parallel-size", "2", "--sequence-parallel"],)
        + ("parallel", "sequence_parallel", True),
        (["--lr-decay-style", "linear"], "optimizer", "lr_decay_style", "linear"),
        (["--window-size", "127,0"], "model", "window_size", (127, 0)),
        (["--window-size", "127", "0"], "model", "window_size", (127, 0)),
        (["--window-size", "127,0", "--window-size", "none"], "model", "window_size", None),
        (["--hidden-size", "512"], "model", "hidden_size", 512),
        (["--train-iters", "5", "--train-iters", "6"], "train", "train_iters", 6),
    ],
)
def test_flag_values(path, flags, section, field, value) -> None:
    assert getattr(getattr(load_config(path, flags), section), field) == value


def test_a_flag_for_what_is_held_out_replaces_the_files_other_spelling(path) -> None:
    path.write_text(path.read_text().replace("data:\n", "data:\n  holdout_every: 10\n"))
    run = load_config(path, ["--split", "9,1"])
    assert (run.data.split, run.data.holdout_every) == ("9,1", None)
    with pytest.raises(UserError, match=r"data.split and data.holdout_every: both are set"):
        load_config(path, ["--split", "9,1", "--holdout-every", "5"])
    with pytest.raises(UserError, match=r"data.split: must be shares of training, validation"):
        load_config(path, ["--split", "9;1"])


def test_a_flag_for_the_length_replaces_the_files_other_spelling(path) -> None:
    run = load_config(path, ["--train-samples", "1.6K"])
    assert run.train.train_iters is None
    assert run.num_iterations == 200
    with pytest.raises(UserError, match="both are set"):
        load_config(path, ["--train-samples", "80", "--train-iters", "10"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-iter", "3"], "--train-iter: unknown flag (did you mean --train-iters?)"),
        (["--zzzzzzz"], "--zzzzzzz: unknown flag; see --help"),
        (["stray"], "stray: unexpected value without a flag"),
        (["--lr"], "argument --lr: expected one argument; see --help"),
        (["--no-bf16=3"], "argument --bf16/--no-bf16: ignored explicit argument '3'"),
        (["--seed", "x"], "train.seed: must be a whole number, not 'x'"),
        (["--seed", "3.0"], "train.seed: must be a whole number, not '3.0'"),
        (["--seed", "none"], "train.seed: must be a whole number, not 'none'"),
        (["--lr", "nan"], "optimizer.lr: must be above 0, not nan"),
        (["--train-iters", "many"], "train.train_iters: must be a count such as"),
        (["--recompute-granularity", "some"], "train.recompute_granularity: must be 'full' or"),
        (["--window-size", "128"], "model.window_size: must be two numbers such as 4095,0"),
        (["--window-size", "4K,0"], "model.window_size: must be two numbers such as 4095,0"),
        (["--preset", "tinny"], "model.preset: there is no 'tinny' (did you mean tiny?)"),
        (["--save", ""], "checkpoint.save: must be a path"),
        (["--tensor-model-parallel-size", "3"], "parallel.tensor_model_parallel_size: 3 does not"),
        (["--config", "other.yaml"], "--config: unknown flag"),
    ],
)
def test_wrong_flags(path, flags, message) -> None:
    with pytest.raises(UserError) as caught:
        load_config(path, flags)
    assert str(caught.value).startswith(message)


def test_a_section_that_is_no_mapping_is_refused_under_flags_too(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: 3\n")
    for flags in (["--seed", "1"], ["--train-iters", "1"]):
        with pytest.raises(UserError, match="train: must be a mapping"):
            load_config(file, flags)


def test_an_empty_section_counts_as_left_out(path) -> None:
    path.write_text(path.read_text() + "logging:\n")
    assert load_config(path, ["--log-interval", "5"]).logging.log_interval == 5


def test_options_of_a_call(path) -> None:
    run, options = load_config_from_argv(
        ["--config", str(path), "--dry-run", "--world-size", "8", "--seed", "9", "--verbose"]
    )
    assert (options.config, options.dry_run, options.world_size) == (path, True, 8)
    assert options.verbose
    assert run.train.seed == 9
    _, options = load_config_from_argv(["--config", str(path)])
    assert (options.dry_run, options.world_size) == (False, None)
    assert (options.simulate, options.gpu, options.rank) == (False, "h100", "stages")
    _, options = load_config_from_argv(
        f"--config {path} --dry-run --simulate --gpu b200 --rank 3 --output r.json".split()
    )
    assert (options.gpu, options.rank, options.output) == ("b200", "3", Path("r.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: is missing"),
        (["--config", "none.yaml"], "none.yaml: no such configuration file"),
        (["--config", "c", "--world-size", "0"], "--world-size: must be at least 1, not 0"),
        (["--config", "c", "--world-size", "x"], "argument --world-size: invalid int value: 'x'"),
        (["--config", "c", "--simulate"], "--simulate: needs --dry-run"),
        (["--config", "c", "--dry-run", "--gpu", "h100"], "--gpu: needs --dry-run --simulate"),
        (["--config", "c", "--output", "r"], "--output: needs --dry-run --simulate"),
    ],
)
def test_wrong_options(arguments, message) -> None:
    with pytest.raises(UserError) as caught:
        load_config_from_argv(arguments)
    assert str(caught.value).startswith(message)


def test_help_names_every_flag_and_gives_examples(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        load_config_from_argv(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert all(flag.name in text for flag in FLAGS)
    assert all(flag.help for flag in FLAGS)


def test_what_was_resolved_can_be_loaded_again(path, tmp_path) -> None:
    run = load_config(path, ["--lr", "1e-4"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(run.to_yaml())
    assert load_config(resolved) == run


@pytest.mark.parametrize("flags", [[], ["--fused-kernels", "ours"]])
def test_removed_settings_are_reported_and_have_no_effect(path, tmp_path, flags) -> None:
    values = yaml.safe_load(path.read_text())
    if not flags:
        values["train"]["fused_kernels"] = "ours"
    older = tmp_path / "older.yaml"
    older.write_text(yaml.safe_dump(values))
    config, options = load_config_from_argv(["--config", str(older), *flags])
    assert config == load_config(path)
    assert options.removed == ("train.fused_kernels",)
    assert load_config(older, flags) == config


# Scripts rely on these flags: a change here is a change of the interface.
FROZEN_FLAGS = """
--adam-beta1 --adam-beta2 --adam-eps --add-qkv-bias --async-save --attention-backend --bf16
--choice-interval --choice-language --choice-num-fewshot --choice-questions --choice-scoring
--ckpt-verify --clip-grad --config --context-parallel-size --cuda-graph-impl --cuda-graph-scope
--cuda-graph-warmup-steps --data-retry-seconds --data-verify --ddp-pad-buckets-for-high-nccl-busbw
--decoupled-lr --decoupled-min-lr --deterministic-mode --disable-symmetric-registration
--distributed-timeout-minutes --dry-run --ema-decay --embedding-init --end-weight-decay
--eval-interval --eval-iters --eval-probes --exit-duration-in-mins --exit-interval --exp-avg-dtype
--exp-avg-sq-dtype --ffn-hidden-size --fine-grained-activation-offloading --finetune
--first-last-layers-bf16 --fp4-format --fp8-amax-compute-algo --fp8-amax-history-len --fp8-format
--fp8-param-gather --fp8-recipe --from-scratch --fused-kernels --global-batch-size --gpu
--grad-norm-limit --grad-reduce-in-bf16 --gradient-accumulation-fusion --hang-timeout-minutes --help
--hidden-size --holdout-every --init-method-std --kv-channels --load --load-hf --load-optim
--log-interval --log-layer-norms --log-params-norm --log-straggler --loss-spike-factor
--loss-spike-window --lr --lr-cycle-start-iters --lr-cycle-start-samples --lr-decay-iters
--lr-decay-samples --lr-decay-style --lr-warmup-init --lr-warmup-iters --lr-warmup-samples
--lr-wsd-decay-iters --lr-wsd-decay-samples --lr-wsd-decay-style --main-grads-dtype
--main-params-dtype --make-vocab-size-divisible-by --manual-gc-interval --max-bad-steps
--max-position-embeddings --metrics-every-iteration --micro-batch-size --min-lr --mscale
--mscale-all-dim --new-data-seed --no-add-qkv-bias --no-async-save --no-bf16 --no-ckpt-verify
--no-data-verify --no-ddp-pad-buckets-for-high-nccl-busbw --no-deterministic-mode
--no-disable-symmetric-registration --no-fine-grained-activation-offloading --no-finetune
--no-first-last-layers-bf16 --no-fp8-param-gather --no-from-scratch --no-grad-reduce-in-bf16
--no-gradient-accumulation-fusion --no-load-optim --no-log-layer-norms --no-log-params-norm
--no-log-straggler --no-metrics-every-iteration --no-new-data-seed --no-optimizer-cpu-offload
--no-overlap-cpu-optimizer-d2h-h2d --no-overlap-grad-reduce --no-overlap-param-gather
--no-pad-attention-heads --no-profile --no-qk-layernorm --no-reuse-grad-buf-for-mxfp8-param-ag
--no-sequence-parallel --no-shared-memory-collectives --no-tensorboard --no-tp-comm-overlap
--no-untie-embeddings-and-output-weights --no-use-distributed-optimizer --no-use-nccl-ub
--no-use-precision-aware-optimizer --no-use-pytorch-profiler --no-weight-decay
--no-yarn-correction-range-round-to-int --norm-epsilon --num-attention-heads --num-layers
--num-layers-at-end-in-bf16 --num-layers-at-start-in-bf16 --num-layers-per-virtual-pipeline-stage
--num-prefetch --num-query-groups --num-virtual-stages-per-pipeline-rank --offload-modules
--old-tokenizer-model --on-nan --optimizer-cpu-offload --optimizer-offload-fraction --output
--overlap-cpu-optimizer-d2h-h2d --overlap-grad-reduce --overlap-param-gather --pad-attention-heads
--pipeline-model-parallel-size --preset --pretrained-checkpoint --probe-interval --profile
--profile-ranks --profile-step-end --profile-step-start --qk-layernorm --rampup-batch-size --rank
--recompute-granularity --recompute-method --recompute-modules --recompute-num-layers
--reuse-grad-buf-for-mxfp8-param-ag --rope-high-freq-factor --rope-low-freq-factor
--rope-original-max-position-embeddings --rope-scaling-factor --rope-scaling-type --rotary-base
--save --save-interval --save-keep-every --save-remote --save-retain --seed --seq-length
--sequence-parallel --shared-memory-collectives --simulate --split --start-weight-decay
--straggler-minmax-count --tensor-model-parallel-size --tensorboard --tokenizer-model
--tokenizer-type --tp-comm-overlap --train-iters --train-samples --transformer-impl
--untie-embeddings-and-output-weights --use-distributed-optimizer --use-nccl-ub
--use-precision-aware-optimizer --use-pytorch-profiler --verbose --vocab-size --wandb-entity
--wandb-exp-name --wandb-project --wandb-save-dir --weight-decay --weight-decay-incr-style
--window-size --world-size --yarn-attention-factor --yarn-beta-fast --yarn-beta-slow
--yarn-correction-range-round-to-int
""".split()


def test_the_flags_are_frozen() -> None:
    flags = {name for action in build_parser()._actions for name in action.option_strings}
    assert sorted(flags - {"-h"}) == FROZEN_FLAGS
