"""Byte-pair encodings as the tokenizers library stores them ⇄ ours, which tiktoken runs.

Both merge the pair that comes first; the tokenizers library keeps a list of merges, tiktoken takes the id of the merged
token for its place in that list. So an encoding can be converted where the ids of merged tokens rise along the list.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from gptjax.errors import UserError
from gptjax.exchange.hf_files import read_json, write_json
from gptjax.text.tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    ByteTokenizer,
    Tokenizer,
    bpe_tokenizer_from_ranks,
)
from gptjax.text.train_bpe import byte_of_character

# How the tokenizers library's ByteLevel cuts text, in the words of tiktoken.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Of tiktoken's gpt2: an import of it is the same tokenizer, so data prepared with either fits.
GPT2_FINGERPRINT = "592fc644bd6e35ef7aed2208176abe31b3da11abac1159c05bbc6e4e7c1da936"


class _NotConvertible(Exception):
    """Why a folder's tokenizer has no exact form here."""


@dataclasses.dataclass(frozen=True)
class _BytePairs:
    ids: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    special: dict[str, int]


def import_tokenizer(hf_dir: Path, vocab_size: int, notify: Callable[[str], None]) -> Tokenizer | None:
    """Reads tokenizer.json, or vocab.json and merges.txt; None (and a line to `notify`) where that is not exact.

    Args:
        hf_dir: The model folder.
        vocab_size: The model's; ids that the tokenizer does not have become reserved tokens.
        notify: Told why the folder's tokenizer is left out.

    Raises:
        UserError: A file is damaged.
    """
    try:
        pairs = _read(hf_dir)
        _check_order(pairs)
        tokenizer = _from_pairs(pairs, vocab_size)
        _check_same_ids(pairs, tokenizer)
    except _NotConvertible as reason:
        notify(f"{hf_dir}: imported without a tokenizer: {reason}")
        return None
    return tokenizer


def export_tokenizer(tokenizer: Tokenizer, block_size: int, to: Path, notify: Callable[[str], None]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and for GPT-2's way of cutting text vocab.json and merges.txt.

    A tokenizer that is no byte-pair encoding is left out, which `notify` is told.
    """
    match tokenizer:
        case BytePairTokenizer(ranks=ranks, pattern=pattern, special=special):
            pairs = _BytePairs(ranks, _recover_merges(ranks), pattern, special)
        case ByteTokenizer():
            ids = {bytes([byte]): byte for byte in range(256)}
            pairs = _BytePairs(ids, [], GPT2_PATTERN, {END_OF_TEXT: tokenizer.end_of_text})
        case _:
            notify(f"{to}: exported without a tokenizer: kind {tokenizer.kind} has no form that transformers reads")
            return
    _hf_tokenizer(pairs).save(str(to / "tokenizer.json"))
    end = END_OF_TEXT if END_OF_TEXT in pairs.special else None
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


def _read(hf_dir: Path) -> _BytePairs:
    if (hf_dir / "tokenizer.json").is_file():
        content = read_json(hf_dir / "tokenizer.json")
        try:
            return _from_json(content)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise UserError(
                f"{hf_dir / 'tokenizer.json'}: no valid tokenizer: {type(error).__name__}: {error}"
            ) from None
    if (hf_dir / "vocab.json").is_file() and (hf_dir / "merges.txt").is_file():
        lines = (hf_dir / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in merges):
            raise UserError(f"{hf_dir / 'merges.txt'}: every line must be two tokens")
        return _pairs(read_json(hf_dir / "vocab.json"), merges, GPT2_PATTERN, {}, False)
    raise _NotConvertible("the folder has neither tokenizer.json nor vocab.json and merges.txt")


def _from_json(content: dict) -> _BytePairs:
    model = content["model"]
    if model.get("type") != "BPE":
        raise _NotConvertible(f"its model is {model.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _NotConvertible(f"it uses {name}")
    if content.get("normalizer"):
        raise _NotConvertible("it changes the text before encoding it (normalizer)")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return _pairs(model["vocab"], merges, _pattern(content["pre_tokenizer"]), added, bool(model.get("ignore_merges")))


def _pattern(pre_tokenizer: dict) -> str:
    """The regular expression that cuts text."""
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
    return splits[0]["pattern"]["Regex"]


def _pairs(
    vocab: dict[str, int], merges: Iterable[tuple], pattern: str, added: dict[str, int], whole_words: bool
) -> _BytePairs:
    """Turns names into bytes. Special is what no text encodes to: what is no byte, not merged, and no word."""
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


def _from_pairs(pairs: _BytePairs, vocab_size: int) -> Tokenizer:
    size = 1 + max([*pairs.ids.values(), *pairs.special.values()])
    if size > vocab_size:
        raise _NotConvertible(f"it has {size:,} tokens, the model {vocab_size:,}")
    gpt2 = BytePairTokenizer("tiktoken", "gpt2", pairs.pattern, pairs.ids, pairs.special)
    if size == vocab_size == len(pairs.ids) + len(pairs.special) and gpt2.fingerprint == GPT2_FINGERPRINT:
        return gpt2
    reserved = {f"<|reserved_{i}|>": i for i in range(size, vocab_size)}
    try:
        return bpe_tokenizer_from_ranks(pairs.ids, pairs.pattern, pairs.special | reserved)
    except UserError as error:
        raise _NotConvertible(str(error)) from None


def _check_same_ids(pairs: _BytePairs, tokenizer: Tokenizer) -> None:
    """Encodes all tokens in a row both ways: the order of merges is necessary, but not sufficient."""
    texts = []
    for token in sorted(pairs.ids, key=pairs.ids.__getitem__):
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            continue
    theirs = _hf_tokenizer(pairs)
    for text in ("".join(texts), "\n".join(texts), " and ".join(texts)):
        if END_OF_TEXT not in text and theirs.encode(text).ids != tokenizer.encode(text).tolist():
            raise _NotConvertible("tiktoken would encode some text to other ids")


def _hf_tokenizer(pairs: _BytePairs):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # As tiktoken does, a whole word that is a token becomes that token, whether or not merges lead there.
    tokenizer = Tokenizer(models.BPE(vocab=_named(pairs), merges=_named_merges(pairs), ignore_merges=True))
    if pairs.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pairs.pattern), "isolated"),
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
    """The pair that each token merges: what merges of lower rank leave of it; some tokens have none."""
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
