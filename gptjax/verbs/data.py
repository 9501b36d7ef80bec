"""`gptjax data`: the documents of a step, and the validation documents with the highest and lowest loss."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from gptjax.batches.mixture import MixtureWindows
from gptjax.batches.pretraining import MAKERS, read_windows
from gptjax.checkpoints.checkpoint import FOLDER
from gptjax.checkpoints.choice import choose
from gptjax.checkpoints.run_dir import CONFIG_FILE, TOKENIZER_FILE, load_run
from gptjax.config.run import Config
from gptjax.config.start import load_run_config
from gptjax.config.verbs.data import DataVerbConfig
from gptjax.errors import UserError
from gptjax.evaluation.likelihood import check_likelihood
from gptjax.evaluation.loss import make_eval_step
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.pretrain import mixture_hash, mixture_stages
from gptjax.text.documents import Origin, read_origins
from gptjax.text.mixture import prepare_sources
from gptjax.text.prepare import Prepared
from gptjax.text.tokenizer import load_tokenizer
from gptjax.training.step import compute_options
from gptjax.verbs.own_text import open_own_text

_SHOWN = 60


class Ranked(NamedTuple):
    """The loss of a document."""

    loss: float
    """Nats per token."""
    name: str
    number: int
    origin: Origin
    text: str
    """Its beginning."""


def run_data(run_dir: str, options: DataVerbConfig) -> int:
    """Prints the results of `step_lines` or `rank_documents`."""
    folder = Path(run_dir).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: no run directory (it has no {CONFIG_FILE})")
    config = load_run_config(folder)
    if config.task.kind != "pretrain":
        raise UserError(f"{run_dir}: has task.kind={config.task.kind}; only runs that pretrain have documents")
    if not options.rank_loss:
        print("\n".join(step_lines(config, folder, options.step)))
        return 0
    compile_cache.start()
    ranked = rank_documents(config, folder, options)
    print(f"{len(ranked):,} validation documents measured, each on its first {config.model.block_size:,} tokens")
    for title, part in (("highest", ranked[: options.show]), ("lowest", ranked[::-1][: options.show])):
        print(f"{title} loss")
        for one in part:
            print(f"  {one.loss:7.4f}  {one.name}{one.origin.where}  {one.origin.text_hash}  {one.text!r}")
    return 0


def step_lines(config: Config, run_dir: Path, step: int) -> list[str]:
    """Returns a line for each sequence of a step, and a line for each document in it with its origin and hash.

    Args:
        config: Config of a run with task.kind=pretrain.
        run_dir: The run directory, which contains the tokenizer.
        step: From 1, as in `metrics.jsonl`.

    Raises:
        UserError: The data no longer exists, or was prepared without a list of origins.
    """
    B, steps = config.train.batch_size, config.train.num_steps
    if step > steps:
        raise UserError(f"step={step} must be at most train.num_steps={steps} of {run_dir}")
    prepared = _prepared(config, run_dir)
    across, T = config.data.attend_across_documents, config.model.block_size
    make, ramp = MAKERS[config.data.packing], config.train.batch_sizes if config.train.batch_ramp else ()
    windows = {name: make(one.dataset.train, T, config.seed, across, ramp=ramp) for name, one in prepared.items()}
    first = (step - 1) * B
    hashes = [one.dataset.hash for one in prepared.values()]
    if config.sources:
        stages = mixture_stages(config, {name: one.split.n_tokens for name, one in windows.items()})
        _check_unchanged(run_dir, mixture_hash(hashes, stages))
        source_B, window_B = MixtureWindows(windows, stages).choose(step - 1, B)
        chosen = [(list(windows)[k], int(number)) for k, number in zip(source_B, window_B, strict=True)]
    else:
        _check_unchanged(run_dir, hashes[0])
        chosen = [("", int(number)) for number in windows[""].numbers(step - 1, B)]
        first = chosen[0][1]
    documents = [
        [document for first, last in windows[name].documents_of(number) for document in range(first, last + 1)]
        for name, number in chosen
    ]
    wanted: dict[str, set[int]] = {}
    for (name, _), numbers in zip(chosen, documents, strict=True):
        wanted.setdefault(name, set()).update(numbers)
    origins = {name: _origins(prepared[name], "train", numbers) for name, numbers in wanted.items()}
    lines = [f"step {step:,}: sequences {first:,} to {first + len(chosen) - 1:,} of the run"]
    for row, ((name, number), numbers) in enumerate(zip(chosen, documents, strict=True)):
        tokens = windows[name].row(number).inputs[:_SHOWN]
        text = " ".join(prepared[name].tokenizer.decode(tokens).split())[:_SHOWN]
        lines.append(f"sequence {row}{f' of {name}' if name else ''}: {_count(numbers)}: {text!r}")
        lines += [f"  {document:,}  {_line(origins[name][document])}" for document in numbers]
    return lines


def rank_documents(config: Config, run_dir: Path, options: DataVerbConfig) -> list[Ranked]:
    """Returns validation documents ordered by loss per token, the highest first.

    Each document is measured alone, on at most `model.block_size` tokens after its end-of-text.

    Raises:
        UserError: The run has no checkpoint, or its data no longer exists.
    """
    run = load_run(run_dir, options.checkpoint, options.strict, notify, options.base)
    check_likelihood(run.config, str(run_dir))
    eval_step, T = jax.jit(make_eval_step(run.config.model, compute_options(run.config))), config.model.block_size
    ranked = []
    for name, one in _prepared(config, run_dir).items():
        split = one.dataset.validation
        starts = [*split.document_starts(0, split.n_tokens).tolist(), split.n_tokens]
        n = split.n_documents
        count = min(n, options.documents or n)
        numbers = [i * n // count for i in range(count)]
        origins = _origins(one, "validation", numbers)
        for number in numbers:
            start, stop = starts[number], starts[number + 1]
            batch = read_windows(split, [start], T, True)
            batch.targets[:, max(0, stop - start - 1) :] = -1  # later targets do not belong to the document
            nll, targets = eval_step(run.params, batch)
            if targets:
                text = " ".join(one.tokenizer.decode(split.slice(start + 1, min(stop, start + _SHOWN))).split())
                ranked.append(
                    Ranked(float(nll / targets), f"{name}: " if name else "", number, origins[number], text[:_SHOWN])
                )
    return sorted(ranked, key=lambda one: (-one.loss, one.name, one.number))


def _prepared(config: Config, run_dir: Path) -> Mapping[str, Prepared]:
    """The run's prepared data by source; the name of a single source is empty."""
    if config.task.objective.rearranges:
        raise UserError(
            f"{run_dir}: task.objective.kind={config.task.objective.kind} rearranges text; data shows others"
        )
    tokenizer = load_tokenizer(run_dir / TOKENIZER_FILE)
    if config.sources:
        cache = Path(config.cache_dir).expanduser()
        sources = {source.name: source.data for source in config.sources}
        return prepare_sources(sources, config.tokenizer, cache, report=notify, tokenizer_override=tokenizer)
    return {"": open_own_text(config, tokenizer, notify)}


def _check_unchanged(run_dir: Path, data_hash: str) -> None:
    """Requires the text that the newest checkpoint was trained on: of other text, the batches are others.

    Raises:
        UserError: The text has changed.
    """
    manifest = choose(run_dir / FOLDER, "latest", strict=False, notify=notify).manifest
    trained_on = "" if manifest is None else manifest.meta.get("data_hash", "")
    if trained_on and trained_on != data_hash:
        raise UserError(f"{run_dir}: its text has changed since it was trained, so its steps cannot be shown any more")


def _origins(prepared: Prepared, split: str, numbers: Iterable[int]) -> dict[int, Origin]:
    wanted = set(numbers)
    listed = itertools.islice(read_origins(prepared.folder, split), max(wanted) + 1)
    return {number: origin for number, origin in enumerate(listed) if number in wanted}


def _count(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"documents {numbers[0]:,} to {numbers[-1]:,}"
    return f"{len(numbers):,} documents"


def _line(origin: Origin) -> str:
    return f"{origin.where}  {origin.text_hash}"
