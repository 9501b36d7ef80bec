"""Collectives in a compiled program: which devices communicate, how often, and how many bytes."""

import dataclasses
import re

import numpy as np

from gptjax.planning.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str
    """One of `KINDS`. An all-reduce of which each device reads only a slice counts as a reduce-scatter, because other
    compilers emit a reduce-scatter in its place.
    """
    sent: float
    """Bytes that a device sends in one call, with a ring algorithm. Arrays that XLA:CPU converts from bfloat16 to
    float32 to send them count as bfloat16.
    """
    times: float
    """Number of calls."""
    groups: np.ndarray
    """Device numbers, one row for each group of devices that communicate."""

    def crosses_nodes(self, node: int) -> bool:
        """Whether a group has devices of several nodes, with `node` devices in each node."""
        return bool(np.any(self.groups // node != self.groups[:, :1] // node))


def collectives(program: Program, devices: int) -> list[Collective]:
    """Returns all collectives of a program that runs on `devices` devices."""
    found = []
    for name, times in program.times().items():
        computation = program.computations[name]
        for one in computation.instructions.values():
            if one.op in KINDS:
                found += _parts(program, computation, one, times, _groups(one.attributes, devices))
    return found


def _parts(program, computation, one: Instruction, times: float, groups: np.ndarray) -> list[Collective]:
    """Splits a collective in two if only slices of some of its results are read."""
    n, sent = groups.shape[1], {}
    sliced = _sliced(program, computation, one) if one.op == "all-reduce" else [False] * len(one.sizes)
    for number, (size, only_slice) in enumerate(zip(one.sizes, sliced, strict=True)):
        kind = "reduce-scatter" if only_slice else one.op
        operand = one.operands[min(number, len(one.operands) - 1)]
        size = size / 2 if _was_bfloat16(program, computation, operand) else size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        share = n - 1.0 if one.op == "reduce-scatter" else share
        sent[kind] = sent.get(kind, 0.0) + share * size
    return [Collective(kind, size, times, groups) for kind, size in sent.items()]


def _was_bfloat16(program: Program, computation: Computation, operand: str) -> bool:
    """Whether an array was converted from bfloat16 to float32 directly before the collective."""
    source = computation.source(operand)
    if source is not None and source.op == "fusion":
        computation = program.computations[source.called("calls")]
        source = computation.source(computation.root.name)
    if source is None or source.op != "convert" or not source.shape.startswith("f32"):
        return False
    before = computation.instructions.get(source.operands[0])
    return before is not None and before.shape.startswith("bf16")


def _sliced(program: Program, computation: Computation, one: Instruction) -> list[bool]:
    """For each result, whether the device reads only a slice of it."""
    users = computation.users[one.name]
    if not one.shape.startswith("("):
        return [_only_sliced(program, computation, one.name)]
    taken = {user.number("index"): user.name for user in users if user.op == "get-tuple-element"}
    return [number in taken and _only_sliced(program, computation, taken[number]) for number in range(len(one.arrays))]


def _only_sliced(program: Program, computation: Computation, name: str) -> bool:
    users = computation.users[name]
    return bool(users) and all(_slices(program, computation, user, name) for user in users)


def _slices(program: Program, computation: Computation, user: Instruction, name: str) -> bool:
    if user.op == "dynamic-slice":
        return user.operands[0] == name
    if user.op in ("bitcast", "copy", "convert"):
        return _only_sliced(program, computation, user.name)
    if user.op != "fusion":
        return False
    inner = program.computations[user.called("calls")]
    numbers = [number for number, operand in enumerate(user.operands) if operand == name]
    parameters = [one.name for one in inner.instructions.values() if one.op == "parameter"]
    by_number = {int(inner.instructions[one].attributes): one for one in parameters}
    return all(_only_sliced(program, inner, by_number[number]) for number in numbers)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Parses device groups in any of XLA's notations."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{?(\d+,\d+)", found[1])])
    text = attributes[attributes.index("replica_groups=") + len("replica_groups=") :]
    if text.startswith("{{"):
        rows = text[1 : text.index("}}") + 1]
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", rows)])
    if found := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(found[3]).reshape(int(found[1]), int(found[2]))
    if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        return _mesh_groups(found[1], found[2], found[3], devices)
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """Parses `[8,64]T(1,0)`: consecutive numbers from 0 in that shape, transposed and flattened."""
    shape, _, order = text.partition("T")
    shape = [int(n) for n in shape.strip("[]").split(",")]
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in order.strip("()").split(",")]) if order else numbers).reshape(-1)


def _mesh_groups(axes: str, ids: str | None, over: str, devices: int) -> np.ndarray:
    """Groups over some axes of a mesh. An axis may be used in part: `'a':(2)4` is the factor 4 of 2 x 4 x rest."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    parts = {name: [(size, False)] for name, size in sizes.items()}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        if size:
            rest = sizes[name] // (int(before) * int(size))
            parts[name] = [(int(before), False), (int(size), True), (rest, False)]
        else:
            parts[name] = [(sizes[name], True)]
    flat = [part for name in sizes for part in parts[name]]
    numbers = (_iota(ids) if ids else np.arange(devices)).reshape([n for n, _ in flat])
    within = [axis for axis, (_, grouped) in enumerate(flat) if grouped]
    across = [axis for axis, (_, grouped) in enumerate(flat) if not grouped]
    count = int(np.prod([flat[axis][0] for axis in within]))
    return numbers.transpose(*across, *within).reshape(-1, count)
