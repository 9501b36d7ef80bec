"""The tokenizer of a model's files, independent of their format."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.exchange.hf_files import read_json

CHAT_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of another program's model."""

    where: str
    """The files, for messages."""
    content: dict | None = None
    """Content of tokenizer.json, or None."""
    vocab: dict[str, int] | None = None
    """Content of vocab.json, for a model without tokenizer.json."""
    merges: tuple[tuple[str, ...], ...] = ()
    """Content of merges.txt."""
    added: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens that other files add to the vocabulary."""
    settings: dict = dataclasses.field(default_factory=dict)
    """Content of tokenizer_config.json."""
    end_ids: tuple[int, ...] = ()
    """End-of-text ids of the model's config."""

    @property
    def chat_template(self) -> str:
        """Source of the Jinja chat template; empty: none. If there are several, the one named "default".

        A run has only one special token, the end token. So statements that set the other tokens are put before the
        template.
        """
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        source = found if isinstance(found, str) else ""
        for name in ("eos_token", "bos_token"):
            value, line = token_text(self.settings.get(name) or ""), f"{{% set {name} = "
            if value and name in source and line not in source:
                source = f"{line}{json.dumps(value, ensure_ascii=False)} %}}\n{source}"
        return source


def read_tokenizer_files(hf_dir: Path) -> TokenizerFiles:
    """Reads the files of a Hugging Face folder.

    Raises:
        UserError: A file is damaged.
    """
    settings = _optional(hf_dir / "tokenizer_config.json")
    template = hf_dir / CHAT_TEMPLATE
    if template.is_file():
        settings["chat_template"] = _read_text(template)
    added = _optional(hf_dir / "added_tokens.json")
    decoder = settings.get("added_tokens_decoder") or {}
    added |= {token_text(token): int(i) for i, token in decoder.items() if i.isdecimal()}
    added = {name: i for name, i in added.items() if isinstance(i, int)}
    has_json = (hf_dir / "tokenizer.json").is_file()
    vocab, merges = (None, ()) if has_json else _vocab_and_merges(hf_dir)
    return TokenizerFiles(
        where=str(hf_dir),
        content=read_json(hf_dir / "tokenizer.json") if has_json else None,
        vocab=vocab,
        merges=merges,
        added=added,
        settings=settings,
        end_ids=_configured_end_ids(hf_dir),
    )


def token_text(token: Any) -> str:
    """The text of a token as these files name it: a string, or an object with its "content"."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def content_text(content: dict) -> str:
    """The text of a tokenizer.json with this content, for the tokenizers library."""
    return json.dumps(content, ensure_ascii=False)


def _vocab_and_merges(hf_dir: Path) -> tuple[dict[str, int] | None, tuple[tuple[str, ...], ...]]:
    if not (hf_dir / "vocab.json").is_file() or not (hf_dir / "merges.txt").is_file():
        return None, ()
    lines = _read_text(hf_dir / "merges.txt").split("\n")
    merges = tuple(tuple(line.split(" ")) for line in lines if line and not line.startswith("#version"))
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{hf_dir / 'merges.txt'}: every line must be two tokens")
    return read_json(hf_dir / "vocab.json"), merges


def _configured_end_ids(hf_dir: Path) -> tuple[int, ...]:
    """End-of-text ids of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _optional(hf_dir / name).get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        if ids := tuple(i for i in found if type(i) is int):
            return ids
    return ()


def _optional(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
