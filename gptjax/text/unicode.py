"""Text that is no valid Unicode, and what `data.invalid_utf8` does with it.

Readers decode with "surrogateescape": a byte that is no UTF-8 becomes one of U+DC80 to U+DCFF. So one check for lone
surrogates finds such bytes and the halves of surrogate pairs that JSON can spell.
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
        """Returns text that was decoded with "surrogateescape", made valid; None: leave the document out.

        Raises:
            UserError: It is not valid, under policy "error"; the message names the first byte.
        """
        raw = text.encode("utf-8", "surrogateescape")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return raw.decode("utf-8", "replace") if self._accepts(self._describe(raw, error.start), where) else None

    def accepts_surrogate(self, text: str, place: int, where: str) -> bool:
        """Whether a row stays whose text has half of a surrogate pair at `place`.

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
    """Whether a text has a lone surrogate, so that it has no UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def find_surrogate(value: Any) -> tuple[str, int] | None:
    """The first text with a lone surrogate in nested plain values, and where in it the surrogate stands."""
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
    """Nested plain values with U+FFFD in place of what is no valid Unicode."""
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
