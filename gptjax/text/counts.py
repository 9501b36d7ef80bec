"""Counts of what a reader left out or changed, and the words in which they are reported."""

from collections.abc import Mapping

COUNTED = {
    "unknown_files": "files of other kinds passed over",
    "invalid_utf8_skipped": "left out: not UTF-8",
    "invalid_utf8_replaced": "with bytes replaced that are not UTF-8",
    "empty": "left out: empty",
    "short": "left out: too short",
    "duplicate": "left out: duplicates",
    "missing_label": "left out: without a label (null, empty, -1 or -100; a number that is a class can be named in"
    " task.labels)",
    "turns_without_text": "turns without text skipped",
    "chats_without_target": "chats left out: no turn of the assistant has text",
}
"""The text of each count, after its number."""


def counted(counts: Mapping[str, int]) -> list[str]:
    """Each count that is not zero in words: "3 left out: empty"."""
    return [f"{counts[name]:,} {text}" for name, text in COUNTED.items() if counts.get(name)]
