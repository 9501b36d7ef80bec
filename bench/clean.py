"""Cleans text with every stage and prints what each one does: documents, characters, CPU time; and peak memory.

python bench/clean.py PATH ... [--cache DIR] [--evaluation FILE ...] [--dask local]

With the same cache, a run that was stopped continues. The limits of the quality rules leave code in.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from gptjax.config.clean import PERSONAL_DATA, CleanConfig, QualityConfig
from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text.prepare import describe, prepare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--cache", default="/tmp/gptjax-clean")
    parser.add_argument("--evaluation", nargs="*", default=())
    parser.add_argument("--dask", default="")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    clean = CleanConfig(
        html="visible",
        repair=True,
        languages=("en",),
        quality=QualityConfig(
            rules=("gopher",), min_word_length=2.0, max_symbols_per_word=0.5, min_alphabetic_words=0.4, min_stop_words=0
        ),
        personal_data=PERSONAL_DATA,
        decontaminate=tuple(options.evaluation),
        near_duplicates=0.8,
        duplicate_parts="paragraphs",
        duplicate_substrings=200,
        workers=options.workers,
        dask=options.dask,
    )
    data = DataConfig(
        path=tuple(options.paths),
        invalid_utf8="skip",
        unreadable_files="skip",
        newlines="unix",
        drop_duplicates=True,
        clean=clean,
    )
    start = time.perf_counter()
    prepared = prepare(data, TokenizerConfig(kind="bytes"), Path(options.cache))
    print(describe(prepared))
    sheet = json.loads((prepared.folder / "data_report.json").read_text())
    print(f"{'stage':<16}{'documents':>10}{'M characters':>14}{'left out':>10}{'CPU s':>8}{'M/s':>8}")
    for stage in sheet["stages"]:
        size, seconds = stage["characters"] / 1e6, max(1e-4, stage["cpu_seconds"])
        documents, left_out = stage.get("documents", 0), stage.get("left_out", 0)
        print(f"{stage['stage']:<16}{documents:>10,}{size:>14,.1f}{left_out:>10,}{seconds:>8.1f}{size / seconds:>8.1f}")
    documents = sheet["documents"]
    print(documents)
    assert documents["read"] == documents["kept"] + sum(documents["left_out"].values())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    for name, who in (("this process", resource.RUSAGE_SELF), ("a worker", resource.RUSAGE_CHILDREN)):
        print(f"peak memory of {name}: {resource.getrusage(who).ru_maxrss / unit:,.0f} MB")
    print(f"{time.perf_counter() - start:,.0f} s in all")


if __name__ == "__main__":
    main()
