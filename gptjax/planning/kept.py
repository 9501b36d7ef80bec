"""What a compiled step keeps of its forward pass for its backward pass.

JAX notes in each instruction where it comes from: `jvp(...)` is the forward pass, `transpose(jvp(...))` the backward
pass, what it computes again included.
"""

import collections

from gptjax.planning.hlo import Computation, Instruction, Program

VIEWS = ("bitcast", "tuple", "get-tuple-element")


def kept_bytes(program: Program) -> int:
    """Bytes on one device. Of several passes (a first micro-batch, the loop over the others) the one that keeps most
    counts, since they do not run at once.
    """
    return max(max(_kept(program, program.computations[name]).values(), default=0) for name in program.times())


def _kept(program: Program, computation: Computation) -> dict[str, int]:
    """Bytes that stay within a computation, by the pass that they belong to."""
    total = collections.defaultdict(int)
    for one in computation.instructions.values():
        if one.op in VIEWS or not _forward(one):
            continue
        of_pass = one.origin.partition("jvp(")[0]
        if one.shape.startswith("("):
            for user in computation.users[one.name]:
                number = user.number("index")
                if user.op == "get-tuple-element" and _read_backward(computation, user):
                    total[of_pass] += 0 if _passed_on(program, one, number) else one.sizes[number]
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


def _passed_on(program: Program, loop: Instruction, number: int) -> bool:
    """Whether a loop hands something on as it got it."""
    if loop.op != "while":
        return False
    body = program.computations[loop.called("body")]
    source = body.instructions[body.root.operands[number]]
    return source.op == "get-tuple-element" and source.number("index") == number
