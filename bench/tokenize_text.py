"""Tokenizes 100 MB of Python files, GPT-2 encoding: `python bench/tokenize_text.py ours|raw REPEATS`; prints JSON.

ours: `prepare`, from a folder of files to verified shards. raw: `tiktoken` alone, on texts that are in memory already,
with as many threads as there are cores, tokens thrown away.
"""

import json
import os
import resource
import site
import sys
import tempfile
import time
from pathlib import Path

SIZE = 100_000_000


def corpus() -> list[str]:
    """Texts of the installed packages' modules, in the order of their paths, until there are `SIZE` bytes."""
    texts, total = [], 0
    for path in sorted(Path(site.getsitepackages()[0]).rglob("*.py")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        if text:
            texts.append(text)
            total += len(text.encode())
        if total >= SIZE:
            return texts
    sys.exit(f"the installed packages have only {total:,} bytes of modules; install the extra bench")


def ours(texts: list[str], folder: Path, number: int) -> float:
    from gptjax.config.data import DataConfig
    from gptjax.config.tokenizer import TokenizerConfig
    from gptjax.text.prepare import prepare

    started = time.perf_counter()
    prepare(DataConfig(path=(str(folder / "text"),)), TokenizerConfig(), folder / f"cache{number}")
    return time.perf_counter() - started


def raw(texts: list[str], folder: Path, number: int) -> float:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    started = time.perf_counter()
    for first in range(0, len(texts), 1000):
        encoding.encode_ordinary_batch(texts[first : first + 1000], num_threads=os.cpu_count() or 1)
    return time.perf_counter() - started


def main() -> None:
    side, repeats = {"ours": ours, "raw": raw}[sys.argv[1]], int(sys.argv[2])
    texts = corpus()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for number, text in enumerate(texts):
            (folder / "text" / f"{number:06}.txt").write_text(text, encoding="utf-8", newline="")
        if side is ours:
            texts.clear()
        times = [side(texts, folder, number) for number in range(repeats)]
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"times": times, "work": SIZE, "peak_bytes": max(usage) * 1024}))


if __name__ == "__main__":
    main()
