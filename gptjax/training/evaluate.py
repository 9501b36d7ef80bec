"""Evaluates a run between two steps, and shows a sample."""

from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.inside import layer_statistics
from gptjax.generation.sample import sample_texts
from gptjax.parallel import cluster
from gptjax.parallel.mesh import batch_sharding
from gptjax.parallel.place import get
from gptjax.report.record import SAMPLES_FILE
from gptjax.tasks.instruct import chat_template
from gptjax.tasks.task import Scores
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.training.guard import Abandoned, Signals
from gptjax.training.log import Log
from gptjax.training.parts import Parts
from gptjax.training.resume import Loop, checkpoint_meta
from gptjax.training.step import TrainState, evaluated_params

MOST_INSPECTED = 256
"""Tokens of the sequence that `log.activations` looks at: there is a weight for each pair of them."""


class Running(NamedTuple):
    """A run whose log is open."""

    parts: Parts
    loop: Loop
    log: Log
    signals: Signals
    agreement: cluster.Agreement

    def signal(self) -> int:
        """The number of a signal that any process got, as all of them know it; 0: none."""
        return self.agreement(self.signals.received or 0)


def finish_evaluation(run: Running, state: TrainState) -> None:
    """Makes the evaluation that was abandoned at a checkpoint's step."""
    scores, _ = evaluate(run, state)
    if scores is not None:
        run.log.file.sync()
        meta = checkpoint_meta(run.parts, state, run.loop, scores.row())
        run.parts.checkpoints.add_evaluation(int(state.step), scores.val_loss, meta)


def evaluate(run: Running, state: TrainState) -> tuple[Scores | None, bool]:
    """Measures the validation data and shows a sample; a signal ends both between two batches.

    Returns:
        The scores, None where the evaluation was abandoned, and whether they are the best so far.
    """
    parts, loop, log = run.parts, run.loop, run.log
    params, step = evaluated_params(state), int(state.step)
    with log.evaluation(step, parts.task.evaluation_batches) as show_batch:

        def before_batch() -> None:
            if run.signal():
                raise Abandoned
            show_batch()

        parts.evaluation_hook.before_batch = before_batch
        try:
            scores = parts.task.evaluate(params, batch_sharding(parts.mesh))
        except Abandoned:
            loop.evaluation_pending = True
            log.progress.line(f"step {step} · evaluation abandoned; it is made when the run resumes")
            return None, False
    loop.evaluation_pending = False
    by = parts.config.train.best_by
    row = scores.row()
    if by != "loss" and by not in row:
        raise UserError(
            f"train.best_by={by}: task.metric={parts.config.task.metric!r} returned a dict without {by!r}; return a"
            " number, or that name too"
        )
    improved = loop.take(scores.val_loss, None if by == "loss" else row[by])
    log.write({"step": step, **row})
    log.progress.evaluated(step, f"{scores}{' (best)' if improved else ''}", scores.val_loss)
    if parts.config.log.activations:
        _log_activations(run, params, step)
    try:
        _show_sample(run, params, step)
    except Abandoned:
        log.progress.line(f"step {step} · sample abandoned")
    log.restart_clock()
    return scores, improved


def _log_activations(run: Running, params: dict, step: int) -> None:
    """Writes statistics of every layer on the first sequence of the run."""
    config = run.parts.config
    if jax.process_count() > 1:
        params = get(run.parts.mesh, params)
        if not cluster.is_first():
            return
    [tokens] = run.parts.task.windows.batch(0, config.train.batch_size, np.zeros(1, np.int64)).inputs
    params = jax.device_put(params, jax.local_devices()[0])
    run.log.by_layer(step, layer_statistics(config.model, params, tokens[:MOST_INSPECTED]))


def _show_sample(run: Running, params: dict, step: int) -> None:
    parts, log = run.parts, run.log
    config = parts.config
    other = config.heads or config.task.objective.why_no_sample or config.model.encoder_layers
    if not config.train.sample_tokens or other:
        return
    options = SampleConfig(max_new_tokens=config.train.sample_tokens, temperature=0.8, seed=config.seed)
    if jax.process_count() > 1:
        params = get(parts.mesh, params)
        if not cluster.is_first():
            return

    def stop_early(*_piece: Any) -> None:
        if run.signals.received:
            raise Abandoned

    params = jax.device_put(params, jax.local_devices()[0])
    prompt = config.train.sample_prompt
    try:
        template = chat_template(config)
        if template is not None:
            prompt = render_prompt([Message(USER, prompt)], template)
        [[text]] = sample_texts(
            config.model,
            params,
            parts.tokenizer,
            [prompt],
            options,
            on_text=stop_early,
            at_start=template is not None,
            prefix=config.task.objective.kind == "prefix",
        )
    except Abandoned:
        raise
    except Exception as error:  # of whatever kind: training must not end because a sample cannot be made
        reason = " ".join(str(error).split())[:200]
        log.progress.line(f"step {step} · no sample: {type(error).__name__}: {reason}")
        return
    log.progress.sample(prompt + text)
    with open(parts.run_dir / SAMPLES_FILE, "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{prompt}{text}\n")
