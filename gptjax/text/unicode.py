"""Applies `data.invalid_utf8` to text that is not valid Unicode.

Readers decode with "surrogateescape": an invalid byte becomes one of U+DC80 to U+DCFF. So one check for lone surrogates
finds invalid bytes and also unpaired surrogates from JSON escapes.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

from gptjax.config.data import DataConfig
from gptjax.errors import UserError

UTF16_HINT = "(the file looks like UTF-16: set data.encoding=utf-16)"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class InvalidText:
    """The policy of `data.invalid_utf8`; counts what it changes."""

    data: DataConfig
    counts: Counter[str]

    def text(self, text: str, where: str) -> str | None:
        """Makes text valid that was decoded with "surrogateescape"; None: leave the document out.

        Raises:
            UserError: The text is invalid and the policy is "error"; the message names the first invalid byte.
        """
        raw = text.encode("utf-8", "surrogateescape")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return raw.decode("utf-8", "replace") if self._accepts(self._describe(raw, error.start), where) else None

    def accepts_surrogate(self, text: str, place: int, where: str) -> bool:
        """Whether to keep a row whose text has an unpaired surrogate at `place`.

        Raises:
            UserError: Under policy "error".
        """
        return self._accepts(f"U+{ord(text[place]):04X} at character {place} is half of a surrogate pair", where)

    def _accepts(self, what: str, where: str) -> bool:
        if self.data.invalid_utf8 == "error":
            raise UserError(f"{where}: {what}; mend it, or set data.invalid_utf8 to replace or skip")
        self.counts[f"invalid_utf8_{'skipped' if self.data.invalid_utf8 == 'skip' else 'replaced'}"] += 1
        return self.data.invalid_utf8 == "replace"

    def _describe(self, raw: bytes, place: int) -> str:
        if self.data.encoding != "utf-8":
            return f"the character at offset {place} is not valid {self.data.encoding} (data.encoding)"
        what = f"byte 0x{raw[place]:02x} at offset {place} is not "
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return f"{what}UTF-8 {UTF16_HINT}"
        return f"{what}UTF-8 (data.encoding can name another encoding, such as latin-1)"


def has_surrogate(text: str) -> bool:
    """Whether a text has a lone surrogate, so that it cannot be encoded as UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def find_surrogate(value: Any) -> tuple[str, int] | None:
    """The first text with a lone surrogate in nested values, and the surrogate's position."""
    if isinstance(value, str):
        found = _SURROGATE.search(value) if has_surrogate(value) else None
        return None if found is None else (value, found.start())
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            if (inner := find_surrogate(item)) is not None:
                return inner
    return None


def replace_invalid(value: Any) -> Any:
    """Replaces invalid characters in nested values by U+FFFD."""
    if isinstance(value, str):
        if not has_surrogate(value):
            return value
        halves = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", value)
        return halves.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {replace_invalid(key): replace_invalid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_invalid(item) for item in value]
    return value
