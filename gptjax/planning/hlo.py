"""Parses the text of a program that XLA compiled: its computations, how often each runs, and the sizes of its arrays.

Array sizes are those of one device.
"""

import collections
import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
MOVES = ("bitcast", "copy", "transpose", "reshape")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, which is one line of the text."""

    name: str
    shape: str
    """Shape of the result; a tuple of results is in parentheses."""
    op: str
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands."""
    is_root: bool

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """Type and number of elements of each result."""
        return [(kind, _element_count(sizes)) for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", self.shape)]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each result."""
        return [count * BYTES.get(kind, 4) for kind, count in self.arrays]

    @property
    def origin(self) -> str:
        """Name of the traced operation that it was compiled from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """Name of the computation that an attribute refers to."""
        found = re.search(rf"{attribute}=%([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def number(self, attribute: str) -> int:
        """Value of an integer attribute; 0 if it is absent."""
        found = re.search(rf"{attribute}=(\d+)", self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and the users of each."""

    instructions: dict[str, Instruction]
    users: dict[str, list[Instruction]]

    @property
    def root(self) -> Instruction:
        """The instruction that the computation returns."""
        return next(one for one in self.instructions.values() if one.is_root)

    def source(self, name: str) -> Instruction | None:
        """Follows copies, transposes and reshapes to the instruction that computes an array; None: not in here."""
        found = self.instructions.get(name)
        while found is not None and found.op in MOVES:
            found = self.instructions.get(found.operands[0])
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a program by name."""

    computations: dict[str, Computation]
    entry: str

    def times(self) -> dict[str, float]:
        """Number of runs of each computation; excludes computations inside fusions and reductions.

        Raises:
            ValueError: XLA does not state a loop's trip count.
        """
        times: dict[str, float] = collections.defaultdict(float)

        def visit(name: str, count: float) -> None:
            times[name] += count
            for one in self.computations[name].instructions.values():
                if one.op == "while":
                    visit(one.called("body"), count * _trip_count(one))
                elif one.op == "call":
                    visit(one.called("to_apply"), count)

        visit(self.entry, 1.0)
        return dict(times)


def parse(text: str) -> Program:
    """Parses the result of `Compiled.as_text()`."""
    computations, entry, name = {}, "", ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = re.sub(r"^(ENTRY )?%", "", line).partition(" ")[0]
            entry = name if line.startswith("ENTRY") else entry
            computations[name] = {}
        elif (found := LINE.match(line)) and name:
            root, label, shape, op, rest = found.groups()
            inside, _, attributes = rest.partition(")")
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            attributes = inside if op in ("parameter", "constant") else attributes
            computations[name][label] = Instruction(label, shape, op, operands, attributes, bool(root))
    return Program({name: _with_users(found) for name, found in computations.items()}, entry)


def _with_users(instructions: dict[str, Instruction]) -> Computation:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in instructions.values():
        for operand in dict.fromkeys(one.operands):
            users[operand].append(one)
    return Computation(instructions, users)


def _trip_count(loop: Instruction) -> int:
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found is None:
        raise ValueError(f"{loop.name}: XLA does not state the trip count of this loop")
    return int(found[1])


def _element_count(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)
