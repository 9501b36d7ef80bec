"""Makes short labelled texts like news: python configs/finetune/make_news.py [FOLDER]

Rows are the descriptions of Debian's packages, cut at 45 words; the label is one of four topics, by the package's
section. `apt-get update` fetches the descriptions (16 MB) into the folder; the machine's own lists stay as they are. Of
each source package one description is used, so no text has a near copy on the other side. The folder (default
runs/finetune/rows) gets 6,000 rows in news.train.jsonl and the others in news.validation.jsonl and news.test.jsonl.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOPICS = {
    "network": ("net", "web", "httpd", "mail", "comm"),
    "system": ("admin", "utils", "kernel", "shells"),
    "media": ("sound", "video", "graphics", "games"),
    "science": ("science", "math", "electronics"),
}
TRAINING_ROWS = 6000
WORDS = 45
SHORTEST = 8
"""Words of a description."""


def main() -> None:
    """Fetches the descriptions, writes the files, and prints how many rows each has."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/finetune/rows")
    lists = (folder / "apt").absolute()
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    options = ("-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=en", "-o", "Dir::Cache::pkgcache=")
    subprocess.run(["apt-get", "update", "-qq", *options, "-o", "Dir::Cache::srcpkgcache="], check=True)
    topic = {section: topic for topic, sections in TOPICS.items() for section in sections}
    texts = {
        (part["Package"], part["Description-md5"]): part["Description-en"]
        for part in stanzas(lists, "*_main_i18n_Translation-en*")
    }
    files: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    used = set()
    for part in stanzas(lists, "*_main_binary-*_Packages*"):
        text = texts.get((part["Package"], part.get("Description-md5", "")), "").replace("\n.\n", "\n").split()
        source = part.get("Source", part["Package"]).split()[0]
        label = topic.get(part.get("Section", ""))
        if label is None or len(text) < SHORTEST or source in used:
            continue
        used.add(source)
        number = int(hashlib.sha256(source.encode()).hexdigest(), 16)
        row = json.dumps({"text": " ".join(text[:WORDS]), "label": label}) + "\n"
        if number % 4 and len(files["train"]) < TRAINING_ROWS:
            files["train"].append(row)
        elif number % 4 == 0:
            files["test" if number // 4 % 2 else "validation"].append(row)
    for name, rows in files.items():
        (folder / f"news.{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{folder / f'news.{name}.jsonl'}: {len(rows):,} rows")


def stanzas(lists: Path, pattern: str) -> Iterator[dict[str, str]]:
    """The entries of apt's lists, each from field to value."""
    for path in sorted(lists.glob(pattern)):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        for part in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n\n"):
            fields: dict[str, str] = {}
            name = ""
            for line in part.splitlines():
                if line.startswith(" "):
                    fields[name] += "\n" + line[1:]
                else:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
            if "Package" in fields:
                yield fields


if __name__ == "__main__":
    main()
