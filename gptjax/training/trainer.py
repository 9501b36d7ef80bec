"""The training loop: step, log, evaluate, save. `setup.build` makes the parts that meet here."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.batches.prefetch import prefetch
from gptjax.batches.pretraining import cut_windows
from gptjax.batches.ramps import value_at
from gptjax.config.run import Config
from gptjax.config.start import Origin
from gptjax.config.task import PADDED
from gptjax.config.train import TrainConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.inside import layer_statistics
from gptjax.generation.sample import sample_texts
from gptjax.machine import allocator, compile_cache
from gptjax.machine.native.build import state as state_of_kernels
from gptjax.model.attention import explain_attention
from gptjax.parallel import cluster
from gptjax.parallel.mesh import batch_sharding, describe_layout, traced_in
from gptjax.parallel.pipeline import bubble
from gptjax.parallel.place import get, put_rows, rows_of_process
from gptjax.report import cost
from gptjax.report.html import REPORT_FILE, write_report
from gptjax.report.progress import say, silence_output
from gptjax.report.record import SAMPLES_FILE, read_record
from gptjax.tasks.instruct import chat_template
from gptjax.tasks.task import Scores
from gptjax.tasks.trainable import START, join
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.training import selftest
from gptjax.training.divergence import write_dump
from gptjax.training.guard import EXIT_DIVERGED, Abandoned, Signals, exit_status, locked_by_first
from gptjax.training.in_flight import InFlight
from gptjax.training.log import Log
from gptjax.training.parts import Parts
from gptjax.training.resume import Loop, checkpoint_meta
from gptjax.training.setup import build, stopped_early, why_finished
from gptjax.training.step import TrainState, evaluated_params

MOST_INSPECTED = 256
"""Tokens of the sequence that `log.activations` looks at: there is a weight for each pair of them."""

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
    options = parts.config.train
    first = int(state.step)
    finished = why_finished(parts, first, loop)
    if finished and not loop.evaluation_pending:
        say(finished)
        return 0
    selftest.check()
    agreement, in_flight, programs = cluster.Agreement(), InFlight(), {}

    def signal_of_any() -> int:
        """The number of a signal that any process got, as all of them know it; 0: none."""
        return agreement(signals.received or 0)

    if finished:
        with cluster.all_or_none():
            signals.begin()
            log = Log(parts, state, first)
        try:
            _finish_evaluation(parts, state, loop, log, signals, signal_of_any)
            return exit_status(signal_of_any())
        finally:
            log.close()
            say(finished)
            _write_report(parts)
    batches = device_batches(parts, first, options.num_steps)
    follow_model(parts, state)
    batch = next(batches)
    step_program = _program(parts, state, batch, programs, say)
    facts = _describe(parts, state, step_program)
    with cluster.all_or_none():  # nobody begins while another process still compiles
        signals.begin()
        log = Log(parts, state, first)
    step, stop, received = first, False, 0
    try:
        log.started(first, facts, origin)
        if loop.evaluation_pending:
            _finish_evaluation(parts, state, loop, log, signals, signal_of_any)
            received = signal_of_any()
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
            received = signal_of_any()
            stop = step == options.num_steps or received > 0
            log.note(step, metrics, due=step % options.log_every == 0 or step == 1 or stop)
            evaluate = step == options.num_steps or _due(step, options.eval_every)
            save = stop or _due(step, options.save_every)
            if evaluate or save:
                log.flush(everything=True)  # metrics up to a checkpoint's step are written before the checkpoint
            if log.in_a_row >= options.max_skipped_in_a_row:
                return _diverged(parts, state, log)
            scores, improved = None, False
            if evaluate and received:
                loop.evaluation_pending = True
            elif evaluate:
                try:
                    scores, improved = _evaluate(parts, state, loop, log, signals, signal_of_any)
                except Exception:
                    if jax.process_count() == 1:  # saving is collective, and the error may be this process's alone
                        _save(parts, state, loop, None, log)
                        parts.checkpoints.wait()
                    raise
                received = signal_of_any()
                stop = stop or received > 0 or stopped_early(parts.config, loop)
            if save or stop or improved:
                _save(parts, state, loop, scores, log)
        reason = _why_stopped(options, step, received)
        log.event("stop", step, reason=reason or "finished")
        parts.checkpoints.wait()
        with cluster.all_or_none():
            if parts.checkpoints.problem:
                raise UserError(parts.checkpoints.problem)
        if reason:
            log.progress.line(f"stopped at step {step} ({reason}); saved")
        return exit_status(received)
    finally:
        batches.close()
        log.close()
        _write_report(parts)


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


def _save(parts: Parts, state: TrainState, loop: Loop, scores: Scores | None, log: Log) -> None:
    """Starts to write a checkpoint, after the metrics up to its step."""
    log.file.sync()
    row = None if scores is None else scores.row()
    val_loss = None if scores is None else scores.val_loss
    parts.checkpoints.save(state, checkpoint_meta(parts, state, loop, row), val_loss)
    log.event("save", int(state.step))


def _finish_evaluation(
    parts: Parts, state: TrainState, loop: Loop, log: Log, signals: Signals, signal_of_any: Callable[[], int]
) -> None:
    """Makes the evaluation that was abandoned at a checkpoint's step."""
    scores, _ = _evaluate(parts, state, loop, log, signals, signal_of_any)
    if scores is not None:
        log.file.sync()
        meta = checkpoint_meta(parts, state, loop, scores.row())
        parts.checkpoints.add_evaluation(int(state.step), scores.val_loss, meta)


def _evaluate(
    parts: Parts, state: TrainState, loop: Loop, log: Log, signals: Signals, signal_of_any: Callable[[], int]
) -> tuple[Scores | None, bool]:
    """Measures the validation data and shows a sample; a signal ends both between two batches.

    Returns:
        The scores, None where the evaluation was abandoned, and whether they are the best so far.
    """
    params, step = evaluated_params(state), int(state.step)
    with log.evaluation(step, parts.task.evaluation_batches) as show_batch:

        def before_batch() -> None:
            if signal_of_any():
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
        _log_activations(parts, params, step, log)
    try:
        _show_sample(parts, params, step, log, signals)
    except Abandoned:
        log.progress.line(f"step {step} · sample abandoned")
    log.restart_clock()
    return scores, improved


def _log_activations(parts: Parts, params: dict, step: int, log: Log) -> None:
    """Writes statistics of every layer on the first sequence of the run."""
    if jax.process_count() > 1:
        params = get(parts.mesh, params)
        if not cluster.is_first():
            return
    [tokens] = parts.task.windows.batch(0, parts.config.train.batch_size, np.zeros(1, np.int64)).inputs
    params = jax.device_put(params, jax.local_devices()[0])
    log.by_layer(step, layer_statistics(parts.config.model, params, tokens[:MOST_INSPECTED]))


def _show_sample(parts: Parts, params: dict, step: int, log: Log, signals: Signals) -> None:
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
        if signals.received:
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


def _describe(parts: Parts, state: TrainState, step_program: Any) -> list[tuple[str, str]]:
    """Prints the facts of the run before it starts, and returns them with their headings."""
    config, task, tokens = parts.config, parts.task, parts.tokens_per_step
    layout = describe_layout(parts.mesh.shape)
    memory = step_program.memory_analysis()
    needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    pages = ", huge pages" if allocator.uses_huge_pages() else ""
    pages += ", cache of large buffers" if allocator.caches_buffers() else ""
    epochs = parts.tokens_before(config.train.num_steps) / task.windows.tokens_per_epoch
    of_model = {name: part for name, part in state.frozen.items() if name != START}
    trainable, frozen = (cost.parameter_count(params) for params in (state.params, of_model))
    count = cost.readable_count(trainable + frozen)
    if frozen:
        count += f", {cost.readable_count(trainable)} trainable ({100 * trainable / (trainable + frozen):.2f} %)"
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({layout}), {config.train.compute_dtype}"
    facts = [("device", device)]
    if jax.process_count() > 1:
        facts.append(("processes", str(jax.process_count())))
    stages, micro_batches = parts.mesh.shape["stage"], config.train.batch_size // config.train.micro_batch
    if stages > 1:
        waits = f"a stage waits {100 * bubble(stages, micro_batches):.0f} % of a step"
        facts.append(("pipeline", f"{stages} stages, {micro_batches} micro-batches: {waits}"))
    facts.append(("parameters", f"{count}, vocabulary {config.model.vocab_size:,}"))
    facts.append(("data", f"{task.windows.tokens_per_epoch:,} tokens per epoch, {tokens:,} per step"))
    facts += [("mixture" if config.sources else "examples", note) for note in task.notes]
    facts.append(("steps", f"{config.train.num_steps:,} = {epochs:.2f} epochs"))
    for name, ramp in (("batches", config.train.batch_ramp), ("lengths", config.train.length_ramp)):
        if ramp:
            facts.append((name, f"{' '.join(ramp)} (step:size); memory is that of the first size"))
    facts.append(("memory", f"{cost.readable_bytes(needs)} per device for a training step{pages}"))
    facts.append(("attention", _explain_attention(parts)))
    if jax.default_backend() == "cpu":
        facts.append(("kernels", state_of_kernels(parts.mesh.size)))
    for heading, text in facts:
        say(f"{heading:12}{text}")
    return facts


def _explain_attention(parts: Parts) -> str:
    config = parts.config
    segments = config.task.kind not in PADDED and not config.data.attend_across_documents
    ahead = config.task.objective.has_prefix
    explained = traced_in(parts.mesh, explain_attention)
    return explained(config.model, config.train.micro_batch, config.train.compute_dtype, segments, True, ahead)
