"""Prepares a corpus: reads, cleans, tokenizes and writes shards to the cache, once per combination of options."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.files import publish
from gptjax.text.clean import clean
from gptjax.text.cleaning.stages import stages_identity
from gptjax.text.cleaning.store import CLEAN_VERSION, Share, build_store, read_store, store_report
from gptjax.text.counts import counted, leaves_out
from gptjax.text.datasheet import write_datasheet
from gptjax.text.shard_writer import CorpusChanged, write_manifest
from gptjax.text.shards import FORMAT_VERSION, MANIFEST, Dataset, Verify, open_dataset
from gptjax.text.sources import Document, read_documents, source_fingerprint
from gptjax.text.split import Split, choose_split, nearest_fraction, text_hash
from gptjax.text.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.write_shards import write_shards

TOKENIZER = "tokenizer.json"
# Options that do not change which tokens are stored where.
_NOT_STORED = ("path", "source", "hf_dataset", "streaming", "packing", "attend_across_documents", "verify", "skip")
# Newer options: at these values they are not part of the folder's name, so that older folders are still found.
_ADDED_OPTIONS = {
    **{"encoding": "utf-8", "quoting": "format", "template": ""},
    **{"license": "", "git_endings": (), "unreadable_files": "error"},
}
# Options of the split or the description, which do not change the documents.
_NOT_CLEANED = ("validation_fraction", "license")

Report = Callable[[str], object]
Corpus = Callable[[Counter[str]], Iterator[Document]]
"""Yields the cleaned documents, and counts those that are left out; can be called several times."""


class Prepared(NamedTuple):
    """A folder of prepared data, opened."""

    folder: Path
    dataset: Dataset
    tokenizer: Tokenizer


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    cache_dir: Path,
    *,
    report: Report = print,
    tokenizer_override: Tokenizer | None = None,
) -> Prepared:
    """Returns the corpus as tokens. Data that was prepared before is opened, not read again.

    The name of the folder below `cache_dir` depends on the sources, the tokenizer and every option that changes the
    tokens. Only one process at a time builds the folder. It is built under another name and renamed when it is
    complete, so a killed preparation leaves nothing that looks finished. The next preparation reads the text again,
    and makes the tokenizer and shards that were not finished.

    Args:
        data: Sources of text, cleaning and split.
        tokenizer: The tokenizer to make or train.
        cache_dir: Root of the cache; `~` is the home folder.
        report: Receives lines of progress.
        tokenizer_override: Used instead of `tokenizer`, when a run starts from another run's weights.

    Raises:
        UserError: There is no text, something cannot be read or encoded, or the cache cannot be written.
    """
    folder, source = find_folder(data, tokenizer, cache_dir, tokenizer_override)
    if prepared := _open_finished(folder, data.verify, report=lambda _: None):
        return prepared
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder, report):
            if prepared := _open_finished(folder, data.verify, report):
                return prepared
            options = dataclasses.asdict(data)
            if not data.clean.active:
                del options["clean"]
            about = {"source": source, "data": options}
            try:
                corpus = _open_corpus(data, cache_dir, report)
                _build(folder, data, corpus, tokenizer, tokenizer_override, about, report)
            except CorpusChanged:  # the shards of the killed process have been removed
                report(f"preparing: {folder.name} was begun with other text; it is made anew")
                _build(
                    folder, data, _open_corpus(data, cache_dir, report), tokenizer, tokenizer_override, about, report
                )
    except OSError as error:
        raise UserError(f"cache_dir: cannot write {error.filename or folder}: {error.strerror}") from None
    return open_folder(folder, data.verify)


def find_folder(
    data: DataConfig, tokenizer: TokenizerConfig, cache_dir: Path, tokenizer_override: Tokenizer | None = None
) -> tuple[Path, str]:
    """Returns the folder of this data, whether or not it exists, and the identity of its sources.

    Raises:
        UserError: No text is there.
    """
    source = source_fingerprint(data)
    made_with = tokenizer_override.fingerprint if tokenizer_override else tokenizer.identity
    fingerprint = _fingerprint([FORMAT_VERSION, source, made_with, _stored_options(data)])
    return Path(cache_dir).expanduser() / "data" / f"{_short_name(data)}-{fingerprint}", source


def find_store(data: DataConfig, cache_dir: Path) -> Path:
    """Returns the folder of the cleaned documents, whether or not it exists. Other tokenizers use the same one.

    Raises:
        UserError: No text is there.
    """
    options = {k: v for k, v in _stored_options(data).items() if k not in _NOT_CLEANED}
    fingerprint = _fingerprint([source_fingerprint(data), options])
    return Path(cache_dir).expanduser() / "data" / f"{_short_name(data)}-{fingerprint}.clean"


def clean_share(data: DataConfig, cache_dir: Path, share: Share, report: Report = print) -> bool:
    """Cleans some parts of the corpus; returns whether all parts are complete. `prepare` then uses them.

    Raises:
        UserError: No stage is on, or something cannot be read or cleaned.
    """
    if not data.clean.active:
        raise UserError("shard: there is nothing to share without a stage of data.clean: the rest is not worth it")
    return build_store(find_store(data, cache_dir), data, lambda counts: read_documents(data, counts), report, share)


def _stored_options(data: DataConfig) -> dict:
    """The options that affect the tokens. Cleaning options are included only if a stage is on, so that older folders
    are still found.
    """
    stored = {k: v for k, v in dataclasses.asdict(data).items() if k not in _NOT_STORED}
    options = {k: v for k, v in stored.items() if k not in _ADDED_OPTIONS or v != _ADDED_OPTIONS[k]}
    clean_options = options.pop("clean")
    if data.clean.active:
        del clean_options["workers"], clean_options["dask"]
        if not data.clean.duplicate_substrings:  # a newer option
            del clean_options["duplicate_substrings"]
        options["clean"] = [CLEAN_VERSION, clean_options, stages_identity(data)]
    return options


def _fingerprint(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def learned_texts(data: DataConfig, config: TokenizerConfig, cache_dir: Path, report: Report) -> Iterator[str]:
    """Yields the texts of a corpus on which a tokenizer is trained.

    Raises:
        UserError: There is no text, or something cannot be read.
    """
    corpus = _open_corpus(data, cache_dir, report)
    return _learned_from(corpus, config, _split_of(data, corpus), report)


def open_folder(folder: Path, verify: Verify = "full") -> Prepared:
    """Opens prepared data, checks it as `open_dataset` does, and checks that its tokenizer made it.

    Raises:
        UserError: Something is missing or damaged; the message names the file.
    """
    dataset, tokenizer = open_dataset(folder, verify), load_tokenizer(folder / TOKENIZER)
    if tokenizer.fingerprint != dataset.manifest["tokenizer"]:
        raise UserError(f"{folder / TOKENIZER}: damaged: not the tokenizer that {MANIFEST} names")
    if tokenizer.end_of_text != dataset.manifest["end_of_text"]:
        raise UserError(f"{folder / MANIFEST}: damaged: end_of_text is not that of {TOKENIZER}")
    return Prepared(folder, dataset, tokenizer)


def describe(prepared: Prepared) -> str:
    """Returns one line about the content of the folder and the documents that were left out."""
    train, validation = prepared.dataset.train, prepared.dataset.validation
    n_bytes = train.n_bytes + validation.n_bytes
    n_tokens = train.n_tokens + validation.n_tokens
    counts = prepared.dataset.manifest.get("counts", {})
    left_out = counted(counts)
    return (
        f"{prepared.folder.name}: {counts.get('read', 0):,} documents, {n_bytes / 1e6:,.1f} MB, {n_tokens:,} tokens"
        f" ({train.n_tokens:,} train, {validation.n_tokens:,} validation;"
        f" {prepared.tokenizer.vocab_size:,} ids)" + (f"; {', '.join(left_out)}" if left_out else "")
    )


def _build(
    folder: Path,
    data: DataConfig,
    corpus: Corpus,
    config: TokenizerConfig,
    tokenizer: Tokenizer | None,
    about: dict,
    report: Report,
) -> None:
    # This process holds the lock, so an existing folder was left by a process that was killed.
    building = folder.with_name(f"{folder.name}.tmp")
    building.mkdir(exist_ok=True)
    store = find_store(data, folder.parents[1]) if data.clean.active else None
    try:
        split = _split_of(data, corpus)
        tokenizer = tokenizer or _kept_tokenizer(building)
        tokenizer = tokenizer or make_tokenizer(config, lambda: _learned_from(corpus, config, split, report), report)
        save_tokenizer(tokenizer, building / TOKENIZER)
        counts: Counter[str] = Counter()
        shards = write_shards(building, corpus(counts), split, tokenizer, report)
        if source_fingerprint(data) != about["source"]:
            if store:
                shutil.rmtree(store, ignore_errors=True)
            raise UserError(f"{_short_name(data)}: the sources changed while they were read; start again")
        _require_both(data, corpus, counts, shards)
        _require_sum(counts, shards)
        write_manifest(
            building,
            shards,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            about=about | {"counts": dict(counts)},
        )
        write_datasheet(building, data, counts, store_report(store) if store else None)
        if folder.exists():  # it is damaged, otherwise it would have been opened
            shutil.rmtree(folder)
        for leftover in building.glob(".*"):
            leftover.unlink()
        publish(building, folder)
    except Exception:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _kept_tokenizer(building: Path) -> Tokenizer | None:
    """The tokenizer that a killed process had finished."""
    try:
        return load_tokenizer(building / TOKENIZER)
    except UserError:
        return None


def _split_of(data: DataConfig, corpus: Corpus) -> Split:
    counts: Counter[str] = Counter()
    documents = corpus(counts)
    first = next(documents, None)
    if first is None:
        left_out = counted(counts)
        raise UserError(
            f"{_short_name(data)}: no text: {counts['read']:,} documents were read"
            + (f" ({', '.join(left_out)})" if left_out else "")
        )
    return choose_split((document.text for document in itertools.chain([first], documents)), data.validation_fraction)


def _open_corpus(data: DataConfig, cache_dir: Path, report: Report) -> Corpus:
    """Cleans the corpus, if a stage is on and the result is not stored yet. The documents can be read several times."""
    if not data.clean.active:
        return lambda counts: clean(read_documents(data, counts), data, counts)
    store = find_store(data, cache_dir)
    build_store(store, data, lambda counts: read_documents(data, counts), report)
    return lambda counts: read_store(store, data, counts)


def _learned_from(corpus: Corpus, config: TokenizerConfig, split: Split, report: Report) -> Iterator[str]:
    """The text that a tokenizer learns from: all of it for chars, a sample of the training text for bpe."""
    documents = characters = 0
    for document in corpus(Counter()):
        if config.kind == "chars":
            yield document.text
        else:
            for name, text in split(document.text):
                # Another hash than that of the split, which would choose all or none of the training text.
                number = xxhash.xxh3_64_intdigest(text.encode(), seed=1)
                if name == "train" and number < config.sample_fraction * 2**64:
                    documents, characters = documents + 1, characters + len(text)
                    yield text
    if config.sample_fraction < 1:
        report(f"tokenizer: learns from a sample of {documents:,} documents, {characters / 1e6:,.1f} M characters")


def _require_sum(counts: Counter[str], shards: dict[str, list[dict]]) -> None:
    """Checks that documents read = documents stored + documents left out for the reported reasons."""
    stored = sum(entry["n_documents"] for entries in shards.values() for entry in entries)
    left_out = sum(n for reason, n in counts.items() if leaves_out(reason))
    if counts["read"] > 1:  # a single document is split in two
        assert counts["read"] == stored + left_out, f"{counts['read']} read, {stored} stored, {dict(counts)}"


def _require_both(data: DataConfig, corpus: Corpus, counts: Counter[str], shards: dict[str, list[dict]]) -> None:
    """Checks that no split is empty, which is possible with many documents and a small fraction."""
    for name, entries in shards.items():
        if not entries:
            nearest = nearest_fraction((text_hash(document.text) for document in corpus(Counter())), name)
            raise UserError(
                f"data.validation_fraction={data.validation_fraction} leaves no document for {name} of"
                f" {counts['read']:,} that were read; the nearest that does: {nearest}"
            )


def _open_finished(folder: Path, verify: Verify, report: Report) -> Prepared | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return open_folder(folder, verify)
    except UserError as error:
        report(f"prepared data is damaged and made anew ({error})")
        return None


@contextlib.contextmanager
def _only_one(folder: Path, report: Report) -> Iterator[None]:
    """Holds the folder's lock. The operating system releases it when the process ends for any reason."""
    import fcntl

    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that prepares {folder.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _short_name(data: DataConfig) -> str:
    """A readable part of the folder's name: the first path's name, the source or the dataset."""
    name = data.source or data.hf_dataset or Path(data.path[0]).name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:40] or "data"
