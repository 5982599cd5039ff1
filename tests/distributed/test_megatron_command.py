"""Tests a run started by a plain Megatron-LM command line, on documents split by --split."""

import json
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

MODEL = """
--num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --kv-channels 16
--group-query-attention --num-query-groups 2 --seq-length 64 --max-position-embeddings 64
--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0.0 --use-mcore-models --use-flash-attn
--untie-embeddings-and-output-weights --tokenizer-type Llama2Tokenizer
""".split()
TRAINING = """
--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 3e-3 --lr-decay-style cosine
--lr-warmup-fraction 0.25 --eval-interval 2 --eval-iters 1 --log-interval 1 --split 8,1,1
--reset-position-ids --reset-attention-mask --num-workers 1 --from-scratch --no-bf16
""".split()


@pytest.mark.distributed
def test_a_run_without_a_yaml_file(tiny_run: TinyRun, tmp_path: Path) -> None:
    data = ["--tokenizer-model", tiny_run.tokenizer_model, "--data-path"]
    for weight, name in ((3, "first"), (1, "second")):
        data += [weight, tiny_run.folder / f"{name}_text_document"]
    output = jobs.run(jobs.pretrain(*MODEL, *TRAINING, *data, "--save", tmp_path))
    assert "Megatron-LM's --swiglu: the MLP is SwiGLU" in output
    assert "RANDOM WEIGHTS" not in output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    drawn = [line["sources"] for line in lines if "lm_loss" in line][-1]
    assert set(drawn) == {"first", "second"}
    checks = [line for line in lines if "validation" in line]
    assert [line["iteration"] for line in checks] == [0, 2, 4]
    assert set(checks[1]["validation"]) == {"first", "second"}
    names = {"first", "second", "first (test)", "second (test)"}
    assert set(checks[2]["validation"]) == names
