"""make bench: gptjax and PyTorch alternate, A B A B, and each run is a separate process.

The peer is the fastest of `transformers` and a plain PyTorch model, eager and compiled.

Prints the table of docs/performance.md and writes every time measured to bench/results/. Arguments choose rows by name
or by the beginning of their names: `python bench/run.py small medium_bfloat16 --rounds 5`. Nothing else should run
meanwhile.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from work import GENERATION, TRAINING

HERE = Path(__file__).parent
# The user has chosen an allocator setting, so gptjax does not restart itself (`gptjax/machine/allocator.py`).
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STEPS = {"small": 100, "medium": 8, "124m": 4, "llama": 4}
DTYPES = ("bfloat16", "float32")
MODES = ("eager", "compile", "plain_eager", "plain_compile")


def rows(on_gpu: bool) -> dict[str, tuple]:
    """Name of a row → (verb, work, our dtype, the peer's dtypes, repetitions, environment of both sides)."""
    table = {}
    if on_gpu:
        for name in ("124m_gpu", "350m_gpu", "llama_gpu"):
            table[f"{name}_bfloat16"] = ("train", name, "bfloat16", ["bfloat16"], 20, {})
        for sequences in (1, 8, 32):
            table[f"generate_{sequences}_bfloat16"] = ("generate", str(sequences), "bfloat16", list(DTYPES), 3, {})
        return table
    for name, steps in STEPS.items():
        for dtype in DTYPES:
            table[f"{name}_{dtype}"] = ("train", name, dtype, [dtype], steps, {})
            table[f"{name}_{dtype}_same_pages"] = ("train", name, dtype, [dtype], steps, HUGE_PAGES)
    for length in (256, 512, 1024, 2048, 4096):
        table[f"long_{length}"] = ("train", f"long_{length}", "bfloat16", ["bfloat16"], 4, {})
    for sequences, dtype in ((1, "float32"), (1, "bfloat16"), (1, "int8"), (8, "bfloat16"), (32, "bfloat16")):
        table[f"generate_{sequences}_{dtype}"] = ("generate", str(sequences), dtype, list(DTYPES), 3, {})
    table["tokenize"] = ("tokenize", "100_MB", "", [""], 2, {})
    table["whole"] = ("whole", "shakespeare_cpu", "bfloat16", ["float32", "bfloat16"], 1, {})
    return table


def choose(table: dict[str, tuple], names: list[str]) -> dict[str, tuple]:
    """The rows that have one of the names; a name that no row has chooses the rows that begin with it."""
    beginnings = tuple(name for name in names if name not in table)
    return {name: row for name, row in table.items() if name in names or name.startswith(beginnings)}


def run(program: str, *arguments: str, environment: dict) -> dict:
    """One process; returns what it printed as JSON on its last line."""
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_side(ours: bool, verb: str, work: str, dtype: str, count: int, mode: str, environment: dict) -> dict:
    """What one process of one side measured."""
    if verb == "tokenize":
        return run("tokenize_text.py", "ours" if ours else "raw", str(count), environment=environment)
    if ours:
        return run("ours.py", verb, work, dtype, str(count), environment=environment)
    return run("peer.py", verb, work, dtype, str(count), mode, environment=environment)


def compare(rounds: int, modes: list[str], row: tuple) -> dict:
    """Alternates both sides; the ratio of each pair is ours to the peer's, in work per second.

    The peer's dtypes and modes are all tried in the first round, the fastest goes on.
    """
    verb, work, dtype, peer_dtypes, count, environment = row
    ours, peers, ratios = [], [], []
    if verb == "tokenize":
        modes = [""]
    elif verb == "generate":  # the plain model has no cache
        modes = [mode for mode in modes if not mode.startswith("plain")]
    ways = [(peer_dtype, mode) for peer_dtype in peer_dtypes for mode in modes]
    for _ in range(rounds):
        tried = {way: one_side(False, verb, work, way[0], count, way[1], environment) for way in ways}
        ways = [min(tried, key=lambda way: statistics.median(tried[way]["times"]))]
        peer, own = tried[ways[0]], one_side(True, verb, work, dtype, count, "", environment)
        peers.append(peer)
        ours.append(own)
        ratios.append(statistics.median(peer["times"]) / statistics.median(own["times"]))
    return {"ours": ours, "peer": peers, "ratios": ratios, "peer_ran": " ".join(ways[0]).strip()}


def line(name: str, result: dict) -> str:
    """A row of the table."""
    speeds = [
        statistics.median(side["work"] / statistics.median(side["times"]) for side in result[key])
        for key in ("ours", "peer")
    ]
    memory = [max(side["peak_bytes"] for side in result[key]) / 1e9 for key in ("ours", "peer")]
    ratios = sorted(result["ratios"])
    spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    return (
        f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f}, {result['peer_ran']}"
        f" | {statistics.median(ratios):.2f} ({spread}) | {memory[0]:.1f} / {memory[1]:.1f} |"
    )


def share_of_peak(name: str, dtype: str, result: dict, peaks: dict) -> str:
    """Achieved FLOP/s as a share of the measured matmul peak, or bytes/s as a share of the measured bandwidth."""
    speed = statistics.median(side["work"] / statistics.median(side["times"]) for side in result["ours"])
    if name in ("whole", "tokenize"):
        return ""
    if name.startswith("generate"):
        weights = 12 * GENERATION.n_layer * GENERATION.n_embd**2 + GENERATION.n_embd * GENERATION.vocab_size
        sequences, size = int(name.split("_")[1]), {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        bandwidth = peaks["bandwidth"]
        return f"{100 * speed / sequences * size * weights / bandwidth:.0f} % of {bandwidth / 1e9:.1f} GB/s"
    return f"{100 * speed * TRAINING[name].flops_per_token / peaks[dtype]:.0f} % of {peaks[dtype] / 1e9:,.0f} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=[""])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, help="of the peer; the fastest counts")
    options = parser.parse_args()
    if "compile" in options.modes and not (shutil.which("g++") or shutil.which("clang++")):
        options.modes = [mode for mode in options.modes if mode.endswith("eager")]
        print("torch.compile needs a C++ compiler and there is none, so the peers run eager alone")
    peaks = run("peak.py", environment={})
    chosen = choose(rows("gpu" in peaks), options.rows)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(json.dumps(peaks))
    print("| work | gptjax, tokens (bytes)/s | peer, the same | ratio (spread of pairs) | peak memory, GB | share |")
    print("|---|---|---|---|---|---|")
    path = HERE / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(exist_ok=True)
    results = {}

    def keep(name: str, result: dict) -> None:  # row by row, so that an interrupted bench keeps what it measured
        results[name] = result
        path.write_text(json.dumps({"results": results}))

    for name, row in chosen.items():
        verb, work, dtype = row[:3]
        peaks = run("peak.py", environment={})  # for each row: a shared machine is not the same an hour later
        keep(name, compare(options.rounds, options.modes, row) | {"peaks": peaks})
        share = share_of_peak(work if verb == "train" else name, dtype, results[name], peaks)
        print(f"{line(name, results[name])} {share} |", flush=True)
    if "start".startswith(tuple(options.rows)) and "gpu" not in peaks:
        keep("start", run("start.py", environment={}))
        print(f"start, seconds: {results['start']}")
    print(f"all times: {path}")


if __name__ == "__main__":
    main()
