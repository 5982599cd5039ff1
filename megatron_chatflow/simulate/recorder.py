"""Accounts for what a simulated rank does: memory, FLOPs, launches, messages and waiting.

Everything is recorded by the phase of the run, which `worker` sets: ``start-up``, ``validation``,
and within a step ``schedule`` (exchanges between forward and backward passes), ``forward``,
``backward``, ``gradients`` (their reduction after the last micro-batch) and ``update``; ``after``
is what follows a step, such as its log. An operator that runs while autograd evaluates a node
belongs to ``backward`` whatever the phase.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_BLOCK_BYTES = 512  # torch's allocator rounds sizes up to this
_TORCH = f"{Path(torch.__file__).parent}/"
_HERE = f"{Path(__file__).parent}/"
_SITE = str(Path(torch.__file__).parents[1]) + "/"
_PACKAGE = str(Path(__file__).parents[2]) + "/"
_STANDARD = str(Path(sys.modules["contextlib"].__file__ or "").parent) + "/"
_NUM_FRAMES = 4

Place = tuple[str, ...]
"""Lines of code, innermost first, as ``file:line function``."""

_is_library: dict[str, bool] = {}
_shown_names: dict[str, str] = {}


def is_left_out(file: str) -> bool:
    """Returns whether a frame of this file says nothing about who called an operator."""
    known = _is_library.get(file)
    if known is None:
        is_standard = file.startswith(_STANDARD) and not file.startswith(_SITE)
        known = file.startswith((_TORCH, _HERE, "<")) or is_standard
        _is_library[file] = known
    return known


def shown(file: str) -> str:
    """Returns a file's name relative to the checkout or to the installed packages."""
    name = _shown_names.get(file)
    if name is None:
        name = file
        for folder in (_SITE, _PACKAGE):  # an environment may lie in the checkout
            if file.startswith(folder):
                name = file[len(folder) :]
                break
        _shown_names[file] = name
    return name


def place(num_frames: int = _NUM_FRAMES) -> Place:
    """Returns where the running operator was called, without the frames of torch.

    An operator of the backward pass that no Python code called has no frames. Its place is the name
    of autograd's node.
    """
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(lines) < num_frames:
        code = frame.f_code
        if not is_left_out(code.co_filename):
            lines.append(f"{shown(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    if not lines:
        node = current_node()
        lines.append("autograd" if node is None else f"autograd: {node.name()}")
    return tuple(lines)


def current_node() -> Any:
    """Returns the node that autograd evaluates now; None outside of a backward pass."""
    return torch._C._current_autograd_node()


@dataclass(eq=False, slots=True)
class Block:
    """Memory of one tensor storage.

    Attributes:
        num_bytes: Its size.
        phase: The phase in which it was allocated.
        place: Where it was allocated.
        number: Position among the events of a step at which it was allocated; -1 before it.
        call: Number of the forward pass that allocated it; -1 outside of one.
    """

    num_bytes: int
    phase: str
    place: Place
    number: int
    call: int


@dataclass
class Message:
    """Collectives of one kind over one group.

    Attributes:
        num_calls: Number of calls.
        num_bytes: Bytes of the tensors: the whole of what is reduced or gathered.
        wire_bytes: Bytes that this rank sends if the group forms a ring.
    """

    num_calls: int = 0
    num_bytes: int = 0
    wire_bytes: float = 0.0


@dataclass
class Ledger:
    """What was recorded, by phase; `Recorder.take` returns it and starts a new one."""

    flops: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    cpu_tensors: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    messages: dict[tuple[str, str, str], Message] = field(default_factory=dict)


class Recorder:
    """Accounts for one simulated rank.

    Attributes:
        phase: The present phase.
        live_bytes: Memory of tensors that are alive.
        peak_bytes: The most since `reset_peak`.
        ledger: Everything else.
        call: Number of the forward pass that runs now; -1 outside of one.
        num_launches: Number of kernel launches so far.
    """

    def __init__(self) -> None:
        self.phase = "start-up"
        self.live_bytes = 0
        self.peak_bytes = 0
        self.ledger = Ledger()
        self.call = -1
        self.num_launches = 0
        self._blocks: dict[int, Block] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._events: list[tuple[Block, bool]] | None = None
        self._ends_of_calls: dict[int, int] = {}
        self._before: list[Block] = []

    def current_phase(self) -> str:
        """Returns the phase that an operator belongs to now."""
        if current_node() is not None:
            return "backward"
        return self.phase

    # Memory.

    def see(self, tensor: torch.Tensor) -> bool:
        """Accounts for a tensor on the device; returns whether its storage is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return False
        num_bytes = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        number = -1 if self._events is None else len(self._events)
        block = Block(num_bytes, self.current_phase(), place(1), number, self.call)
        self._blocks[key] = block
        self._references[key] = weakref.ref(storage, partial(self._forget, key))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._events is not None:
            self._events.append((block, True))
        return True

    def _forget(self, key: int, _reference: object) -> None:
        block = self._blocks.pop(key)
        del self._references[key]
        self.live_bytes -= block.num_bytes
        if self._events is not None:
            self._events.append((block, False))

    def reset_peak(self) -> None:
        """Begins to look for a new peak."""
        self.peak_bytes = self.live_bytes

    def begin_step(self) -> None:
        """Begins to remember the memory of a step."""
        self.reset_peak()
        self._before = list(self._blocks.values())
        self._events = []
        self._ends_of_calls = {}

    def begin_forward(self, call: int) -> None:
        """Enters the forward pass of a micro-batch, of one model chunk."""
        self.phase, self.call = "forward", call

    def end_forward(self) -> None:
        """Leaves it."""
        if self._events is not None:
            self._ends_of_calls[self.call] = len(self._events)
        self.phase, self.call = "schedule", -1

    def blocks_of(self, tensors: Any) -> set[int]:
        """Returns the identities of the blocks that hold the given tensors."""
        found = set()
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                found.add(id(block))
        return found

    def end_step(self, held: Mapping[str, set[int]]) -> "Peak":
        """Returns the step's peak by kind.

        Args:
            held: Identities of the blocks of ``weights``, ``gradients`` and ``optimizer``. Memory
                that a forward pass allocated and left behind for its backward pass is
                ``activations``; everything else is ``temporary``.
        """
        events = self._events or []
        self._events = None
        live = most = sum(block.num_bytes for block in self._before)
        last = 0
        for number, (block, is_new) in enumerate(events, 1):
            live += block.num_bytes if is_new else -block.num_bytes
            if live > most:
                most, last = live, number
        alive = dict.fromkeys(self._before)
        died: dict[int, int] = {}
        for number, (block, is_new) in enumerate(events):
            if not is_new:
                died[id(block)] = number
            if number < last:
                if is_new:
                    alive[block] = None
                else:
                    del alive[block]
        peak = Peak(most, events[last - 1][0].phase if last else "start-up")
        for block in alive:
            kind = next((kind for kind, ids in held.items() if id(block) in ids), None)
            if kind is None:
                end = self._ends_of_calls.get(block.call, len(events))
                is_kept = block.call >= 0 and died.get(id(block), len(events)) >= end
                kind = "activations" if is_kept and block.number >= 0 else "temporary"
            peak.bytes_by_kind[kind] += block.num_bytes
            peak.bytes_by_line[kind, block.place[0]] += block.num_bytes
        self._before = []
        return peak

    # Everything else.

    def add_synchronization(self, what: str) -> None:
        """Records that the host waits for the GPU."""
        self.ledger.synchronizations[self.current_phase(), what, place()] += 1

    def add_cpu_tensor(self, operator: str) -> None:
        """Records a CPU tensor among the arguments of an operator on the device."""
        self.ledger.cpu_tensors[self.current_phase(), operator, place()] += 1

    def add_launch(self, operator: str) -> None:
        """Records a kernel launch."""
        self.num_launches += 1
        self.ledger.launches[self.current_phase()] += 1
        self.ledger.operators[operator] += 1

    def add_flops(self, operator: str, flops: int) -> None:
        """Records floating-point operations of matrix products and attention."""
        self.ledger.flops[self.current_phase(), operator] += flops

    def add_message(self, group: str, collective: str, num_bytes: int, wire_bytes: float) -> None:
        """Records a collective."""
        key = (self.current_phase(), group, collective)
        message = self.ledger.messages.setdefault(key, Message())
        message.num_calls += 1
        message.num_bytes += num_bytes
        message.wire_bytes += wire_bytes

    def take(self) -> Ledger:
        """Returns what was recorded since the last call."""
        ledger, self.ledger = self.ledger, Ledger()
        return ledger


@dataclass
class Peak:
    """The memory of a step at its peak.

    Attributes:
        num_bytes: All of it.
        phase: The phase in which it was reached.
        bytes_by_kind: By kind of memory.
        bytes_by_line: By kind and the line that allocated it.
    """

    num_bytes: int
    phase: str
    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    bytes_by_line: Counter[tuple[str, str]] = field(default_factory=Counter)
