"""Says where the time of a program goes, by operation: `python bench/by_op.py train 124m bfloat16 5` or
`python bench/by_op.py generate 8 bfloat16 1`; arguments are those of bench/ours.py.

Times are those of XLA's own trace, of the clock: while several operations run at once, each gets an equal part.
Operations of the same kind, shape and source are one row.
"""

import collections
import os
import re
import sys
import tempfile
from pathlib import Path

from ours import generate, train

from gptjax.machine.allocator import restart

ROWS = 20


def main() -> None:
    verb, name, dtype, count = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program out of it is not dumped
        import jax

        from gptjax.report.trace import measured

        with jax.profiler.trace(folder):
            {"train": train, "generate": generate}[verb](name, dtype, int(count))
        found = measured(Path(folder))
        module = max(found, key=lambda module: found[module][0].total())
        shapes = described(Path(folder), module)
    print_table(module, *found[module], shapes)


def described(folder: Path, module: str) -> dict[str, str]:
    """Shape and source of every operation, from the optimized program."""
    found = {}
    for path in folder.glob(f"*.{module}.*after_optimizations.txt"):
        for line in path.read_text().splitlines():
            if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\([^)]*\)|\S+)", line):
                source = re.search(r'op_name="([^"]*)"', line)
                shape = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", match[2])
                found[match[1]] = f"{shape[:40]}  {'/'.join(source[1].split('/')[-3:]) if source else ''}"
    return found


def print_table(module: str, times, counts, shapes: dict[str, str]) -> None:
    rows, runs = collections.Counter(), collections.Counter()
    for name, time in times.items():
        kind = re.sub(r"\.\d+$", "", name) + "  " + shapes.get(name, "")
        rows[kind] += time
        runs[kind] += counts[name]
    total = rows.total()
    print(f"{module}: {total / 1e9:.2f} s in {len(times)} operations")
    for kind, time in rows.most_common(ROWS):
        print(f"{100 * time / total:5.1f} %  {time / 1e6:9.1f} ms  {runs[kind]:7,} runs  {kind}")
    rest = total - sum(time for _, time in rows.most_common(ROWS))
    print(f"{100 * rest / total:5.1f} %  {rest / 1e6:9.1f} ms  the rest")


if __name__ == "__main__":
    restart()
    main()
