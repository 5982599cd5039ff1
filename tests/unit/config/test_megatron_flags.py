"""Tests Megatron-LM command lines: which flags are accepted, translated and refused."""

from pathlib import Path

import pytest

from megatron_chatflow.config import load_config, load_config_from_argv
from megatron_chatflow.config.flags import build_parser
from megatron_chatflow.config.megatron_flags import TABLE, Mapped, read_blend, treatments
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.errors import UserError

# Every option of Megatron-LM's training arguments, core 0.7 to August 2026, one per line.
MEGATRON = Path(__file__).with_name("megatron_flags.txt").read_text().split()
OURS = {name for action in build_parser()._actions for name in action.option_strings}
MODEL = """
--use-mcore-models --num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 16 --seq-length 64
--max-position-embeddings 64 --position-embedding-type rope --rotary-base 10000
--rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0 --swiglu --normalization RMSNorm
--init-method-std 0.0134 --attention-backend fused --untie-embeddings-and-output-weights
--disable-bias-linear --use-flash-attn
""".split()
TRAINING = """
--micro-batch-size 1 --global-batch-size 4 --train-samples 64 --lr-decay-samples 48
--lr 0.00015 --min-lr 0.00001 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion
--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --log-interval 1
--eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --ckpt-format torch_dist
--distributed-timeout-minutes 60 --save out --load out --tensorboard-dir logs --no-load-rng
--initial-loss-scale 65536 --lr-warmup-fraction 0.25 --recompute-activations
--no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
--data-cache-path cache --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model t.model
--accumulate-allreduce-grads-in-fp32 --exit-signal-handler --save-retain-interval 500
""".split()
YARN = """
--position-embedding-type yarn --rotary-scaling-factor 4
--yarn-original-max-position-embeddings 512
""".split()
CYCLE = ("--load", "runs/any", "--lr-cycle-start-iters")
DATA = "--data-path 0.7 d/en_text_document 3e-1 d/zh_text_document --split 98,1,1".split()


@pytest.fixture
def path(tmp_path, values):
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(values()))
    return file


def test_the_table_has_every_flag_that_is_not_ours() -> None:
    assert len(MEGATRON) > 900
    assert [flag for flag in MEGATRON if flag not in OURS and not treatments(flag)] == []


def test_the_table_has_no_flag_of_ours_and_none_that_nobody_has() -> None:
    """A flag that the package implements must leave the table, which is then never consulted."""
    assert [name for name in TABLE if name in OURS] == []
    for name in TABLE:
        begin = name.removesuffix("*")
        assert any(flag == name or (begin != name and flag.startswith(begin)) for flag in MEGATRON)


def test_what_is_mapped_is_understood() -> None:
    parser = build_parser()
    for name, entries in TABLE.items():
        for one in entries:
            if isinstance(one, Mapped) and one.arguments is not None:
                words = one.arguments.replace("{}", "8").split()
                assert parser.parse_known_args(words)[1] == [], name


def test_a_whole_script_without_a_yaml_file() -> None:
    config, options = load_config_from_argv([*MODEL, *TRAINING, *DATA])
    assert config.model.num_layers == 2 and config.model.num_query_groups == 2
    assert config.tokenizer.tokenizer_type == "Llama2Tokenizer"
    assert config.train.attention_backend == "cudnn"
    assert config.train.recompute_granularity == "selective"
    assert config.optimizer.lr_warmup_samples == 12
    assert (config.checkpoint.save_keep_every, config.checkpoint.save_retain) == (500, 1)
    assert list(config.data.sources) == ["en", "zh"]
    assert [str(p) for p in config.data.sources["zh"].paths] == ["d/zh_text_document"]
    (knot,) = config.data.schedule.knots
    assert knot.weights == {"en": 0.7, "zh": 0.3} and config.data.split == "98,1,1"
    notes = "\n".join(options.notes)
    for flag in ("--swiglu", "--normalization RMSNorm", "--tensorboard-dir", "--num-workers 1"):
        assert f"{flag}: " in notes
    assert "--hidden-size" not in notes


def test_flags_of_data_are_stronger_than_the_file(path) -> None:
    run = load_config(path, ["--data-path", "a/b_document"])
    assert list(run.data.sources) == ["b"] and run.data.split == "969,30,1"
    path.write_text(path.read_text().replace("data:\n", "data:\n  holdout_every: 9\n"))
    run = load_config(path, ["--data-path", "a/b_document"])
    assert (run.data.split, run.data.holdout_every) == (None, 9)
    run = load_config(path, ["--train-data-path", "1", "a", "2", "b"])
    assert run.data.split is None and len(run.data.sources) == 2
    run = load_config(path, ["--train-data-path", "a", "--valid-data-path", "v", "w"])
    assert [str(p) for p in run.data.sources["a"].validation_paths] == ["v", "w"]
    pairs = ["--train-data-path", "1", "a", "2", "b", "--valid-data-path", "1", "v", "1", "w"]
    run = load_config(path, pairs)
    assert [str(p) for p in run.data.sources["b"].validation_paths] == ["w"]
    path.write_text("data: 5\n")
    with pytest.raises(UserError, match="^data: must be a mapping of keys, not 5"):
        load_config(path, ["--data-path", "a/b_document"])


def test_datasets_without_weights_are_one_source(path, tmp_path) -> None:
    run = load_config(path, ["--data-path", "x/a_document", "x/b_document"])
    assert [str(p) for p in run.data.sources["data"].paths] == ["x/a_document", "x/b_document"]
    listing = tmp_path / "args.txt"
    listing.write_text("1 x/a_content_document\n2 y/a_content_document\n")
    run = load_config(path, ["--data-args-path", str(listing)])
    assert run.data.schedule.knots[0].weights == {"a": 1.0, "a_2": 2.0}


@pytest.mark.parametrize(
    "words",
    [[], ["1"], ["1", "a", "b"], ["a", "1", "b"], ["1", "a", "b", "c"], ["-1", "a"], ["0", "a"]],
)
def test_blends_that_are_none(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--data-path: (give prefixes|weights must)"):
        read_blend("--data-path", words)


@pytest.mark.parametrize(
    "flag", ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"]
)
def test_documents_are_isolated(path, flag: str) -> None:
    run = load_config(path, [flag])
    assert {source.boundaries for source in run.data.sources.values()} == {"isolate"}
    path.write_text(path.read_text().replace("loss: response", "boundaries: ignore"))
    run = load_config(path, [flag, "--swiglu"])
    assert run.data.sources["chat"].boundaries == "ignore"


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [
        (["--lr-warmup-fraction", ".05"], ("lr_warmup_iters", 5)),
        (["--lr-warmup-fraction", ".05", "--lr-decay-iters", "2K"], ("lr_warmup_iters", 100)),
        (
            ["--lr-warmup-fraction", ".05", "--lr-decay-iters", "2K", *CYCLE, "1500"],
            ("lr_warmup_iters", 25),
        ),
        (["--train-samples", "800", "--lr-warmup-fraction", "0.5"], ("lr_warmup_samples", 400)),
        (["--rotary-seq-len-interpolation-factor", "2"], ("rope_scaling_factor", 2.0)),
        (["--use-rope-scaling"], ("rope_original_max_position_embeddings", 8192)),
        (["--use-rope-scaling", "--rope-scaling-factor", "32"], ("rope_scaling_factor", 32.0)),
        (YARN, ("rope_scaling_type", "yarn")),
        (YARN, ("rope_scaling_factor", 4.0)),
        (YARN, ("rope_original_max_position_embeddings", 512)),
        (YARN, ("yarn_beta_slow", 1.0)),
        ([*YARN, "--yarn-beta-fast", "64"], ("yarn_beta_fast", 64.0)),
        (["--window-size", "(127,0)"], ("window_size", (127, 0))),
        (["--encoder-seq-length=96"], ("seq_length", 96)),
    ],
)
def test_what_becomes_other_settings(path, flags: list[str], warmup: tuple[str, float]) -> None:
    run = load_config(path, flags)
    sections = (run.optimizer, run.model, run.data)
    assert [getattr(s, warmup[0]) for s in sections if hasattr(s, warmup[0])] == [warmup[1]]


def test_many_refused_flags_are_all_named(path) -> None:
    flags = [f"--no-such-flag-{k}" for k in range(60)]
    with pytest.raises(UserError) as caught:
        load_config(path, flags)
    assert all(f"{flag}: unknown flag" in str(caught.value) for flag in flags)


def test_everything_that_is_wrong_is_said_at_once(path) -> None:
    flags = ["--train-iter", "3", "--fp16", "--zzzzzz", "1", "--normalization", "LayerNorm"]
    flags += ["--moe-router-topk=2", "--swigul", "--merge-file", "merges.txt", "--seed", "7"]
    with pytest.raises(UserError) as caught:
        load_config(path, flags)
    text = str(caught.value)
    assert text.startswith("7 flags: --train-iter: unknown flag (did you mean --train-iters?); ")
    for part in (
        "--zzzzzz: unknown flag; ",
        "--swigul: unknown flag (did you mean --swiglu?); ",
        "--fp16: not supported (--bf16, or --no-bf16 for fp32); ",
        "--normalization LayerNorm: not supported (the model is a dense decoder like LLaMA, see "
        "docs/architectures.md); ",
        "--moe-router-topk 2: not supported (the model is a dense decoder like LLaMA, see "
        "docs/architectures.md); ",
        "--merge-file merges.txt: not supported (--tokenizer-model with the folder",
    ):
        assert part in text
    assert text.endswith("see docs/coming_from_megatron.md") and "--profile" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1: not supported (the model is"),
        (["--ckpt-format", "torch"], "--ckpt-format torch: not supported (tools/convert_"),
        (["--expert-model-parallel-size", "2"], "--expert-model-parallel-size 2: not supported"),
        (["--lr-warmup-fraction", "2"], "--lr-warmup-fraction: must be one number from 0 to 1"),
        (
            ["--train-samples", "800", "--lr-warmup-fraction", ".1", *CYCLE, "5"],
            "--lr-warmup-fraction: is a fraction of samples, and optimizer.lr_cycle_start_iters is",
        ),
        (["--encoder-num-layers"], "--encoder-num-layers: takes one value, not 0"),
        (["--valid-data-path", "v"], "--valid-data-path: needs --train-data-path"),
        (["--data-args-path", "nowhere.txt"], "--data-args-path: nowhere.txt: "),
        (["--recompute-activations", "stray"], "--recompute-activations: takes no value, not 1"),
        (["--merge-files", "x"], "--merge-files: unknown flag (did you mean --merge-file?)"),
        (["--pofile"], "--pofile: unknown flag (did you mean --profile?)"),
        (["--merge"], "--merge: unknown flag; see --help"),
    ],
)
def test_mistakes(path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(path, flags)
    assert str(caught.value).startswith(message)
