"""Prepares several sources of text with one tokenizer, each in its own folder."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.prepare import Prepared, Report, find_folder, learned_texts, prepare
from gptjax.text.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from gptjax.text.tokenizers.base import Tokenizer


def prepare_sources(
    sources: Mapping[str, DataConfig],
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    *,
    report: Report = print,
    tokenizer_override: Tokenizer | None = None,
) -> dict[str, Prepared]:
    """Returns each source as tokens, see `prepare.prepare`. A new tokenizer is trained on all sources.

    Args:
        sources: Options of each source, by name.
        tokenizer: The tokenizer to make or train.
        cache_dir: Root of the cache.
        report: Receives lines of progress.
        tokenizer_override: Used instead of `tokenizer`.

    Raises:
        UserError: As `prepare` does; the message begins with the name of the source.
    """
    shared = tokenizer_override or _shared_tokenizer(sources, tokenizer, cache_dir, report)
    return {
        name: _of_source(
            name,
            lambda data=data, name=name: prepare(
                data, tokenizer, cache_dir, report=lambda line: report(f"{name}: {line}"), tokenizer_override=shared
            ),
        )
        for name, data in sources.items()
    }


def _of_source(name: str, function: Callable[[], Prepared]) -> Prepared:
    try:
        return function()
    except UserError as error:
        raise UserError(f"sources: {name}: {error}") from None


def _shared_tokenizer(
    sources: Mapping[str, DataConfig], config: TokenizerConfig, cache_dir: Path, report: Report
) -> Tokenizer:
    """Trains the tokenizer, or loads the one that was trained on the same sources before."""
    if config.kind in ("bytes", "tiktoken"):
        return make_tokenizer(config, lambda: iter(()), report)
    folders = [find_folder(data, config, cache_dir)[0].name for data in sources.values()]
    identity = json.dumps([folders, config.identity], sort_keys=True)
    name = f"tokenizer-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    path = Path(cache_dir).expanduser() / "data" / name
    if path.exists():
        return load_tokenizer(path)
    made = make_tokenizer(
        config, lambda: _in_turn([learned_texts(data, config, cache_dir, report) for data in sources.values()]), report
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(made, path)
    return made


def _in_turn(texts: list[Iterator[str]]) -> Iterator[str]:
    """Takes a text of each source in turn, because a tokenizer is trained only on the first part of a large corpus."""
    for row in itertools.zip_longest(*texts):
        yield from (text for text in row if text is not None)
