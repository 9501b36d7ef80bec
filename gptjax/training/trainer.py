"""The training loop: step, log, evaluate, save. `setup.build` makes the parts that meet here."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax

from gptjax.batches.prefetch import prefetch
from gptjax.batches.pretraining import cut_windows
from gptjax.batches.ramps import value_at
from gptjax.config.run import Config
from gptjax.config.start import Origin
from gptjax.config.train import TrainConfig
from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.parallel import cluster
from gptjax.parallel.mesh import batch_sharding
from gptjax.parallel.place import put_rows, rows_of_process
from gptjax.report.html import REPORT_FILE, write_report
from gptjax.report.progress import say, silence_output
from gptjax.report.record import read_record
from gptjax.tasks.task import Scores
from gptjax.tasks.trainable import join
from gptjax.training import selftest
from gptjax.training.divergence import write_dump
from gptjax.training.evaluate import Running, evaluate, finish_evaluation
from gptjax.training.facts import describe_run
from gptjax.training.guard import EXIT_DIVERGED, Signals, exit_status, locked_by_first
from gptjax.training.in_flight import InFlight
from gptjax.training.log import Log
from gptjax.training.parts import Parts
from gptjax.training.resume import Loop, checkpoint_meta
from gptjax.training.setup import build, stopped_early, why_finished
from gptjax.training.step import TrainState

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the arrays of a batch."""


def train(config: Config, origin: Origin | None = None) -> int:
    """Runs `config` from its beginning, or from the newest checkpoint in its run directory.

    `origin` is recorded for the report: the file of the config, and the options in which they differ.

    Returns:
        The exit status: 0; 143, 130 or 129 where SIGTERM, SIGINT or SIGHUP ended the run early, with its state saved
        (before the first step they end the process, see `Signals`);
        `EXIT_DIVERGED` where too many steps in a row made no update.

    Raises:
        UserError: Something in the config, the data or the run directory does not fit, or the last state could not
            be saved.
    """
    run_dir = Path(config.run_dir).expanduser()
    if not cluster.is_first():
        silence_output()
    with Signals() as signals, locked_by_first(run_dir):
        parts, state, loop = build(config, run_dir)
        try:
            with cluster.exit_on_unshared_error():
                return _run(parts, state, loop, signals, origin)
        finally:
            parts.checkpoints.close()


def _run(parts: Parts, state: TrainState, loop: Loop, signals: Signals, origin: Origin | None) -> int:
    first = int(state.step)
    finished = why_finished(parts, first, loop)
    if finished and not loop.evaluation_pending:
        say(finished)
        return 0
    selftest.check()
    if finished:
        run = _begin(parts, state, loop, signals)
        try:
            finish_evaluation(run, state)
            return exit_status(run.signal())
        finally:
            run.log.close()
            say(finished)
            _write_report(parts)
    programs = {}
    batches = device_batches(parts, first, parts.config.train.num_steps)
    follow_model(parts, state)
    batch = next(batches)
    facts = describe_run(parts, state, _program(parts, state, batch, programs, say))
    run = _begin(parts, state, loop, signals)
    try:
        run.log.started(first, facts, origin)
        return _train(run, state, batch, batches, programs)
    finally:
        batches.close()
        run.log.close()
        _write_report(parts)


def _begin(parts: Parts, state: TrainState, loop: Loop, signals: Signals) -> Running:
    """Opens the log."""
    with cluster.all_or_none():  # nobody begins while another process still compiles
        signals.begin()
        return Running(parts, loop, Log(parts, state, int(state.step)), signals, cluster.Agreement())


def _train(run: Running, state: TrainState, batch: Any, batches: Iterator[Any], programs: dict) -> int:
    """Trains until the last step or an earlier end; returns the exit status."""
    parts, loop, log = run.parts, run.loop, run.log
    options = parts.config.train
    step, stop, received, in_flight = int(state.step), False, 0, InFlight()
    if loop.evaluation_pending:
        finish_evaluation(run, state)
        received = run.signal()
        stop = received > 0 or stopped_early(parts.config, loop)
    while not stop:
        step_program = _program(parts, state, batch, programs, log.progress.line)
        with jax.transfer_guard("disallow"):
            state, metrics = step_program(state, batch)
        step += 1
        in_flight.add(metrics["loss"])
        if step != options.num_steps:
            with log.data_wait():
                follow_model(parts, state)
                batch = next(batches)
        log.flush()
        in_flight.wait()
        received = run.signal()
        stop = step == options.num_steps or received > 0
        log.note(step, metrics, due=step % options.log_every == 0 or step == 1 or stop)
        evaluating = step == options.num_steps or _due(step, options.eval_every)
        save = stop or _due(step, options.save_every)
        if evaluating or save:
            log.flush(everything=True)  # metrics up to a checkpoint's step are written before the checkpoint
        if log.in_a_row >= options.max_skipped_in_a_row:
            return _diverged(parts, state, log)
        scores, improved = None, False
        if evaluating and received:
            loop.evaluation_pending = True
        elif evaluating:
            scores, improved = _evaluate_or_save(run, state)
            received = run.signal()
            stop = stop or received > 0 or stopped_early(parts.config, loop)
        if save or stop or improved:
            _save(run, state, scores)
    return _end(run, step, received)


def _evaluate_or_save(run: Running, state: TrainState) -> tuple[Scores | None, bool]:
    """Evaluates the run; where that fails, the state is saved before the error is raised."""
    try:
        return evaluate(run, state)
    except Exception:
        if jax.process_count() == 1:  # saving is collective, and the error may be this process's alone
            _save(run, state, None)
            run.parts.checkpoints.wait()
        raise


def _end(run: Running, step: int, received: int) -> int:
    """Waits for the last checkpoint and reports why the run ended; returns the exit status."""
    reason = _why_stopped(run.parts.config.train, step, received)
    run.log.event("stop", step, reason=reason or "finished")
    run.parts.checkpoints.wait()
    with cluster.all_or_none():
        if run.parts.checkpoints.problem:
            raise UserError(run.parts.checkpoints.problem)
    if reason:
        run.log.progress.line(f"stopped at step {step} ({reason}); saved")
    return exit_status(received)


def _why_stopped(options: TrainConfig, step: int, received: int) -> str:
    """Why a run ended before its last step; empty: it did not."""
    if step == options.num_steps:
        return ""
    return f"signal {received}" if received else f"no better {options.best_by} in {options.patience} evaluations"


def _write_report(parts: Parts) -> None:
    """Writes the page of the run. Of whatever kind an error is: a run must not fail because its page cannot be made."""
    if not cluster.is_first():
        return
    path = parts.run_dir / REPORT_FILE
    try:
        write_report([read_record(parts.run_dir)], path)
    except Exception as error:
        say(f"{path}: no report: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _program(parts: Parts, state: TrainState, batch: Any, programs: dict, notify: Callable[[str], None]) -> Any:
    """The compiled step for the shapes of this batch; tasks whose batches differ in width have a few."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    shapes = tuple((jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape) for path, leaf in leaves)
    if shapes not in programs:
        if programs:
            notify(f"compiling the step again: {explain_new_shapes(next(reversed(programs)), shapes)}")
        programs[shapes] = selftest.compile_safely(parts.train_step.lower(state, batch))
        compile_cache.sign_programs()  # now, because a process that is killed signs no more
    return programs[shapes]


def explain_new_shapes(old: Shapes, new: Shapes) -> str:
    """Names the arrays of a batch whose shapes are not those of the step that was compiled last."""
    before = dict(old)
    changed = [f"{name} has shape {shape}, was {before.get(name)}" for name, shape in new if before.get(name) != shape]
    gone = [f"{name} is missing" for name in before.keys() - dict(new).keys()]
    return "; ".join(f"batch.{words}" for words in [*changed, *gone])


def _diverged(parts: Parts, state: TrainState, log: Log) -> int:
    """Ends a run whose steps make no update any more. Its state is not saved: the newest checkpoint is older."""
    [batch] = device_batches(parts, log.skips[-1]["step"] - 1, log.skips[-1]["step"])
    path = write_dump(parts, state, batch, log.skips)
    log.event("stop", log.skips[-1]["step"], reason="too many steps in a row made no update")
    limit = parts.config.train.max_skipped_in_a_row
    log.progress.line(
        f"stopped: {limit} steps in a row made no update, the last at step {log.skips[-1]['step']}; see {path}."
        " Nothing was saved since; change optim.learning_rate, the data, or train.spike_sigma, and resume"
    )
    return EXIT_DIVERGED


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def device_batches(parts: Parts, first: int, stop: int) -> Generator[Any]:
    """Batches of steps `first` to `stop - 1` as micro-batches `[M, B, ...]`, on their way to the devices."""
    options = parts.config.train
    sharding = batch_sharding(parts.mesh, leading_axes=1)

    def pieces(step: int) -> int:
        """Pieces into which the step's sequences are cut."""
        return parts.config.model.block_size // value_at(options.lengths, step) if options.lengths else 1

    def micro_batch(step: int) -> int:
        """Sequences in a forward pass of the step."""
        return options.micro_batch_size or value_at(options.batch_sizes, step)

    def make(step: int) -> Any:
        size = value_at(options.batch_sizes, step)
        rows = rows_of_process(parts.mesh, size, micro_batch(step))
        batch = parts.task.windows.batch(step, size, rows)
        if pieces(step) > 1:
            batch = cut_windows(batch, value_at(options.lengths, step))
        return jax.tree.map(lambda x: x.reshape(size // micro_batch(step), -1, *x.shape[1:]), batch)

    steps = range(first, stop)
    made = prefetch(make, first, stop) if parts.task.follow is None else map(make, steps)
    for step, batch in zip(steps, made, strict=True):
        yield put_rows(batch, sharding, micro_batch(step) * pieces(step))


def follow_model(parts: Parts, state: TrainState) -> None:
    """Gives the parameters to batches that are sampled from the model."""
    if parts.task.follow is not None:
        parts.task.follow(join(state.params, state.frozen))


def _save(run: Running, state: TrainState, scores: Scores | None) -> None:
    """Starts to write a checkpoint, after the metrics up to its step."""
    run.log.file.sync()
    row = None if scores is None else scores.row()
    val_loss = None if scores is None else scores.val_loss
    run.parts.checkpoints.save(state, checkpoint_meta(run.parts, state, run.loop, row), val_loss)
    run.log.event("save", int(state.step))
