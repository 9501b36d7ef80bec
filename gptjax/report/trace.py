"""Reads traces of JAX's profiler: the wall-clock time of a program's operations."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

CONTAINERS = ("while", "call", "conditional")
"""Operations that contain others; their time is that of their contents."""
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
    """Describes each operation of a compiled program by the function it calls, or by the end of its source path.

    Args:
        program: Result of `Compiled.as_text`.
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
    """Nanoseconds and number of executions of every operation, by module.

    Args:
        folder: Folder with one trace.
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
    """Wall-clock time by name, given starts and ends. Operations that overlap share the time equally."""
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
    """Sums the times of operations by kind; `described` is the result of `descriptions`."""
    kinds = collections.Counter()
    for name, time in times.items():
        kinds[kind_of(f"{described.get(name, '')} {name}")] += time
    return kinds


def kind_of(description: str) -> str:
    """The kind of an operation, given its description and name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, description, re.IGNORECASE)), "other")
