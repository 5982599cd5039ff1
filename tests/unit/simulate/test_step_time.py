"""Tests the prediction of a step's time: its parts by hand, and the whole against measurements."""

from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import Row

from megatron_chatflow.config import load_config
from megatron_chatflow.config.shape import num_layer_parameters
from megatron_chatflow.errors import UserError
from megatron_chatflow.simulate import step_time
from megatron_chatflow.simulate.layout_search import plan_layout
from megatron_chatflow.simulate.step_time import (
    GPUS,
    LAYER_LAUNCHES,
    FittedConstants,
    Stack,
    StepLayout,
    TransformerShape,
    find_gpu,
    predict_step,
)

EXAMPLES = Path(__file__).parents[3] / "examples" / "llama2_7b"
H100, B200 = GPUS["h100"], GPUS["b200"]
LLAMA_7B = TransformerShape(32, 4096, 11008, 4096, 4096, 128, 32000)
LLAMA_70B = TransformerShape(80, 8192, 28672, 8192, 1024, 128, 32000)
# A GPU that only computes: nothing is lost at the end of a product or to memory and networks.
IDEAL = replace(H100, hbm=1e30, nvlink=1e30, network=1e30, num_sms=0)


@pytest.fixture(scope="module", params=[0, 2])
def held_out(request: pytest.FixtureRequest) -> tuple[list[Row], list[Row], FittedConstants]:
    """Returns two halves of the rows of megatron-core, split by cluster, and the fit to the first.

    Each parameter is the seed of a split.
    """
    train, test = published.split_by_cluster(published.megatron_rows(), request.param)
    return train, test, published.fit(train)


def test_held_out_h100_rows_are_predicted_within_12_percent(held_out) -> None:
    train, test, constants = held_out
    assert not {row.cluster for row in train} & {row.cluster for row in test}
    rows = [row for row in test if row.kind == ("H100", "bf16")]
    errors = published.relative(published.log_errors(rows, constants))
    assert len(rows) >= 20 and len({row.cluster for row in rows}) >= 4
    assert np.percentile(errors, 90) <= 0.12
    assert np.median(errors) <= 0.05


def test_held_out_rows_are_predicted_better_than_by_a_constant_mfu(held_out) -> None:
    train, test, constants = held_out
    kinds = Counter(row.kind for row in test)
    populated = [kind for kind, number in kinds.items() if number >= 8]
    assert len(populated) >= 3
    for kind in populated:
        rows = [row for row in test if row.kind == kind]
        ours = published.relative(published.log_errors(rows, constants))
        naive = published.relative(published.constant_mfu_errors(train, rows))
        assert np.median(ours) < np.median(naive), kind
        assert np.percentile(ours, 90) < np.percentile(naive, 90), kind


def test_the_constants_are_those_of_the_fit() -> None:
    rows = published.megatron_rows()
    fitted = published.fit_loss(rows, published.fit(rows))
    assert published.fit_loss(rows, FittedConstants()) == pytest.approx(fitted, abs=2e-4)


# Published / predicted of rows that no fit has used: 5th, 50th and 95th percentile.
NEVER_FITTED = {
    ("megatron", "A100", "bf16"): (0.65, 0.85, 1.10),  # layouts partly assumed; no flash attention
    ("megatron", "H100", "bf16"): (0.75, 0.92, 1.10),  # micro-batches assumed
    ("plain", "B200", "bf16"): (0.60, 0.80, 0.95),  # nothing overlapped, shortened models
    ("bridge", "GB300", "fp8"): (1.05, 1.27, 1.45),  # its rates are those of GB200
    ("evo", "A100", "bf16"): (0.55, 0.77, 0.90),
    ("fsdp", "A100", "bf16"): (0.65, 0.93, 1.10),
    ("fsdp", "H100", "bf16"): (0.60, 0.87, 1.10),
}


@pytest.mark.parametrize("key", NEVER_FITTED)
def test_rows_that_were_never_fitted(key: tuple[str, str, str]) -> None:
    """Other software, other GPUs and incomplete rows keep their distance from the prediction."""
    rows = [row for row in published.read_rows() if (row.stack, *row.kind) == key]
    rows = [row for row in rows if not (row.is_fitted and row.stack in published.MEGATRON)]
    assert len(rows) >= 4
    low, middle, high = np.exp(np.percentile(-published.log_errors(rows), [5, 50, 95]))
    lowest, median, highest = NEVER_FITTED[key]
    assert lowest < low and high < highest
    assert middle == pytest.approx(median, abs=0.03)


@pytest.mark.parametrize("key", [key for key in NEVER_FITTED if key[0] in ("evo", "fsdp")])
def test_one_measurement_brings_other_layouts_to_15_percent(key: tuple[str, str, str]) -> None:
    """Holds for three of four pairs of rows of the same software, on up to 64 GPUs."""
    rows = [
        row
        for row in published.read_rows()
        if (row.stack, *row.kind) == key and row.is_fitted and row.layout.num_gpus <= 64
    ]
    errors = published.log_errors(rows)
    pairs = [b - a for i, a in enumerate(errors) for j, b in enumerate(errors) if i != j]
    assert len(rows) >= 8
    assert np.percentile(published.relative(np.array(pairs)), 75) <= 0.15


def test_a_flop_is_counted_once() -> None:
    """On a GPU that only computes, the layers take their FLOPs over the fitted share of the peak.

    Attention adds 6 seq_length query_size FLOPs per token and pass, and the pass backward 2.5 times
    as many.
    """
    layout = StepLayout(8, global_batch_size=64)
    step = predict_step(LLAMA_7B, layout, IDEAL)
    tokens = 64 * 4096 / 8
    parameters = 4096 * (4 * 4096 + 3 * 11008)
    assert LLAMA_7B.layer_parameters == parameters
    products = 32 * 6 * parameters * tokens / (H100.bf16 * FittedConstants().hopper)
    forward, backward = step_time.attention_seconds(LLAMA_7B, layout, IDEAL)
    attention = 32 * 8 * (forward + backward)
    assert step.layers == pytest.approx(products + attention)
    # Half of 4 seq_length query_size, the causal half, at 0.53 of the peak times 4096 / 4608.
    share = 0.53 * 4096 / (4096 + 512)
    flops = 2 * 4096 * 4096 * 4096
    assert forward == pytest.approx(flops / (H100.bf16 * share * 1.15))
    assert backward == pytest.approx(2.5 * flops / (H100.bf16 * share * 0.94))
    output = 6 * 32000 * 4096 * tokens / (H100.bf16 * FittedConstants().hopper)
    assert step.output_layer == pytest.approx(output)
    assert (step.bubble, step.sends, step.model_parallel, step.launches) == (0, 0, 0, 0)


def test_attention_is_as_long_as_its_window() -> None:
    layout = StepLayout(8, global_batch_size=64)
    whole = step_time.attention_seconds(LLAMA_7B, layout, H100)
    for window in (4096, 5000):
        assert step_time.attention_seconds(replace(LLAMA_7B, window=window), layout, H100) == whole
    found = step_time.attention_seconds(replace(LLAMA_7B, window=1024), layout, H100)
    # 1024 keys, fewer for the first 1024 of 4096 tokens, instead of 2048 on average.
    work = (1024 - 1024 * 1024 / 8192) / 2048
    speed = 1024 / (1024 + 512) / (4096 / (4096 + 512))
    assert found == pytest.approx([seconds * work / speed for seconds in whole])


def test_a_product_is_bound_by_compute_or_by_memory() -> None:
    constants = FittedConstants()
    compute = 2 * 8192**3 / (H100.bf16 * constants.hopper)
    # 64 x 32 tiles of 128 x 256; a quarter of a round over 132 multiprocessors is lost.
    compute *= (64 * 32 + 0.25 * 132) / (64 * 32)
    found = step_time.matmul_seconds(8192, 8192, 8192, H100, constants)
    assert found == pytest.approx(compute)
    moved = 2 * (8 * 8192 + 8192 * 8192) + 2 * 8 * 8192
    found = step_time.matmul_seconds(8, 8192, 8192, H100, constants)
    assert found == pytest.approx(moved / (0.8 * 3350e9))
    with_accumulation = step_time.matmul_seconds(8192, 8192, 8, H100, constants, out_bytes=8)
    assert with_accumulation == pytest.approx((4 * 8 * 8192 + 8 * 8192**2) / (0.8 * 3350e9))


def test_the_bytes_of_a_ring() -> None:
    assert step_time.ring_bytes(800, 8) == 700
    assert step_time.ring_bytes(800, 1) == 0
    layout = StepLayout(16)
    size = 1e9
    # Eight ranks of a node over NVLink, in 6.25 buckets.
    seconds = step_time.collective_seconds(size, 8, 8, H100, layout)
    assert seconds == pytest.approx(7 / 8 * size / (0.75 * 450e9) + 6.25 * 8e-6)
    # Two nodes share eight network cards each, which are faster than NVLink together.
    seconds = step_time.collective_seconds(size, 16, 8, H100, layout)
    assert seconds == pytest.approx(15 / 16 * size / (0.75 * 450e9) + 6.25 * 15e-6)
    # Two ranks on two nodes have a network card each.
    seconds = step_time.collective_seconds(size, 2, 1, H100, layout)
    assert seconds == pytest.approx(1 / 2 * size / (0.85 * 50e9) + 6.25 * 15e-6)
    assert step_time.collective_seconds(size, 1, 1, H100, layout) == 0


def test_the_exchange_of_tensor_parallelism() -> None:
    """Four gathers and four reduce-scatters per layer; 0.85 of their time is lost if not hidden."""
    layout = StepLayout(8, tensor=8, global_batch_size=4)
    step = predict_step(LLAMA_70B, layout, H100)
    size = 4096 * 8192 * 2 * 7 / 8
    once = size / (0.75 * 450e9) + 8e-6
    assert step.model_parallel == pytest.approx(4 * 80 * 8 * once * 0.85)
    overlapped = replace(layout, stack=Stack(overlaps_tensor_exchange=True))
    assert predict_step(LLAMA_70B, overlapped, H100).model_parallel == pytest.approx(
        4 * 80 * 8 * once * FittedConstants().tensor
    )


def test_gathers_of_fp8_values_send_fewer_bytes() -> None:
    """Reduce-scatters stay in bf16, and so does everything without sequence parallelism."""
    layout = StepLayout(8, tensor=8, global_batch_size=4)
    size = 4096 * 8192 * 7 / 8 / (0.75 * 450e9)
    for precision, gathered in (("fp8", 1 + 1), ("blockwise", 3 * (1 + 4 / 128))):
        fp8 = replace(layout, stack=Stack(precision=precision))
        found = predict_step(LLAMA_70B, fp8, H100).model_parallel
        sent = 2 * size * (2 * 2 + gathered) + 8 * 8e-6
        assert found == pytest.approx(0.85 * 4 * 80 * sent)
        whole = replace(fp8, sequence_parallel=False)
        plain = replace(layout, sequence_parallel=False)
        expected = predict_step(LLAMA_70B, plain, H100).model_parallel
        assert predict_step(LLAMA_70B, whole, H100).model_parallel == pytest.approx(expected)


def test_layers_in_bf16_take_the_time_of_bf16() -> None:
    layout = StepLayout(8, tensor=8, global_batch_size=4)
    times = [
        predict_step(LLAMA_70B, replace(layout, stack=stack), H100).layers
        for stack in (Stack(), Stack("fp8"), Stack("fp8", bf16_layers=0.25))
    ]
    assert times[2] == pytest.approx(0.25 * times[0] + 0.75 * times[1])
    config = load_config(
        EXAMPLES / "70b.yaml", "--fp8-format hybrid --first-last-layers-bf16".split()
    )
    stack = StepLayout.of(config, 64).stack
    assert (stack.bf16_layers, stack.weight_bytes) == (2 / 80, 2)


def test_weights_in_fp8_are_gathered_as_such() -> None:
    flags = "--fp8-format hybrid --use-distributed-optimizer --fp8-param-gather".split()
    stacks = [
        StepLayout.of(load_config(EXAMPLES / "7b.yaml", [*flags, *more]), 8).stack
        for more in ([], ["--first-last-layers-bf16"])
    ]
    assert [stack.weight_bytes for stack in stacks] == [1, 1 + 2 / 32]
    layout = StepLayout(64, global_batch_size=64, overlaps_param_gather=False, network=1e9)
    in_bf16, in_fp8 = (
        predict_step(LLAMA_7B, replace(layout, stack=replace(stacks[0], weight_bytes=size)), H100)
        for size in (2, 1)
    )
    matrices, tables = 32 * LLAMA_7B.layer_parameters, 2 * LLAMA_7B.table_parameters
    gathers = [
        step_time.collective_seconds(size * matrices + 2 * tables, 64, 8, H100, layout)
        for size in (2, 1)
    ]
    difference = in_bf16.data_parallel - in_fp8.data_parallel
    assert difference == pytest.approx(gathers[0] - gathers[1])


def test_keys_are_gathered_before_attention_or_rotate_behind_it() -> None:
    layout = StepLayout(8, context=4, global_batch_size=2)
    turn = 1024 * 2 * 4096 * 2 / (0.75 * 450e9) + 2 * 8e-6
    gathered = predict_step(LLAMA_7B, layout, H100).model_parallel
    assert gathered == pytest.approx(32 * 2 * 3 * turn)
    rotated = replace(layout, stack=Stack(rotates_keys=True))
    forward, backward = step_time.attention_seconds(LLAMA_7B, rotated, H100)
    visible = max(0.0, 3 * turn - forward) + max(0.0, 6 * turn - backward)
    expected = 32 * (3 * turn + visible)
    assert predict_step(LLAMA_7B, rotated, H100).model_parallel == pytest.approx(expected)


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_bubble_is_that_of_the_schedule(chunks: int) -> None:
    """The first and last stages idle for `stages - 1` micro-batches, over the number of chunks."""
    layout = StepLayout(16, tensor=4, pipeline=4, chunks=chunks, global_batch_size=16)
    assert layout.num_micro_batches == 16
    step = predict_step(LLAMA_70B, layout, H100)
    # All stages have the same layers. The last one, which also has the output layer, is slowest.
    work = step.layers + step.model_parallel + step.launches + step.output_layer / 4
    assert step.bubble == pytest.approx(3 / chunks * work / 16)
    assert step.seconds == pytest.approx(sum(astuple(step)))


def test_stages_of_unequal_length() -> None:
    shape = replace(LLAMA_70B, num_layers=126)
    assert step_time.stage_layers(shape, StepLayout(64, pipeline=8)) == [15, *[16] * 6, 15]
    assert step_time.stage_layers(LLAMA_70B, StepLayout(64, pipeline=8)) == [10] * 8


def test_exchange_hides_behind_compute() -> None:
    constants = FittedConstants(data=0.1)
    assert step_time.exposed_seconds(1.0, 3.0, constants) == pytest.approx(0.1)
    assert step_time.exposed_seconds(3.0, 1.0, constants) == pytest.approx(2.1)
    hidden = StepLayout(64)
    shown = replace(hidden, overlaps_grad_reduce=False, overlaps_param_gather=False)
    loss = predict_step(LLAMA_7B, shown, H100).data_parallel
    assert loss > 5 * predict_step(LLAMA_7B, hidden, H100).data_parallel
    # All gradients in fp32 and all weights in bf16, over eight nodes of eight.
    parameters = 32 * LLAMA_7B.layer_parameters + 2 * 32000 * 4096
    both = sum(step_time.collective_seconds(n * parameters, 64, 8, H100, hidden) for n in (4, 2))
    assert loss == pytest.approx(both)


def test_a_small_layer_waits_for_the_host() -> None:
    tiny = TransformerShape(4, 256, 688, 256, 128, 32, 512)
    step = predict_step(tiny, StepLayout(1, seq_length=256, global_batch_size=16), H100)
    assert step.largest_loss[0] == "kernel launches"
    assert step.layers + step.launches == pytest.approx(4 * 16 * sum(LAYER_LAUNCHES) * 10e-6)
    more = StepLayout(1, seq_length=256, global_batch_size=16, layer_launches=(32, 50))
    assert predict_step(tiny, more, H100).seconds > 1.9 * step.seconds - 0.02
    # Tensor parallelism makes the layers smaller and adds launches of collectives.
    divided = StepLayout(2, tensor=2, seq_length=256, global_batch_size=16)
    step = predict_step(tiny, divided, H100)
    work = step.layers + step.model_parallel + step.launches
    assert work == pytest.approx(4 * 16 * (sum(LAYER_LAUNCHES) + 4 + 6) * 10e-6)


LAYOUTS = st.fixed_dictionaries(
    {
        "num_gpus": st.sampled_from([64, 256]),
        "global_batch_size": st.just(512),
        "tensor": st.sampled_from([1, 2, 4, 8]),
        "pipeline": st.sampled_from([1, 2, 4]),
        "chunks": st.sampled_from([1, 5]),
        "context": st.sampled_from([1, 2]),
        "micro_batch_size": st.sampled_from([1, 2]),
        "recomputed_layers": st.sampled_from([0.0, 0.5, 1.0]),
        "sharding": st.sampled_from(["none", "optimizer", "weights"]),
        "sequence_parallel": st.booleans(),
        "overlaps_grad_reduce": st.booleans(),
        "overlaps_param_gather": st.booleans(),
    }
)


@settings(max_examples=60)
@given(LAYOUTS)
def test_better_hardware_is_never_slower(values: dict[str, Any]) -> None:
    layout = StepLayout(**values)
    seconds = predict_step(LLAMA_70B, layout, H100).seconds
    for name in ("bf16", "hbm", "nvlink", "network", "attention"):
        better = replace(H100, **{name: 1.3 * getattr(H100, name)})
        assert predict_step(LLAMA_70B, layout, better).seconds <= seconds * (1 + 1e-12), name
    wider = replace(layout, domain=64)
    assert predict_step(LLAMA_70B, wider, H100).seconds <= seconds * (1 + 1e-12)


@settings(max_examples=60)
@given(LAYOUTS)
def test_more_work_is_never_faster(values: dict[str, Any]) -> None:
    layout = StepLayout(**values)
    seconds = predict_step(LLAMA_70B, layout, H100).seconds
    larger = replace(LLAMA_70B, ffn_hidden_size=2 * LLAMA_70B.ffn_hidden_size)
    assert predict_step(larger, layout, H100).seconds > seconds
    assert predict_step(LLAMA_70B, replace(layout, global_batch_size=1024), H100).seconds > seconds
    for recomputed in (
        replace(layout, recomputes_attention=True),
        replace(layout, recomputes_mlp=True),
    ):
        assert predict_step(LLAMA_70B, recomputed, H100).seconds > seconds
    slower = replace(layout, network=H100.network / 4)
    assert predict_step(LLAMA_70B, slower, H100).seconds >= seconds


def test_a_run_becomes_a_shape_and_a_layout() -> None:
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel"
    virtual = "--num-layers-per-virtual-pipeline-stage 4 --recompute-granularity full"
    block = "--recompute-method block --recompute-num-layers 1 --attention-backend flash_attn_2"
    arguments = f"{flags} {virtual} {block}".split()
    config = load_config(EXAMPLES / "7b.yaml", arguments)
    shape = TransformerShape.of(config, 32000)
    assert shape == LLAMA_7B
    norms = 2 * config.model.hidden_size
    assert shape.layer_parameters == num_layer_parameters(config.model) - norms
    layout = StepLayout.of(config, 64)
    assert (layout.tensor, layout.pipeline, layout.chunks, layout.data) == (2, 4, 2, 8)
    assert (layout.num_micro_batches, layout.tokens, layout.residual_parts) == (32, 4096, 2)
    assert (layout.recomputed_layers, layout.sharding) == (0.25, "optimizer")
    assert layout.stack == Stack(attention="flash2")


@pytest.mark.parametrize(
    ("flags", "stack"),
    [
        ("--fp8-format hybrid", Stack(precision="fp8")),
        ("--fp8-format e4m3 --fp8-recipe mxfp8", Stack(precision="mxfp8")),
        ("--fp4-format e2m1", Stack(precision="mxfp8")),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap "
            "--grad-reduce-in-bf16",
            Stack(gradient_bytes=2, overlaps_tensor_exchange=True),
        ),
    ],
)
def test_a_layout_knows_precision_and_overlap(flags: str, stack: Stack) -> None:
    config = load_config(EXAMPLES / "7b.yaml", flags.split())
    assert StepLayout.of(config, 64).stack == stack
    plain = predict_step(LLAMA_7B, replace(StepLayout.of(config, 64), stack=Stack()), B200)
    assert predict_step(LLAMA_7B, StepLayout.of(config, 64), B200).seconds < plain.seconds


def test_a_precision_that_the_gpu_lacks_is_refused() -> None:
    config = load_config(EXAMPLES / "7b.yaml", ["--fp8-format", "hybrid"])
    with pytest.raises(UserError, match="the ampere generation does not compute in fp8"):
        plan_layout(config, 64, find_gpu("a100-80"), 32000)
    assert plan_layout(config, 64, H100, 32000).mfu > 0.4
    config = load_config(EXAMPLES / "7b.yaml", ["--fp4-format", "e2m1"])
    with pytest.raises(UserError, match="the hopper generation does not compute in mxfp8"):
        plan_layout(config, 64, H100, 32000)


def test_an_unknown_gpu_is_a_users_mistake() -> None:
    assert find_gpu("H100") is H100
    with pytest.raises(UserError, match=r"GPU 'h10': is not known \(did you mean h100\?\)"):
        find_gpu("h10")
