"""Bytes of activations that a compiled step saves in its forward pass for its backward pass.

JAX records the origin of each instruction: `jvp(...)` is the forward pass, `transpose(jvp(...))` the backward pass,
including its recomputations.
"""

import collections

from gptjax.planning.hlo import Computation, Instruction, Program

VIEWS = ("bitcast", "tuple", "get-tuple-element")


def activation_bytes(program: Program) -> int:
    """Bytes on one device. Passes (the first micro-batch, the loop over the others) do not run at the same time, so the
    largest one counts.
    """
    return max(max(_saved(program, program.computations[name]).values(), default=0) for name in program.times())


def _saved(program: Program, computation: Computation) -> dict[str, int]:
    """Bytes that a computation saves, by pass."""
    total = collections.defaultdict(int)
    for one in computation.instructions.values():
        if one.op in VIEWS or not _forward(one):
            continue
        of_pass = one.origin.partition("jvp(")[0]
        if one.shape.startswith("("):
            for user in computation.users[one.name]:
                number = user.number("index")
                if user.op == "get-tuple-element" and _read_backward(computation, user):
                    total[of_pass] += 0 if _loop_invariant(program, one, number) else one.sizes[number]
        elif _read_backward(computation, one):
            total[of_pass] += sum(one.sizes)
    return total


def _forward(one: Instruction) -> bool:
    return "jvp(" in one.origin and not _backward(one)


def _backward(one: Instruction) -> bool:
    return "transpose(jvp(" in one.origin


def _read_backward(computation: Computation, one: Instruction) -> bool:
    for user in computation.users[one.name]:
        if user.op in VIEWS or not user.origin:
            if _read_backward(computation, user):
                return True
        elif _backward(user):
            return True
    return False


def _loop_invariant(program: Program, loop: Instruction, number: int) -> bool:
    """Whether a loop returns one of its inputs unchanged."""
    if loop.op != "while":
        return False
    body = program.computations[loop.called("body")]
    source = body.instructions[body.root.operands[number]]
    return source.op == "get-tuple-element" and source.number("index") == number
