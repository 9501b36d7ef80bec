"""A trained run, measured on text of one's choice."""

from collections.abc import Callable
from pathlib import Path

import jax

from gptjax.batches.pretraining import evaluation_batches
from gptjax.errors import UserError
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.text.prepare import prepare
from gptjax.training.checkpoint import load_run
from gptjax.training.setup import bytes_per_token
from gptjax.training.step import compute_options
from gptjax.verb_options import EvaluateConfig


def evaluate_run(options: EvaluateConfig, notify: Callable[[str], None] = print) -> Evaluation:
    """Measures a run on the validation split of its own data, or of the data that `options.data` names.

    `notify` is told of damaged checkpoints in one line.

    Raises:
        UserError: There is no such run, or its data cannot be read.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify)
    own = not (options.data.path or options.data.source or options.data.hf_dataset)
    data = run.config.data if own else options.data
    if run.tokenizer is None:
        raise UserError(f"{options.run_dir}: has no tokenizer, so no text can be measured")
    override = None if own and not run.config.init_from else run.tokenizer  # as the run itself was prepared
    prepared = prepare(data, run.config.tokenizer, Path(run.config.cache_dir).expanduser(), tokenizer_override=override)
    split = prepared.dataset.validation
    batches = evaluation_batches(
        split, run.config.model.block_size, options.windows, options.batch_size, data.attend_across_documents
    )
    eval_step = jax.jit(make_eval_step(run.config.model, compute_options(run.config)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return measure(eval_step, run.params, batches, device, bytes_per_token(split))
