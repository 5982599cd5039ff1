"""Compares whole training steps on a GPU with the same steps on a CPU."""

import pytest
from step_worker import ARCHITECTURES, take_steps


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize(("dtype", "rel"), [("fp32", 1e-4), ("bf16", 4e-3)])
def test_steps_follow_those_of_a_cpu(dtype: str, rel: float, micro_batch_size: int) -> None:
    actual, expected = (
        take_steps(dtype, on_gpu=on_gpu, micro_batch_size=micro_batch_size)
        for on_gpu in (True, False)
    )
    assert actual["losses"] == pytest.approx(expected["losses"], rel=rel)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=10 * rel)
    # The steps change the loss far more than the tolerance.
    assert expected["losses"][0] - expected["losses"][-1] > 10 * rel * expected["losses"][0]


def test_the_first_step_in_bf16_is_near_a_cpu_s_in_fp32() -> None:
    actual, exact = take_steps("bf16", on_gpu=True), take_steps("fp32", on_gpu=False)
    assert actual["losses"][0] == pytest.approx(exact["losses"][0], rel=1e-3)
    assert actual["norms"][0] == pytest.approx(exact["norms"][0], rel=1e-2)


@pytest.mark.parametrize("fields", ARCHITECTURES)
def test_steps_of_other_architectures_follow_those_of_a_cpu(fields: str) -> None:
    """With the layers of transformer-engine, where it is installed."""
    actual = take_steps("bf16", on_gpu=True, model=fields)
    expected = take_steps("bf16", on_gpu=False, model=fields)
    assert actual["losses"] == pytest.approx(expected["losses"], rel=4e-3)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=4e-2)
