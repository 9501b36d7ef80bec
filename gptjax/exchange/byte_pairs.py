"""Byte pairs in the format of the tokenizers library, and in that of tiktoken, which gptjax uses.

Both merge the pair with the lowest rank first. The tokenizers library has a list of merges; tiktoken uses the id of the
merged token as its rank. So an encoding can be converted if the ids of merged tokens increase along the list.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

from gptjax.text.train_bpe import byte_of_character

# The pattern of the tokenizers library's ByteLevel, in tiktoken's syntax.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The operand of a counted repetition: a class, an escape, a group without inner groups, or a character.
_ATOM = r"(\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|[^\\\[\]()|])"
_POSSESSIVE = re.compile(_ATOM + r"(\{\d+(?:,\d*)?\})\+")
_ATOMIC = re.compile(r"\(\?>" + _ATOM + r"(\{\d+(?:,\d*)?\})\)")
_CHARACTER_OF = {byte: character for character, byte in byte_of_character().items()}


class NotConvertible(Exception):
    """The reason why a folder's tokenizer cannot be converted exactly."""


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A byte-pair encoding."""

    ids: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    """Regular expression that splits text into words, in tiktoken's syntax."""
    special: dict[str, int]

    def named_ids(self) -> dict[str, int]:
        """The ids by the tokenizers library's names of tokens."""
        vocab = {_name(token): i for token, i in self.ids.items()} | self.special
        return dict(sorted(vocab.items(), key=lambda item: item[1]))

    def named_merges(self) -> list[tuple[str, str]]:
        """The merges with the tokenizers library's names of tokens."""
        return [(_name(left), _name(right)) for left, right in self.merges]


def read_pairs(content: dict, extra: dict[str, int]) -> BytePairs:
    """Reads the content of a tokenizer.json; `extra` are added tokens of other files.

    Raises:
        NotConvertible: The tokenizer is no byte-pair encoding on bytes, or splits text in another way than tiktoken.
    """
    model = content["model"]
    if model.get("type") != "BPE":
        raise NotConvertible(f"its model is {model.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise NotConvertible(f"it uses {name}")
    if content.get("normalizer"):
        raise NotConvertible("it changes the text before encoding it (normalizer)")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = extra | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return make_pairs(
        model["vocab"], merges, _pattern(content["pre_tokenizer"]), added, bool(model.get("ignore_merges"))
    )


def _pattern(pre_tokenizer: dict) -> str:
    """The regular expression that splits text."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last["type"] != "ByteLevel":
        raise NotConvertible("it does not work on bytes")
    if last.get("add_prefix_space"):
        raise NotConvertible("it puts a space before the text (add_prefix_space)")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(splits) != 1 or last.get("use_regex", True) or splits[0]["type"] != "Split":
        raise NotConvertible("it cuts text in several steps")
    if splits[0]["behavior"] != "Isolated" or splits[0].get("invert") or "Regex" not in splits[0]["pattern"]:
        raise NotConvertible("it does not cut text by one regular expression")
    return _from_library(splits[0]["pattern"]["Regex"])


def make_pairs(
    vocab: dict[str, int], merges: Iterable[tuple], pattern: str, added: dict[str, int], whole_words: bool
) -> BytePairs:
    """Converts names to bytes. A token is special if no text encodes to it: no byte, not merged, and no word.

    `whole_words`: a word that is a token is encoded to it even if merges do not produce it.

    Raises:
        NotConvertible: A name has a character that stands for no byte.
    """
    byte_of = byte_of_character()

    def to_bytes(name: str) -> bytes:
        if unknown := next((c for c in name if c not in byte_of), None):
            raise NotConvertible(f"token {name!r} has {unknown!r}, which is no byte's name")
        return bytes(byte_of[c] for c in name)

    merges = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    merged = {left + right for left, right in merges}

    def is_plain(name: str) -> bool:
        if name in added or not set(name) <= byte_of.keys():
            return False
        return whole_words or len(name) == 1 or to_bytes(name) in merged

    special = added | {name: i for name, i in vocab.items() if not is_plain(name)}
    ids = {to_bytes(name): i for name, i in vocab.items() if is_plain(name)}
    return BytePairs(ids, merges, pattern, special)


def library_tokenizer(pairs: BytePairs) -> Any:
    """Returns the encoding as a tokenizer of the tokenizers library."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # Like tiktoken, a word that is a token becomes that token even if merges do not produce it.
    tokenizer = Tokenizer(models.BPE(vocab=pairs.named_ids(), merges=pairs.named_merges(), ignore_merges=True))
    if pairs.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_to_library(pairs.pattern)), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(pairs.special, key=pairs.special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _name(token: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in token)


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that is merged to each token, found by applying merges of lower rank. Some tokens have no such pair."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _merge_below(ranks, token, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _merge_below(ranks: dict[bytes, int], token: bytes, rank: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, at = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(itertools.pairwise(parts)))
        if best >= rank:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _to_library(pattern: str) -> str:
    """Translates a regular expression of tiktoken to Oniguruma's syntax, which the tokenizers library uses.

    In tiktoken `X{1,3}+` is a possessive quantifier; in Oniguruma it means `(?:X{1,3})+`.
    """
    return _POSSESSIVE.sub(r"(?>\1\2)", pattern)


def _from_library(pattern: str) -> str:
    """Inverse of `_to_library`."""
    return _ATOMIC.sub(r"\1\2+", _POSSESSIVE.sub(r"(?:\1\2)+", pattern))
