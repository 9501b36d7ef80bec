"""A trained run, measured on text or labels of one's choice."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

from gptjax.batches.pretraining import evaluation_batches
from gptjax.checkpoints.run_dir import CONFIG_FILE, LoadedRun, load_run
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.config.task import LABELLED
from gptjax.config.verbs import EvaluateConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.evaluation.labels import Predictions, save_confusion, score, table
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.instruct import measure_chats
from gptjax.tasks.multi import parts_of
from gptjax.tasks.pretrain import bytes_per_token
from gptjax.tasks.registry import TASKS, parse, read_examples
from gptjax.text.counts import counted
from gptjax.text.labelled import check_labels, read_data_rows
from gptjax.text.prepare import prepare
from gptjax.text.rows import limited
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.step import compute_options


def run_evaluate(options: EvaluateConfig) -> int:
    """Prints what `evaluate_run` measures."""
    compile_cache.start()
    print(evaluate_run(options, notify))
    return 0


def evaluate_run(options: EvaluateConfig, notify: Callable[[str], None] = notify) -> str:
    """Measures a run on the validation split of its own data, or on all of what `options.data` names.

    `notify` is told of damaged checkpoints in one line.

    Returns:
        Loss, perplexity and bits per byte of text; for labels their scores as a table.

    Raises:
        UserError: There is no such run, or its data cannot be read.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise UserError(f"{options.run_dir}: has no tokenizer, so no text can be measured")
    if options.language_model:
        return str(evaluate_text(run, tokenizer, options))
    run, name = one_task(run, options.part, options.run_dir)
    kind = run.config.task.kind
    if options.figure and kind not in LABELLED:
        raise UserError(f"figure={options.figure!r} has no effect: {options.run_dir} has task.kind={kind}, no labels")
    if kind == "pretrain":
        return str(evaluate_text(run, tokenizer, options))
    if options.windows:
        raise UserError(f"windows={options.windows} has no effect: task.kind={kind} is measured on every row")
    if kind not in LABELLED:
        examples = _examples(run.config, options)
        compute = compute_options(run.config)
        return str(measure_chats(run.config, tokenizer, examples, compute, jax.jit)(run.params, _device()))
    predictions, loss = predict_labels(run, name, _examples(run.config, options), options.batch_size)
    if options.figure:
        save_confusion(predictions, Path(options.figure).expanduser())
    return table(predictions, score(predictions, loss))


def evaluate_text(run: LoadedRun, tokenizer: Tokenizer, options: EvaluateConfig) -> Evaluation:
    """The next token's loss; of a run that learned something else, on the text of the run it started from."""
    owner = run.config
    own = not _given(options)
    while own and owner.task.kind != "pretrain" and owner.init_from:
        owner = load_config(Path(owner.init_from).expanduser() / CONFIG_FILE)
    if own and owner.task.kind != "pretrain":
        raise UserError(f"{options.run_dir}: started from no run with text of its own; give --data.path")
    data = owner.data if own else options.data
    override = None if own and not owner.init_from else tokenizer  # as the run itself was prepared
    prepared = prepare(data, owner.tokenizer, Path(owner.cache_dir).expanduser(), tokenizer_override=override)
    split, block_size = prepared.dataset.validation, run.config.model.block_size
    batches = evaluation_batches(split, block_size, options.windows, options.batch_size, data.attend_across_documents)
    eval_step = jax.jit(make_eval_step(run.config.model, compute_options(run.config)))
    return measure(eval_step, run.params, batches, _device(), bytes_per_token(split))


def one_task(run: LoadedRun, part: str, where: str) -> tuple[LoadedRun, str]:
    """The run as one that learned a single task, and the name of its head.

    Raises:
        UserError: The run has no such part, or several and none is named.
    """
    tasks = parts_of(run.config)
    if part not in tasks and (part or len(tasks) > 1):
        raise UserError(f"{where}: part={part!r} must be one of {', '.join(tasks)}.{did_you_mean(part, tasks)}")
    name = part or next(iter(tasks))
    return dataclasses.replace(run, config=tasks[name]), name


def predict_labels(run: LoadedRun, name: str, examples: list, batch_size: int) -> tuple[Predictions, float]:
    """What head `name` of a run says of examples, and the mean loss where their labels are known."""
    config, task, tokenizer = run.config, run.config.task, run.tokenizer
    assert tokenizer is not None  # labels were learned with one
    predict = TASKS[task.kind].predict
    assert predict is not None  # checked by those who call
    return predict(config, name, run.params, tokenizer, examples, batch_size, compute_options(config), _device())


def _examples(config: Config, options: EvaluateConfig) -> list:
    if not _given(options):
        return read_examples(config.task, config.data).validation
    data, counts = options.data, Counter()
    named = dataclasses.replace(data, text_field=config.data.text_field)
    rows = limited(read_data_rows(data, counts), data)
    examples = list(parse(rows, config.task, named, counts=counts))
    for line in counted(counts):
        notify(line)
    for example in examples:
        if config.task.kind in LABELLED:
            check_labels(example, config.task.labels)
    if not examples:
        raise UserError(f"{', '.join(data.path) or data.hf_dataset}: no rows")
    return examples


def _given(options: EvaluateConfig) -> bool:
    return bool(options.data.path or options.data.source or options.data.hf_dataset)


def _device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
