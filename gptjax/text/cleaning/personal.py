"""Replaces personal data by typed placeholders. Numbers with a checksum are replaced only if the checksum is
correct.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

_SECRET = re.compile(
    r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----.{0,20000}?"
    r"-----END (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # Amazon
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}"  # Slack
    r"|AIza[0-9A-Za-z_-]{35}"  # Google
    r"|[rs]k_live_[0-9A-Za-z]{16,99}|sk-[A-Za-z0-9_-]{20,200}|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}"
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}"  # JSON web token
    r")(?![A-Za-z0-9_])",
    re.DOTALL,
)
# The look-behind allows a match to begin only at the start of a run of such characters. Otherwise a long run without
# "@"
# would take quadratic time.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}")
_CARD = re.compile(r"(?<![0-9A-Za-z.+-])[2-6](?:[ -]?[0-9]){12,18}(?![0-9]|[.-][0-9])")
_IPV4 = re.compile(r"(?<![0-9A-Za-z.-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z-]|\.[0-9])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:.])")
_PHONE = re.compile(
    r"(?<![0-9A-Za-z.+/=_-])(?:"
    r"\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,5}(?:[ .-]?[0-9]{2,5}){1,5}"  # +44 20 7946 0958
    r"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}"  # (212) 555-0100
    r")(?![0-9A-Za-z_]|[-./][0-9])"
)
_IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15),
    **dict.fromkeys(("BE",), 16),
    **dict.fromkeys(("DK", "FI", "FO", "GL", "NL", "SD"), 18),
    **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"), 20),
    **dict.fromkeys(("CH", "HR", "LI", "LV"), 21),
    **dict.fromkeys(("BG", "BH", "CR", "DE", "GB", "GE", "IE", "ME", "RS", "VA"), 22),
    **dict.fromkeys(("AE", "GI", "IL", "IQ", "OM", "SO", "TL"), 23),
    **dict.fromkeys(("AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG"), 24),
    **dict.fromkeys(("LY", "PT", "ST"), 25),
    **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("BI", "DJ", "FR", "GR", "IT", "MC", "MR", "SM"), 27),
    **dict.fromkeys(("AL", "AZ", "BY", "CY", "DO", "GT", "HU", "LB", "NI", "PL", "SV"), 28),
    **dict.fromkeys(("BR", "EG", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU"), 30),
    **dict.fromkeys(("MT", "SC"), 31),
}
_PLACEHOLDER = "<{}>"


def replace_personal_data(text: str, kinds: Sequence[str], counts: Counter[str]) -> str:
    """Replaces each match by `<EMAIL>`, `<PHONE>`, `<IP>`, `<CARD>`, `<IBAN>` or `<SECRET>`.

    Args:
        text: The text of a document.
        kinds: Keys of `FINDERS`.
        counts: Incremented at "replaced_email" and so on.
    """
    for kind, replace in FINDERS.items():
        if kind in kinds:
            text, n = replace(text, _PLACEHOLDER.format(kind.upper()))
            counts[f"replaced_{kind}"] += n
    return text


Finder = Callable[[str, str], tuple[str, int]]


def _all_of(pattern: re.Pattern[str]) -> Finder:
    return lambda text, placeholder: pattern.subn(placeholder, text)


def _checked(pattern: re.Pattern[str], length: Callable[[str], int]) -> Finder:
    """Replaces the first `length(match)` characters of each match; a length of 0 means no replacement."""

    def replace(text: str, placeholder: str) -> tuple[str, int]:
        count = 0

        def one(match: re.Match[str]) -> str:
            nonlocal count
            if not (size := length(match[0])):
                return match[0]
            count += 1
            return placeholder + match[0][size:]

        return pattern.sub(one, text), count

    return replace


def _ip_length(text: str) -> int:
    """Length to replace; 0 for addresses of private networks, loopback and documentation, which identify nobody."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return 0
    return len(text) if address.is_global else 0


def _card_length(text: str) -> int:
    digits = text.replace(" ", "").replace("-", "")
    return len(text) if _is_issued(digits) and _luhn(digits) else 0


def _is_issued(digits: str) -> bool:
    """Whether a card issuer uses numbers with this prefix and length."""
    first2, first3, first4, size = int(digits[:2]), int(digits[:3]), int(digits[:4]), len(digits)
    return (
        (digits[0] == "4" and size in (13, 16, 19))
        or ((51 <= first2 <= 55 or 2221 <= first4 <= 2720) and size == 16)
        or (first2 in (34, 37) and size == 15)
        or ((first4 == 6011 or first2 == 65 or 644 <= first3 <= 649) and size in (16, 19))
        or (3528 <= first4 <= 3589 and size == 16)
        or ((first2 in (36, 38, 39) or 300 <= first3 <= 305) and size == 14)
    )


def _luhn(digits: str) -> bool:
    """Source: ISO/IEC 7812-1, annex B."""
    total = sum(int(digit) for digit in digits[::-2]) + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return total % 10 == 0


def _iban_length(text: str) -> int:
    """Source: ISO 13616 (mod 97 of the rearranged number is 1); lengths from the SWIFT IBAN registry."""
    wanted, size, letters = _IBAN_LENGTHS.get(text[:2], 0), 0, ""
    while len(letters) < wanted and size < len(text):
        letters += text[size].strip()
        size += 1
    if not wanted or len(letters) < wanted or text[size : size + 1].isalnum():
        return 0
    number = int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4]))
    return size if number % 97 == 1 else 0


def _ip(text: str, placeholder: str) -> tuple[str, int]:
    text, n4 = _checked(_IPV4, _ip_length)(text, placeholder)
    text, n6 = _checked(_IPV6, _ip_length)(text, placeholder)
    return text, n4 + n6


def _phone_length(text: str) -> int:
    return len(text) if 8 <= sum(map(str.isdigit, text)) <= 15 else 0


FINDERS: dict[str, Finder] = {
    "secret": _all_of(_SECRET),
    "email": _all_of(_EMAIL),
    "iban": _checked(_IBAN, _iban_length),
    "card": _checked(_CARD, _card_length),
    "ip": _ip,
    "phone": _checked(_PHONE, _phone_length),
}
"""In order of replacement, so that a card number is not taken for a phone number."""
