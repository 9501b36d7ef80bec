"""Reads the traces of JAX's profiler: how long the operations of a program take by the clock."""

import collections
import re
from collections.abc import Sequence
from pathlib import Path

import jax

CONTAINERS = ("while", "call", "conditional")
"""Operations whose time is that of what they hold."""
KINDS = {
    "matmul": r"dot|gemm|convolution|matmul|cublas",
    "attention": r"attention|flash|splash|cudnn",
    "collective": r"all-reduce|all-gather|reduce-scatter|all-to-all|collective|send|recv",
    "copy": r"copy|transpose|bitcast|reshape|slice|pad|concatenate|dynamic-update",
    "reduction": r"reduce|sort|scatter|gather",
    "custom call": r"custom-call",
    "fused elementwise": r"fusion|loop_|add|multiply|exp|tanh|convert|select|compare|broadcast",
}
"""Kinds of operations by patterns of their names; the first that matches counts."""


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


def by_kind(times: collections.Counter) -> collections.Counter:
    """Adds up the times of operations of a kind."""
    kinds = collections.Counter()
    for name, time in times.items():
        kinds[kind_of(name)] += time
    return kinds


def kind_of(name: str) -> str:
    """The kind of an operation, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
