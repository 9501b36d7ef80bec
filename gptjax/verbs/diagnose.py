"""`gptjax diagnose`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.batches.pretraining import evaluation_batches
from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.diagnose import DiagnoseConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.diagnose import (
    Group,
    by_confidence,
    by_frequency,
    by_position,
    calibration_error,
    predict_targets,
    repetition,
    used_context,
)
from gptjax.evaluation.likelihood import check_likelihood
from gptjax.evaluation.loss import NO_TARGETS
from gptjax.generation.sample import sample_texts
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.text.shards import TokenSplit
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.step import compute_options
from gptjax.verbs.own_text import open_own_text

COUNTED_TOKENS = 50_000_000
"""Token frequencies are counted in this many tokens at the start of the training text."""
GRAM = 4
SAMPLES = 8


def run_diagnose(run_dir: str, options: DiagnoseConfig) -> int:
    """Prints the parts of a run's loss on its own validation text.

    Raises:
        UserError: The run was not trained on text, or its data cannot be read.
    """
    compile_cache.start()
    run = load_run(Path(run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    config = run.config
    if config.task.kind != "pretrain" or run.tokenizer is None:
        raise UserError(f"{run_dir}: diagnose needs a run with task.kind=pretrain and a tokenizer")
    check_likelihood(config, run_dir)
    if config.sources:
        raise UserError(f"{run_dir}: mixes {len(config.sources)} texts; diagnose needs one, evaluate measures each")
    dataset = open_own_text(config, run.tokenizer, notify).dataset
    if run.data_hash and dataset.hash != run.data_hash:
        notify(f"{run_dir}: its text has changed since it was trained; the loss is that of the new text")
    block, across = config.model.block_size, config.data.attend_across_documents
    batches = evaluation_batches(dataset.validation, block, options.windows, options.batch_size, across)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    predictions = predict_targets(config.model, run.params, batches, compute_options(config), device)
    if not len(predictions.nll):
        raise UserError(f"{run_dir}: of its text {NO_TARGETS}")
    loss = float(predictions.nll.mean(dtype=np.float64))
    accuracy = predictions.correct.mean()
    print(f"step {run.step:,}: {len(predictions.nll):,} targets, loss {loss:.4f}, accuracy {accuracy:.2%}")
    positions = by_position(predictions)
    _print("position in the document", positions)
    print(f"The loss falls up to positions {used_context(positions)} of {block:,}.")
    _print(
        "occurrences of the target in the training text",
        by_frequency(predictions, _counts(dataset.train, config.model.vocab_size)),
    )
    confidences = by_confidence(predictions)
    _print("probability of the most likely token", confidences)
    print(f"Expected calibration error {calibration_error(confidences):.4f} (0: right on average).")
    if options.sample_tokens:
        _print_repetition(run, run.tokenizer, dataset.validation, options.sample_tokens)
    return 0


def _counts(split: TokenSplit, vocab_size: int) -> np.ndarray:
    tokens = split.slice(0, min(split.n_tokens, COUNTED_TOKENS))
    return np.bincount(tokens.astype(np.int64), minlength=vocab_size)


def _print_repetition(run, tokenizer: Tokenizer, validation: TokenSplit, length: int) -> None:
    """Compares repetition in samples with that in validation text of the same length."""
    options = SampleConfig(num_samples=SAMPLES, max_new_tokens=length, seed=0, ignore_end_of_text=True)
    prompt = run.config.train.sample_prompt
    [texts] = sample_texts(run.config.model, run.params, tokenizer, [prompt], options, notify=notify)
    own = [tokenizer.encode(text).tolist() for text in texts]
    starts = np.linspace(0, max(0, validation.n_tokens - length), SAMPLES).astype(int)
    given = [validation.slice(int(s), min(int(s) + length, validation.n_tokens)).tolist() for s in starts]
    print(
        f"\nRepeated {GRAM}-grams within {length} tokens: {repetition(own, GRAM):.1%} in {SAMPLES} samples"
        f" at temperature 1, {repetition(given, GRAM):.1%} in validation text."
    )


def _print(title: str, groups: Sequence[Group]) -> None:
    width = max(len(title), *(len(group.name) for group in groups))
    print(f"\n{title:{width}}  {'targets':>10}  {'loss':>8}  {'accuracy':>8}  {'confidence':>10}")
    for group in groups:
        numbers = f"{group.count:10,}  {group.loss:8.4f}  {group.accuracy:8.2%}  {group.confidence:10.2%}"
        print(f"{group.name:{width}}  {numbers}")
