"""Converts byte-pair encodings between the format of the tokenizers library and that of tiktoken, which gptjax uses.

Both merge the pair with the lowest rank first. The tokenizers library keeps a list of merges; tiktoken uses the id of
the merged token as its rank. So an encoding can be converted if the ids of merged tokens ascend along the list.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.exchange.hf_files import read_json, write_json
from gptjax.exchange.mixed_texts import mixed_texts
from gptjax.text.tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    LibraryTokenizer,
    Tokenizer,
    bpe_tokenizer_from_ranks,
)
from gptjax.text.train_bpe import byte_of_character

# The pattern of the tokenizers library's ByteLevel, in tiktoken's syntax.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Fingerprint of tiktoken's gpt2: an imported gpt2 is the same tokenizer, so data prepared with either fits.
GPT2_FINGERPRINT = "592fc644bd6e35ef7aed2208176abe31b3da11abac1159c05bbc6e4e7c1da936"
# What a counted repetition applies to: a class, an escape, a group without groups in it, or a character.
_ATOM = r"(\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|[^\\\[\]()|])"
_POSSESSIVE = re.compile(_ATOM + r"(\{\d+(?:,\d*)?\})\+")
_ATOMIC = re.compile(r"\(\?>" + _ATOM + r"(\{\d+(?:,\d*)?\})\)")
_SHOWN = 5  # names in a message


class _NotConvertible(Exception):
    """The reason why a folder's tokenizer cannot be converted exactly."""


@dataclasses.dataclass(frozen=True)
class _BytePairs:
    ids: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    special: dict[str, int]


def import_tokenizer(hf_dir: Path, vocab_size: int, notify: Callable[[str], None]) -> Tokenizer | None:
    """Reads tokenizer.json, or vocab.json and merges.txt; None (and a line to `notify`) where that is not exact.

    The result is compared with the tokenizers library's own reading of these files, on a few thousand mixed texts. The
    end token is that of the model's own config.

    Args:
        hf_dir: The model folder.
        vocab_size: The model's; ids that the tokenizer does not have become reserved tokens.
        notify: Gets one line for each: why the folder's tokenizer is left out, and what of it is not kept.

    Raises:
        UserError: A file is damaged.
    """
    try:
        pairs, theirs = _read(hf_dir)
        _check_order(pairs)
        end_token = _find_end_token(hf_dir, pairs, notify)
        tokenizer = _from_pairs(pairs, vocab_size, end_token)
        if example := _first_difference(tokenizer, theirs, pairs):
            raise _NotConvertible(f"tiktoken would encode some text to other ids, such as {example!r}")
    except _NotConvertible as reason:
        return _through_library(hf_dir, vocab_size, str(reason), notify)
    _report_added(hf_dir, theirs, notify)
    return tokenizer


def _through_library(
    hf_dir: Path, vocab_size: int, reason: str, notify: Callable[[str], None]
) -> LibraryTokenizer | None:
    """The folder's tokenizer.json as the tokenizers library runs it, where it works on bytes; else None, told."""
    from tokenizers import Tokenizer as Library

    path = hf_dir / "tokenizer.json"
    if not path.is_file():
        notify(f"{hf_dir}: imported without a tokenizer: {reason}")
        return None
    content = read_json(path)
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    if content["model"].get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        notify(f"{hf_dir}: imported without a tokenizer: {reason}")
        return None
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{path}: no valid tokenizer: {error}") from None
    special = {token.content: i for i, token in library.get_added_tokens_decoder().items() if token.special}
    size = 1 + max(library.get_vocab().values())
    if size > vocab_size:
        notify(f"{hf_dir}: imported without a tokenizer: it has {size:,} tokens, the model {vocab_size:,}")
        return None
    tokenizer = LibraryTokenizer(library.to_str(), vocab_size, END_OF_TEXT)
    sample = "It's 12 o'clock.\n  Two  spaces\tand a tab "
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        notify(f"{hf_dir}: imported without a tokenizer: {reason}, and it changes the text")
        return None
    notify(f"{hf_dir}: its tokenizer is run by the tokenizers library, as it is no tiktoken encoding: {reason}")
    end = _find_end_token(hf_dir, _BytePairs({}, [], "", special), notify)
    return dataclasses.replace(tokenizer, end_token=end)


def configured_end_ids(hf_dir: Path) -> list[int]:
    """The ids of end tokens in generation_config.json, or else in config.json; those that a text ends with.

    Raises:
        UserError: A file is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_json(hf_dir / name).get("eos_token_id") if (hf_dir / name).is_file() else None
        found = found if isinstance(found, list) else [found]
        if ids := [i for i in found if type(i) is int]:
            return ids
    return []


def export_tokenizer(tokenizer: Tokenizer, block_size: int, to: Path, notify: Callable[[str], None]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and for GPT-2's way of cutting text vocab.json and merges.txt.

    `notify` gets a line where the tokenizer is left out because it is no byte-pair encoding, or where the tokenizers
    library reads the files as one that encodes some text to other ids.
    """
    match tokenizer:
        case BytePairTokenizer(ranks=ranks, pattern=pattern, special=special):
            pairs = _BytePairs(ranks, _recover_merges(ranks), pattern, special)
        case ByteTokenizer():
            ids = {bytes([byte]): byte for byte in range(256)}
            pairs = _BytePairs(ids, [], GPT2_PATTERN, {END_OF_TEXT: tokenizer.end_of_text})
        case LibraryTokenizer(content=content, end_token=end_token):
            (to / "tokenizer.json").write_text(content, encoding="utf-8")
            end = None if tokenizer.end_of_text is None else end_token
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": block_size}
            write_json(to / "tokenizer_config.json", config)
            return
        case _:
            notify(f"{to}: exported without a tokenizer: kind {tokenizer.kind} has no form that transformers reads")
            return
    theirs = _hf_tokenizer(pairs)
    theirs.save(str(to / "tokenizer.json"))
    end = tokenizer.end_token if tokenizer.end_token in pairs.special else None
    is_gpt2 = pairs.pattern == GPT2_PATTERN
    config = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"}
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    write_json(
        to / "tokenizer_config.json", config | ends | {"model_max_length": block_size, "add_prefix_space": False}
    )
    if is_gpt2:
        write_json(to / "vocab.json", _named(pairs))
        lines = [" ".join(pair) for pair in _named_merges(pairs)]
        (to / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    if example := _first_difference(tokenizer, theirs, pairs):
        notify(f"{to}: transformers encodes some text to other ids than this run, such as {example!r}")


def _read(hf_dir: Path) -> tuple[_BytePairs, Any]:
    """Reads the files: as byte pairs, and as the tokenizers library does."""
    from tokenizers import Tokenizer as Library

    if (hf_dir / "tokenizer.json").is_file():
        content = read_json(hf_dir / "tokenizer.json")
        try:
            pairs = _from_json(content, _extra_added(hf_dir))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{hf_dir / 'tokenizer.json'}: no valid tokenizer: {type(error).__name__}: {error}"
            ) from None
        try:
            theirs = Library.from_file(str(hf_dir / "tokenizer.json"))
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{hf_dir / 'tokenizer.json'}: no valid tokenizer: {error}") from None
        theirs.no_truncation()
        theirs.no_padding()
        return pairs, theirs
    if (hf_dir / "vocab.json").is_file() and (hf_dir / "merges.txt").is_file():
        lines = (hf_dir / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in merges):
            raise UserError(f"{hf_dir / 'merges.txt'}: every line must be two tokens")
        vocab = read_json(hf_dir / "vocab.json")
        pairs = _pairs(vocab, merges, GPT2_PATTERN, _extra_added(hf_dir), False)
        return pairs, _slow_tokenizer(vocab, merges)
    raise _NotConvertible("the folder has neither tokenizer.json nor vocab.json and merges.txt")


def _slow_tokenizer(vocab: dict[str, int], merges: list[tuple]) -> Any:
    """The tokenizers library's reading of vocab.json and merges.txt."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    try:
        library = Library(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"vocab.json and merges.txt do not fit together: {error}") from None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return library


def _extra_added(hf_dir: Path) -> dict[str, int]:
    """Tokens that were added to a vocabulary, by the files beside it: added_tokens.json and tokenizer_config.json."""
    added: dict[str, int] = {}
    if (hf_dir / "added_tokens.json").is_file():
        added |= read_json(hf_dir / "added_tokens.json")
    if (hf_dir / "tokenizer_config.json").is_file():
        decoder = read_json(hf_dir / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {_content(token): int(i) for i, token in decoder.items() if i.isdecimal()}
    return {name: i for name, i in added.items() if isinstance(i, int)}


def _content(token: Any) -> str:
    """The text of a token as these files name it: a string, or an object with its "content"."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _find_end_token(hf_dir: Path, pairs: _BytePairs, notify: Callable[[str], None]) -> str:
    """The name of the end token: by the model's config, by the tokenizer's, or the usual one; else none is special."""
    name_of = {i: name for name, i in pairs.special.items()}
    ids = configured_end_ids(hf_dir)
    names = [name_of[i] for i in ids if i in name_of]
    tokenizer_config = hf_dir / "tokenizer_config.json"
    settings = read_json(tokenizer_config) if tokenizer_config.is_file() else {}
    candidates = [*names, _content(settings.get("eos_token")), END_OF_TEXT]
    end = next((name for name in candidates if name in pairs.special), None)
    if end is None:
        ordinary = [i for i in ids if i in pairs.ids.values()]
        why = f" (id {ordinary[0]}, which its config names, also stands for text)" if ordinary else ""
        notify(f"{hf_dir}: has no end token{why}; documents get no start token, and samples end at max_new_tokens only")
        return END_OF_TEXT
    if others := [i for i in ids if i != pairs.special[end] and (i in name_of or i in pairs.ids.values())]:
        notify(f"{hf_dir}: of its end tokens only {end!r} is kept; sampling does not stop at ids {others}")
    begin = _content(settings.get("bos_token"))
    if begin in pairs.special and begin != end:
        notify(f"{hf_dir}: documents begin with {end!r} here, not with its start token {begin!r}")
    return end


def _report_added(hf_dir: Path, theirs: Any, notify: Callable[[str], None]) -> None:
    """Reports what the library does with text and gptjax does not."""
    words = [token.content for token in theirs.get_added_tokens_decoder().values() if not token.special]
    if words:
        shown = ", ".join(map(repr, words[:_SHOWN])) + (f" and {len(words) - _SHOWN} more" if words[_SHOWN:] else "")
        notify(f"{hf_dir}: its added tokens {shown} are not matched in text here; such text is split like any other")
    if theirs.encode("a").ids != theirs.encode("a", add_special_tokens=False).ids:
        notify(f"{hf_dir}: its tokenizer adds {theirs.encode('a').tokens} around the text 'a'; gptjax does not")


def _first_difference(tokenizer: Tokenizer, theirs: Any, pairs: _BytePairs) -> str | None:
    """The shortest of many texts that the two encode to other ids; texts that hold an added token are left out."""
    tokens = [token.decode() for token in sorted(pairs.ids, key=pairs.ids.__getitem__) if _is_utf8(token)]
    texts = [*mixed_texts(tokens), "".join(tokens), "\n".join(tokens), " and ".join(tokens)]
    added = {token.content for token in theirs.get_added_tokens_decoder().values()}
    if added:
        names = re.compile("|".join(map(re.escape, added)))
        texts = [text for text in texts if not names.search(text)]
    found = zip(texts, theirs.encode_batch(texts, add_special_tokens=False), tokenizer.encode_batch(texts), strict=True)
    different = [text for text, their_ids, ids in found if their_ids.ids != ids.tolist()]
    return min(different, key=len)[:60] if different else None


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _to_library(pattern: str) -> str:
    """A pattern of tiktoken's in the words of Oniguruma, which the tokenizers library uses.

    `X{1,3}+` is possessive there, and means `(?:X{1,3})+` here.
    """
    return _POSSESSIVE.sub(r"(?>\1\2)", pattern)


def _from_library(pattern: str) -> str:
    """Undoes `_to_library`."""
    return _ATOMIC.sub(r"\1\2+", _POSSESSIVE.sub(r"(?:\1\2)+", pattern))


def _from_json(content: dict, extra: dict[str, int]) -> _BytePairs:
    model = content["model"]
    if model.get("type") != "BPE":
        raise _NotConvertible(f"its model is {model.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _NotConvertible(f"it uses {name}")
    if content.get("normalizer"):
        raise _NotConvertible("it changes the text before encoding it (normalizer)")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = extra | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return _pairs(model["vocab"], merges, _pattern(content["pre_tokenizer"]), added, bool(model.get("ignore_merges")))


def _pattern(pre_tokenizer: dict) -> str:
    """The regular expression that splits text."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last["type"] != "ByteLevel":
        raise _NotConvertible("it does not work on bytes")
    if last.get("add_prefix_space"):
        raise _NotConvertible("it puts a space before the text (add_prefix_space)")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(splits) != 1 or last.get("use_regex", True) or splits[0]["type"] != "Split":
        raise _NotConvertible("it cuts text in several steps")
    if splits[0]["behavior"] != "Isolated" or splits[0].get("invert") or "Regex" not in splits[0]["pattern"]:
        raise _NotConvertible("it does not cut text by one regular expression")
    return _from_library(splits[0]["pattern"]["Regex"])


def _pairs(
    vocab: dict[str, int], merges: Iterable[tuple], pattern: str, added: dict[str, int], whole_words: bool
) -> _BytePairs:
    """Converts names to bytes. A token is special if no text encodes to it: no byte, not merged, and no word."""
    byte_of = byte_of_character()

    def to_bytes(name: str) -> bytes:
        if unknown := next((c for c in name if c not in byte_of), None):
            raise _NotConvertible(f"token {name!r} has {unknown!r}, which is no byte's name")
        return bytes(byte_of[c] for c in name)

    merges = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    merged = {left + right for left, right in merges}

    def is_plain(name: str) -> bool:
        if name in added or not set(name) <= byte_of.keys():
            return False
        return whole_words or len(name) == 1 or to_bytes(name) in merged

    special = added | {name: i for name, i in vocab.items() if not is_plain(name)}
    ids = {to_bytes(name): i for name, i in vocab.items() if is_plain(name)}
    return _BytePairs(ids, merges, pattern, special)


def _check_order(pairs: _BytePairs) -> None:
    last = -1
    for left, right in pairs.merges:
        new = pairs.ids.get(left + right, -1)
        if new <= last:
            raise _NotConvertible(f"the id of token {left + right!r} does not follow the order of merges")
        last = new


def _from_pairs(pairs: _BytePairs, vocab_size: int, end_token: str) -> Tokenizer:
    size = 1 + max([*pairs.ids.values(), *pairs.special.values()])
    if size > vocab_size:
        raise _NotConvertible(f"it has {size:,} tokens, the model {vocab_size:,}")
    gpt2 = BytePairTokenizer("tiktoken", "gpt2", pairs.pattern, pairs.ids, pairs.special, end_token)
    if size == vocab_size == len(pairs.ids) + len(pairs.special) and gpt2.fingerprint == GPT2_FINGERPRINT:
        return gpt2
    reserved = {f"<|reserved_{i}|>": i for i in range(size, vocab_size)}
    try:
        return bpe_tokenizer_from_ranks(pairs.ids, pairs.pattern, pairs.special | reserved, end_token)
    except UserError as error:
        raise _NotConvertible(str(error)) from None


def _hf_tokenizer(pairs: _BytePairs):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # As tiktoken does, a whole word that is a token becomes that token, whether or not merges lead there.
    tokenizer = Tokenizer(models.BPE(vocab=_named(pairs), merges=_named_merges(pairs), ignore_merges=True))
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


def _named(pairs: _BytePairs) -> dict[str, int]:
    vocab = {_name(token): i for token, i in pairs.ids.items()} | pairs.special
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _named_merges(pairs: _BytePairs) -> list[tuple[str, str]]:
    return [(_name(left), _name(right)) for left, right in pairs.merges]


_CHARACTER_OF = {byte: character for character, byte in byte_of_character().items()}


def _name(token: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in token)


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token merges, found by merges of lower rank; some tokens have none."""
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
