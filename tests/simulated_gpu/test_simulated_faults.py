"""Re-introduces faults that the simulated GPU has found; each must be reported with its line."""

import re

from simulator import Simulator, example

from megatron_chatflow.simulate.observer import Observation
from megatron_chatflow.simulate.worker import Failure

RUN = ("7b.yaml", "--num-layers", "1")
FILE = "tests/simulated_gpu/mutations.py"


def failure(simulator: Simulator, mutation: str) -> Failure:
    found = simulator.run(example(*RUN), world_size=8, mutation=mutation)
    assert isinstance(found, Failure)
    return found


def observation(simulator: Simulator, mutation: str) -> Observation:
    return simulator.observe(example(*RUN), world_size=8, mutation=mutation)


def test_a_pinned_tensor_that_is_expanded(simulator: Simulator) -> None:
    found = failure(simulator, "pin_expanded_tensors")
    assert "more than one element of the written-to tensor" in found.error
    assert found.line.startswith(FILE) and found.line.endswith(" to_device")


def test_a_cpu_tensor_in_an_operator(simulator: Simulator) -> None:
    found = failure(simulator, "add_a_cpu_tensor")
    assert re.search("two (different )?devices", found.error) and "cpu" in found.error
    assert found.line.startswith(FILE) and found.line.endswith(" add")


def test_an_operator_without_a_shape_function(simulator: Simulator) -> None:
    found = failure(simulator, "forget_a_shape_function")
    assert "mutations.double" in found.error or "mutations::double" in found.error
    assert found.line.startswith(FILE) and found.line.endswith(" call")


def test_a_value_that_a_layer_reads(simulator: Simulator) -> None:
    found = observation(simulator, "read_a_value_in_a_layer")
    lines = {one.lines[0] for one in found.synchronizations if one.phase == "forward"}
    assert len(lines) == 1
    (line,) = lines
    assert line.startswith(FILE) and line.endswith(" read")


def test_a_table_that_was_left_on_the_cpu(simulator: Simulator) -> None:
    found = failure(simulator, "leave_a_tensor_on_the_cpu")
    assert "indices should be either on cpu or on the same device" in found.error
    assert re.fullmatch(r"megatron_chatflow/model/forward.py:\d+ _loss", found.line)
