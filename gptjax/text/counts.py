"""Names and texts of the counters of documents and rows that were left out or changed."""

from collections.abc import Mapping

from gptjax.config.clean import PERSONAL_DATA
from gptjax.text.cleaning.quality import LIMITS

COUNTED = {
    "unknown_files": "files of other kinds ignored",
    "unreadable_files": "files that could not be read to their end",
    "other_pages": "pages left out: redirects, or of other namespaces",
    "vendored_files": "vendored or generated files left out",
    "binary_files": "binary files left out",
    "other_records": "records left out: no page, or compressed or chunked",
    "invalid_utf8_skipped": "left out: not UTF-8",
    "invalid_utf8_replaced": "with bytes replaced that are not UTF-8",
    "empty": "left out: empty",
    "short": "left out: too short",
    "duplicate": "left out: duplicates",
    "language": "left out: another language",
    **{f"quality_{limit}": f"left out: quality rule {limit}" for limit in LIMITS},
    "filter": "left out: by data.clean.filter",
    "contaminated": "left out: share words with evaluation data",
    "near_duplicate": "left out: near duplicates",
    "repeated_parts": "repeated lines or paragraphs removed",
    "repeated_characters": "characters removed: in runs that came before",
    **{f"replaced_{kind}": f"{kind} replaced" for kind in PERSONAL_DATA},
    "missing_label": "left out: without a label (null, empty, -1 or -100; a number that is a class can be named in"
    " task.labels)",
    "unseen_tag": "words to validate on have a tag that training has not seen: they count as wrong",
    "placeholder_label": "left out: the label is a sign for none, such as - or ? (if it is a class, name it in"
    " task.labels)",
    "missing_number": "left out: without a number (null, NaN or empty)",
    "without_answer": "left out: without an answer (null, empty or -1, as in public test sets)",
    "turns_without_text": "turns without text skipped",
    "left_out_by_function": "left out by the function of task.rows",
    "equal_responses": "left out: both responses are the same",
    "chats_without_target": "chats left out: no turn of the assistant has text",
}
"""The text that is printed after the number of each count."""
UNREADABLE = "unreadable: "
"""Prefix of counts of unreadable files; the rest of the name is the error of one file."""
_SHOWN = 3


def counted(counts: Mapping[str, int]) -> list[str]:
    """The text of each count that is not zero, such as "3 left out: empty", and the errors of the first unreadable
    files.
    """
    words = [f"{counts[name]:,} {text}" for name, text in COUNTED.items() if counts.get(name)]
    return words + [name for name in counts if name.startswith(UNREADABLE)][:_SHOWN]


def leaves_out(name: str) -> bool:
    """Whether a counter counts documents that were read and left out."""
    return name != "invalid_utf8_skipped" and COUNTED.get(name, "").startswith("left out: ")
