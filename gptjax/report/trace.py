"""Reads the traces of JAX's profiler: how long the operations of a program take by the clock."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

CONTAINERS = ("while", "call", "conditional")
"""Operations whose time is that of what they hold."""
KINDS = {
    "attention": r"attention|flash|splash|fmha",
    "loss": r"cross_entropy",
    "matmul": r"dot|gemm|convolution|matmul|cublas|linear|mlp|weight_gradient|pack_weights",
    "norm": r"layer_norm",
    "collective": r"all-reduce|all-gather|reduce-scatter|all-to-all|collective|\b(send|recv)",
    "elementwise": r"fusion|add|sub|mul|div|exp|log|tanh|rsqrt|convert|select|compare|broadcast",
    "copy": r"copy|transpose|bitcast|reshape|slice|pad|concatenate",
    "reduction": r"reduce|sort|scatter|gather",
}
"""Kinds of operations by patterns of their descriptions; the first that matches counts."""
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", re.MULTILINE)
_TARGET, _SOURCE = re.compile(r'custom_call_target="([^"]*)"'), re.compile(r'op_name="([^"]*)"')


def descriptions(program: str) -> dict[str, str]:
    """What each operation of a compiled program does: the function that it calls, or the end of its source.

    Args:
        program: As `Compiled.as_text` returns it.
    """
    found = {}
    for line in program.splitlines():
        if name := _OPERATION.match(line):
            target, source = _TARGET.search(line), _SOURCE.search(line)
            words = [target[1]] if target else []
            words += [source[1].rpartition("/")[2]] if source else []
            found[name[1]] = " ".join(words)
    return found


def measured(folder: Path) -> dict[str, tuple[collections.Counter, collections.Counter]]:
    """Nanoseconds and numbers of runs of every operation, by module.

    Args:
        folder: Holds one trace.
    """
    spans = collections.defaultdict(list)
    [path] = folder.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats and not str(stats["hlo_op"]).startswith(CONTAINERS):
                spans[stats["hlo_module"]].append((event.start_ns, event.start_ns + event.duration_ns, stats["hlo_op"]))
    return {
        module: (shared_time(found), collections.Counter(name for *_, name in found)) for module, found in spans.items()
    }


def shared_time(spans: Sequence[tuple[float, float, str]]) -> collections.Counter:
    """Time of the clock by name, from starts and ends; operations that overlap share it equally."""
    edges = []
    for index, (start, end, _) in enumerate(spans):
        if end > start:
            edges += [(start, index, True), (end, index, False)]
    times, running, before = collections.Counter(), set(), 0.0
    for time, index, starts in sorted(edges):
        for other in running:
            times[spans[other][2]] += (time - before) / len(running)
        before = time
        (running.add if starts else running.discard)(index)
    return times


def by_kind(times: collections.Counter, described: Mapping[str, str]) -> collections.Counter:
    """Adds up the times of operations of a kind; `described` as `descriptions` returns it."""
    kinds = collections.Counter()
    for name, time in times.items():
        kinds[kind_of(f"{described.get(name, '')} {name}")] += time
    return kinds


def kind_of(description: str) -> str:
    """The kind of an operation, by its description and name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, description, re.IGNORECASE)), "other")
