"""`gptjax evaluate`: measures a trained run on text or labels."""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.checkpoints.run_dir import CONFIG_FILE, LoadedRun, load_run
from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.config.start import load_run_config
from gptjax.config.task import LABELLED
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.evaluation.labels import Predictions, save_confusion, with_labels
from gptjax.evaluation.likelihood import make_scorer, score_spans
from gptjax.evaluation.loss import (
    Evaluation,
    MixtureEvaluation,
    evaluation_of,
    make_eval_step,
    mean_evaluation,
    sum_loss,
)
from gptjax.evaluation.sliding import sliding_spans
from gptjax.files import check_writable
from gptjax.generation.weights import rounded_weights
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.dpo import measure_preferences
from gptjax.tasks.functions import metric_values
from gptjax.tasks.instruct import measure_chats
from gptjax.tasks.multi import parts_of, with_shared_heads
from gptjax.tasks.pretrain import bytes_per_target, mixture_stages, text_batches
from gptjax.tasks.registry import TASKS, parse, read_examples
from gptjax.tasks.regress import check_count
from gptjax.tasks.reinforce import measure_rewards
from gptjax.tasks.seq2seq import measure_pairs
from gptjax.text.counts import counted
from gptjax.text.labelled import check_labels, read_data_rows
from gptjax.text.mixture import prepare_sources
from gptjax.text.rows import limited
from gptjax.text.shards import TokenSplit
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.whole import WholeText, document_hashes, read_whole
from gptjax.training.step import compute_options
from gptjax.verbs.benchmark import measure_benchmark
from gptjax.verbs.generated import GENERATING, measure_generated
from gptjax.verbs.own_text import open_own_text

CLEANING = ("text_field", "invalid_utf8", "unicode", "newlines", "attend_across_documents")
"""Options of data that another text takes from the run, unless they are set."""
SILENCE = 10.0
"""Seconds between two progress lines."""
SPANS = 2**12
"""Number of sliding windows that are made at once."""
Notify = Callable[[str], None]


class Measured(NamedTuple):
    """The loss on all or some windows of one text."""

    name: str
    text: WholeText
    nll: float
    targets: float
    """Number of targets in the measured windows."""
    objective: ObjectiveConfig

    @property
    def evaluation(self) -> Evaluation:
        """Loss, perplexity and bits per byte."""
        return evaluation_of(self.nll, self.targets, bytes_per_target(self.objective, self.text.split), self.name)

    @property
    def sizes(self) -> str:
        """Documents, tokens and bytes, and the measured share."""
        split, counts = self.text.split, self.text.counts
        documents = f"{split.n_documents:,} document{'s' * (split.n_documents != 1)}"
        missing = "".join(f", {text}" for text in counted(counts))
        return f"{documents}, {split.n_tokens:,} tokens, {split.n_bytes:,} bytes{missing}"


def run_evaluate(options: EvaluateConfig) -> int:
    """Prints the results of `evaluate_run`."""
    compile_cache.start()
    print(evaluate_run(options, notify))
    return 0


def evaluate_run(options: EvaluateConfig, notify: Notify = notify) -> str:
    """Measures a run on the validation split of its own data, or on all data of `options.data`.

    `notify` is called with one line for each damaged checkpoint, and while a long evaluation runs.

    Returns:
        Loss, perplexity and bits per byte of text, or a table of scores of labels. For `options.data` also the size of
        the data, the checkpoint, and a line for each path if there are several.

    Raises:
        UserError: The run does not exist, or its data cannot be read.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    run = _in_precision(run, options)
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise UserError(f"{options.run_dir}: has no tokenizer, so no text can be measured")
    if options.benchmark != "none":
        lines = measure_benchmark(run, tokenizer, options, _sources(options), notify, _progress(notify))
        return "\n".join([*lines, _checkpoint_line(run, options)])
    if options.language_model:
        return _evaluate_text(run, tokenizer, options, notify)
    run, name = one_task(run, options.part, options.run_dir)
    kind = run.config.task.kind
    if options.figure and kind not in LABELLED:
        raise UserError(f"figure={options.figure!r} has no effect: {options.run_dir} has task.kind={kind}, no labels")
    if options.figure:
        check_writable("figure", Path(options.figure).expanduser())
    if options.generate:
        return _evaluate_generated(run, tokenizer, options, notify)
    if kind == "pretrain":
        return _evaluate_text(run, tokenizer, options, notify)
    for option, value in (("windows", options.windows), ("stride", options.stride)):
        if value:
            raise UserError(f"{option}={value} has no effect: task.kind={kind} is measured on every row")
    if kind == "reinforce":
        examples = _examples(run.config, options.data if _given(options) else None)
        return f"{measure_rewards(run.config, run.params, tokenizer, examples)} · {len(examples):,} prompts"
    if kind == "dpo":
        return _evaluate_preferences(run, tokenizer, options, notify)
    return (
        _evaluate_chats(run, tokenizer, options) if TASKS[kind].report is None else _evaluate_head(run, name, options)
    )


def _in_precision(run: LoadedRun, options: EvaluateConfig) -> LoadedRun:
    """The run with the weights and the precision that the options ask for."""
    config = run.config
    if options.compute_dtype != "run":
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, compute_dtype=options.compute_dtype)
        )
    if options.quantize == "none":
        return dataclasses.replace(run, config=config)
    if config.model.bidirectional or config.model.encoder_layers:
        raise UserError(
            f"quantize={options.quantize} has no effect: {options.run_dir} does not decode from left to right"
        )
    model, params = rounded_weights(config.model, run.params, options.quantize)
    return dataclasses.replace(run, config=dataclasses.replace(config, model=model), params=params)


def _evaluate_text(run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig, notify: Notify) -> str:
    if not _given(options):
        found = _evaluate_own_text(run, tokenizer, options, notify)
        return "\n".join([str(found), *_windows_line(run.config.model, options)])
    measured, objective = [], _text_objective(run.config, options.run_dir)
    for name, data in _sources(options):
        inherited = {key: getattr(run.config.data, key) for key in CLEANING if _is_default(data, key)}
        data = dataclasses.replace(data, **({} if data.source else inherited))
        text = read_whole(data, tokenizer)
        across = data.attend_across_documents
        nll, count = _sum_loss(run, text.split, across, options, name, notify, objective)
        measured.append(Measured(name, text, nll, count, objective))
    lines = [str(measured[0].evaluation)]
    if len(measured) > 1:
        width = max(5, *(len(one.name) for one in measured))
        lines = [f"{one.name:{width}}  {one.evaluation} · {one.sizes}" for one in measured]
        lines.append(f"{'total':{width}}  {_total(measured)}")
    else:
        lines.append(f"text        {measured[0].name}: {measured[0].sizes}")
    lines += _windows_line(run.config.model, options)
    return "\n".join([*lines, _checkpoint_line(run, options), _overlap_line(run.config, measured)])


def _windows_line(model: ModelConfig, options: EvaluateConfig) -> list[str]:
    if options.windows:
        return [f"windows     at most {options.windows:,} of each text, evenly spaced"]
    if not options.stride:
        return []
    least = model.block_size - options.stride
    return [
        f"windows     {model.block_size:,} tokens, stride {options.stride:,}: each token is scored once, after at least"
        f" {least:,} tokens of its document where it has so many"
    ]


def _sum_loss(
    run: LoadedRun,
    split: TokenSplit,
    across: bool,
    options: EvaluateConfig,
    name: str,
    notify: Notify,
    objective: ObjectiveConfig,
) -> tuple[float, float]:
    """The summed loss of a text and its number of targets."""
    model = run.config.model
    if options.stride and objective.rearranges:
        raise UserError(f"stride={options.stride} has no effect: task.objective.kind={objective.kind} rearranges text")
    if not options.stride:
        sizes = model.block_size, options.windows, options.batch_size
        assert run.tokenizer is not None  # the caller requires a tokenizer for text
        batches = text_batches(objective, run.tokenizer, split, *sizes, across)
        return sum_loss(_eval_step(run), run.params, _with_progress(batches, name, notify), _device())
    if options.stride > model.block_size:
        raise UserError(f"stride={options.stride} must be at most model.block_size={model.block_size}")
    spans, nll, count = sliding_spans(split, model.block_size, options.stride, across), 0.0, 0
    scorer, advance = make_scorer(model, compute_options(run.config)), _progress(notify)
    while some := list(itertools.islice(spans, SPANS)):
        scores = score_spans(
            scorer, run.params, some, model.block_size, options.batch_size, _device(), lambda n: advance(n, name)
        )
        nll -= math.fsum(score.log_probability for score in scores)
        count += sum(span.scored for span in some)
    if not count:
        raise UserError(f"{name}: {split.n_tokens} tokens, must have 2; give it more text")
    return nll, count


def _total(measured: Sequence[Measured]) -> Evaluation:
    targets = sum(max(1, one.text.split.n_tokens - 1) for one in measured)
    ratio = sum(one.text.split.n_bytes for one in measured) / targets if measured[0].objective.measures_text else None
    return evaluation_of(math.fsum(one.nll for one in measured), sum(one.targets for one in measured), ratio)


def _evaluate_own_text(
    run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig, notify: Notify
) -> Evaluation | MixtureEvaluation:
    """The loss of the run's objective on its validation text. A run with labels uses the text of its base run."""
    owner = _text_owner(run.config)
    if owner.task.kind != "pretrain":
        raise UserError(f"{options.run_dir}: started from no run with text of its own; give --data.path")
    if owner.sources:
        return _evaluate_own_sources(run, owner, tokenizer, options, notify)
    prepared = open_own_text(owner, tokenizer, notify)
    if owner is run.config and run.data_hash and prepared.dataset.hash not in run.data_hash.split():
        notify(f"{options.run_dir}: its text has changed since it was trained; the loss is that of the new text")
    split, across = prepared.dataset.validation, owner.data.attend_across_documents
    objective = owner.task.objective
    nll, count = _sum_loss(run, split, across, options, "validation text", notify, objective)
    return evaluation_of(nll, count, bytes_per_target(objective, split))


def _text_owner(config: Config) -> Config:
    """The config of the run that was trained on text: this run, or one of its base runs."""
    while config.task.kind != "pretrain" and config.init_from:
        config = load_run_config(Path(config.init_from).expanduser())
    return config


def _text_objective(config: Config, where: str) -> ObjectiveConfig:
    """The objective to measure a run on text: the next token, unless it was trained with another objective.

    Raises:
        UserError: The model is bidirectional, and its objective is unknown.
    """
    objective = _text_owner(config).task.objective if config.model.bidirectional else config.task.objective
    if config.model.bidirectional and objective.kind != "masked":
        raise UserError(f"{where}: model.bidirectional=true, so it has no loss of the next token")
    return objective


def _evaluate_own_sources(
    run: LoadedRun, owner: Config, tokenizer: Tokenizer, options: EvaluateConfig, notify: Notify
) -> MixtureEvaluation:
    """The loss on the validation text of each source, and their mean as in training."""
    sources, across = {source.name: source.data for source in owner.sources}, owner.data.attend_across_documents
    cache = Path(owner.cache_dir).expanduser()
    prepared = prepare_sources(sources, owner.tokenizer, cache, report=notify, tokenizer_override=tokenizer)
    found = {}
    for name, one in prepared.items():
        split = one.dataset.validation
        nll, count = _sum_loss(run, split, across, options, name, notify, owner.task.objective)
        found[name] = evaluation_of(nll, count, bytes_per_target(owner.task.objective, split), name)
    stages = mixture_stages(owner, {name: one.dataset.train.n_tokens for name, one in prepared.items()})
    return mean_evaluation(dict(zip(found, stages[0].weights, strict=True)), found)


def _evaluate_head(run: LoadedRun, name: str, options: EvaluateConfig) -> str:
    report, task = TASKS[run.config.task.kind].report, run.config.task
    assert report is not None  # checked by the caller
    found = []
    sources = _sources(options) if _given(options) else [("validation", None)]
    for source, data in sources:
        predictions, loss = predict_labels(run, name, _examples(run.config, data), options.batch_size)
        found.append((source, predictions, loss))
    predictions = _concatenated([predictions for _, predictions, _ in found])
    loss = float(np.average([loss for *_, loss in found], weights=[one.count for _, one, _ in found]))
    if options.figure:
        save_confusion(predictions, Path(options.figure).expanduser())
    unit = "labels" if task.kind in LABELLED else "rows"
    lines = [f"{source}  {report(one, loss).splitlines()[0]} · {one.count:,} {unit}" for source, one, loss in found]
    lines = (lines if len(found) > 1 else []) + [report(predictions, loss)]
    lines += [f"{key} {value:.4f}" for key, value in metric_values(task, predictions).items()]
    if _given(options):
        lines += [
            "",
            f"rows        {', '.join(source for source, *_ in found)}: {len(predictions.cut):,}",
            _checkpoint_line(run, options),
        ]
    return "\n".join(lines)


def _evaluate_preferences(run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig, notify: Notify) -> str:
    where = options.base or run.config.init_from
    base = load_run(Path(where).expanduser(), strict=options.strict, notify=notify).params
    sources = _sources(options) if _given(options) else [("validation", None)]
    lines = []
    for source, data in sources:
        examples = _examples(run.config, data)
        scores = measure_preferences(run.config, run.params, base, tokenizer, examples)
        lines.append(f"{source}  {scores} · {len(examples):,} pairs")
    return "\n".join([*lines, *([_checkpoint_line(run, options)] if _given(options) else [])])


def _concatenated(parts: Sequence[Any]) -> Any:
    """Concatenates the predictions of several files. Arrays with fewer columns are padded with zeros."""

    if isinstance(parts[0], Predictions) and len({part.labels for part in parts}) > 1:  # tags unseen in training
        labels = tuple(dict.fromkeys(label for part in parts for label in part.labels))
        parts = [with_labels(part, labels) for part in parts]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if name == "labels":
            return values[0]
        if isinstance(values[0], tuple):
            return tuple(itertools.chain.from_iterable(values))
        columns = max(value.shape[-1] for value in values)
        padding = [((0, 0),) * (v.ndim - 1) + ((0, columns - v.shape[-1]),) if v.ndim > 1 else 0 for v in values]
        return np.concatenate([np.pad(value, pad) for value, pad in zip(values, padding, strict=True)])

    return type(parts[0])(**{field.name: joined(field.name) for field in dataclasses.fields(parts[0])})


def _evaluate_generated(run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig, notify: Notify) -> str:
    kind = run.config.task.kind
    if kind not in GENERATING:
        raise UserError(
            f"generate=True has no effect: {options.run_dir} has task.kind={kind}, must be {' or '.join(GENERATING)}"
        )
    sources = _sources(options) if _given(options) else [("validation", None)]
    examples = [(name, _examples(run.config, data)) for name, data in sources]
    lines = measure_generated(run, tokenizer, options, examples, notify)
    return "\n".join([*lines, _checkpoint_line(run, options)])


def _evaluate_chats(run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig) -> str:
    def measured(examples: list) -> Any:
        compute = compute_options(run.config)
        measure_all = measure_pairs if run.config.task.kind == "seq2seq" else measure_chats
        return measure_all(run.config, tokenizer, examples, compute, jax.jit)(run.params, _device())

    if not _given(options):
        return str(measured(_examples(run.config, None)))
    found = [(source, _examples(run.config, data)) for source, data in _sources(options)]
    chats = [chat for _, examples in found for chat in examples]
    lines = [f"{source}  {measured(examples)} · {len(examples):,} chats" for source, examples in found]
    lines = (lines if len(found) > 1 else []) + [str(measured(chats))]
    names = ", ".join(source for source, _ in found)
    return "\n".join([*lines, f"rows        {names}: {len(chats):,}", _checkpoint_line(run, options)])


def one_task(run: LoadedRun, part: str, where: str) -> tuple[LoadedRun, str]:
    """Returns a run restricted to a single task, and the name of its head.

    Raises:
        UserError: The run has no such part, or it has several and `part` is empty.
    """
    tasks = parts_of(run.config)
    if part not in tasks and (part or len(tasks) > 1):
        raise UserError(f"{where}: part={part!r} must be one of {', '.join(tasks)}.{did_you_mean(part, tasks)}")
    name = part or next(iter(tasks))
    return dataclasses.replace(run, config=tasks[name], params=with_shared_heads(run.config, run.params)), name


def predict_labels(run: LoadedRun, name: str, examples: list, batch_size: int) -> tuple[Any, float]:
    """Predicts examples with head `name` of a run; also returns the mean loss of examples with targets."""
    config, task, tokenizer = run.config, run.config.task, run.tokenizer
    assert tokenizer is not None  # labelled tasks always have one
    predict = TASKS[task.kind].predict
    assert predict is not None  # callers check it
    return predict(config, name, run.params, tokenizer, examples, batch_size, compute_options(config), _device())


def _examples(config: Config, data: DataConfig | None) -> list:
    """The examples of `data`; None: the run's validation examples."""
    if data is None:
        return read_examples(config.task, config.data).validation
    counts: Counter[str] = Counter()
    rows = limited(read_data_rows(data, counts), data)
    named = dataclasses.replace(data, text_field=config.data.text_field) if _is_default(data, "text_field") else data
    examples = list(parse(rows, config.task, named, counts=counts))
    for example in examples:
        if config.task.kind in LABELLED:
            check_labels(example, config.task.labels, counts)
        elif config.task.kind == "regress":
            check_count(example, len(config.task.means))
    for line in counted(counts):
        notify(line)
    if not examples:
        raise UserError(f"{', '.join(data.path) or data.hf_dataset}: no rows")
    return examples


def _sources(options: EvaluateConfig) -> list[tuple[str, DataConfig]]:
    """Each path of `data.path`, or the other source, with its name."""
    data = options.data
    if not data.path:
        return [(data.source or data.hf_dataset, data)]
    return [(path, dataclasses.replace(data, path=(path,))) for path in data.path]


def _is_default(data: DataConfig, name: str) -> bool:
    return getattr(data, name) == getattr(DataConfig(), name)


def _checkpoint_line(run: LoadedRun, options: EvaluateConfig) -> str:
    if run.val_loss is None:
        return f"checkpoint  {options.checkpoint}, step {run.step:,} (it was not evaluated in training)"
    return f"checkpoint  {options.checkpoint}, step {run.step:,} (validation loss {run.val_loss:.4f} in training)"


def _overlap_line(config: Config, measured: Sequence[Measured]) -> str:
    """A line with the number of documents that are also in the training text of the run or its base runs."""
    given, own, known = frozenset().union(*(one.text.documents for one in measured)), frozenset(), True
    while True:
        if config.task.kind == "pretrain":
            for data in [source.data for source in config.sources] or [config.data]:
                hashes = document_hashes(data)
                own, known = own | (hashes or frozenset()), known and hashes is not None
        base = Path(config.init_from).expanduser()
        if not config.init_from or not (base / CONFIG_FILE).is_file():
            break
        config = load_run_config(base)
    shared, total = len(given & own), len(given)
    if shared:
        return f"own text    {shared:,} of {total:,} distinct documents are in the text of the run (both splits)"
    if not known:
        return "own text    not compared: the text of the run is missing, or too large to be read again"
    return f"own text    differs: none of {total:,} distinct documents is in the text of the run"


def _eval_step(run: LoadedRun) -> Callable:
    return jax.jit(make_eval_step(run.config.model, compute_options(run.config)))


def _with_progress(batches: Iterable[Any], name: str, notify: Notify) -> Iterator[Any]:
    """Yields batches, and calls `notify` from time to time."""
    advance = _progress(notify, "batches")
    for batch in batches:
        yield batch
        advance(1, name)


def _progress(notify: Notify, unit: str = "sequences") -> Callable[[int, str], None]:
    """Returns `advance(count, name)`, which calls `notify` from time to time."""
    said, done = time.monotonic(), 0

    def advance(count: int, name: str) -> None:
        nonlocal said, done
        done += count
        if time.monotonic() - said >= SILENCE:
            said = time.monotonic()
            notify(f"{name}: {done:,} {unit} measured")

    return advance


def _given(options: EvaluateConfig) -> bool:
    return bool(options.data.path or options.data.source or options.data.hf_dataset)


def _device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
