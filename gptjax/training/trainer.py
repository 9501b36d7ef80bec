"""The training loop: step, log, evaluate, save. `setup.build` makes the parts that meet here."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from gptjax.batches.prefetch import prefetch
from gptjax.config.run import Config
from gptjax.config.verbs import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import sample_texts
from gptjax.machine import allocator, compile_cache
from gptjax.machine.native.build import state as state_of_kernels
from gptjax.model.attention import explain_attention
from gptjax.parallel import cluster
from gptjax.parallel.mesh import batch_sharding, traced_in
from gptjax.parallel.pipeline import bubble
from gptjax.parallel.place import get, put_rows, rows_of_process
from gptjax.report import cost
from gptjax.report.progress import say, say_no_more
from gptjax.tasks.instruct import chat_template
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.training import selftest
from gptjax.training.divergence import write_dump
from gptjax.training.guard import EXIT_DIVERGED, Signals, exit_status, locked_by_first
from gptjax.training.log import Log
from gptjax.training.setup import Loop, Parts, build, checkpoint_meta
from gptjax.training.step import TrainState, evaluated_params

SAMPLES_FILE = "samples.txt"


def train(config: Config) -> int:
    """Runs `config` from its beginning, or from the newest checkpoint in its run directory.

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
        say_no_more()
    with Signals() as signals, locked_by_first(run_dir):
        selftest.check()
        parts, state, loop = build(config, run_dir)
        try:
            with cluster.guarded():
                return _run(parts, state, loop, signals)
        finally:
            parts.checkpoints.close()


def _run(parts: Parts, state: TrainState, loop: Loop, signals: Signals) -> int:
    options = parts.config.train
    first = int(state.step)
    if first >= options.num_steps:
        say(f"{parts.run_dir}: is at step {first} already; raise train.num_steps={options.num_steps} to go on")
        return 0
    batches = _device_batches(parts, first, options.num_steps)
    batch = next(batches)
    programs = {}
    step_program = _program(parts, state, batch, programs)
    _describe(parts, state, step_program)
    with cluster.together():  # nobody begins while another one still compiles
        signals.begin()
        log = Log(parts, state, first)
    step, stop, agreement, received = first, False, cluster.Agreement(), 0
    try:
        while not stop:
            step_program = _program(parts, state, batch, programs)
            with jax.transfer_guard("disallow"):
                state, metrics = step_program(state, batch)
            step += 1
            received = agreement(signals.received or 0)
            stop = step == options.num_steps or received > 0
            if not stop:
                batch = next(batches)
            log.flush()
            log.note(step, metrics, due=step % options.log_every == 0 or step == 1 or stop)
            evaluate = step == options.num_steps or _due(step, options.eval_every)
            save = stop or _due(step, options.save_every)
            if evaluate or save:
                log.flush(everything=True)  # what a checkpoint covers is written before it
            if log.in_a_row >= options.max_skipped_in_a_row:
                return _diverged(parts, state, log)
            val_loss = None
            if evaluate:
                try:
                    val_loss = _evaluate(parts, state, loop, step, log)
                except Exception:
                    if jax.process_count() == 1:  # saving is collective, and the error may be this process's alone
                        _save(parts, state, loop, log, None)
                        parts.checkpoints.wait()
                    raise
                stop = stop or 0 < options.patience <= loop.evaluations_since_best
            improved = val_loss is not None and loop.evaluations_since_best == 0
            if save or stop or improved:
                _save(parts, state, loop, log, val_loss)
        parts.checkpoints.wait()
        with cluster.together():
            if parts.checkpoints.problem:
                raise UserError(parts.checkpoints.problem)
        if step < options.num_steps:
            early = f"no better loss in {options.patience} evaluations"
            reason = f"signal {received}" if received else early
            log.progress.line(f"stopped at step {step} ({reason}); saved")
        return exit_status(received)
    finally:
        batches.close()
        log.close()


def _program(parts: Parts, state: TrainState, batch: Any, programs: dict) -> Any:
    """The compiled step for the shapes of this batch; tasks whose batches differ in width have a few."""
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
    if shapes not in programs:
        programs[shapes] = selftest.compile_safely(parts.train_step.lower(state, batch))
        compile_cache.sign_programs()  # now, because a process that is killed signs no more
    return programs[shapes]


def _save(parts: Parts, state: TrainState, loop: Loop, log: Log, val_loss: float | None) -> None:
    """Starts to write a checkpoint, after the metrics that it covers."""
    log.file.sync()
    parts.checkpoints.save(state, checkpoint_meta(parts, loop), val_loss)


def _diverged(parts: Parts, state: TrainState, log: Log) -> int:
    """Ends a run whose steps make no update any more. Its state is not saved: the newest checkpoint is older."""
    [batch] = _device_batches(parts, log.skips[-1]["step"] - 1, log.skips[-1]["step"])
    path = write_dump(parts, state, batch, log.skips)
    limit = parts.config.train.max_skipped_in_a_row
    log.progress.line(
        f"stopped: {limit} steps in a row made no update, the last at step {log.skips[-1]['step']}; see {path}."
        " Nothing was saved since; change optim.learning_rate, the data, or train.spike_sigma, and go on"
    )
    return EXIT_DIVERGED


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device_batches(parts: Parts, first: int, stop: int) -> Generator[Any]:
    """Batches from step `first` up to `stop`, cut into micro-batches `[M, B, ...]` and on their way to the devices."""
    options = parts.config.train
    sharding = batch_sharding(parts.mesh, leading_axes=1)
    rows = rows_of_process(parts.mesh, options.batch_size, options.micro_batch)
    micro_batches = options.batch_size // options.micro_batch

    def make(step: int) -> Any:
        batch = parts.task.windows.batch(step, options.batch_size, rows)
        return jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)

    for batch in prefetch(make, first, stop):
        yield put_rows(batch, sharding, options.micro_batch)


def _evaluate(parts: Parts, state: TrainState, loop: Loop, step: int, log: Log) -> float:
    """Measures the validation data, notes whether it is the best, and shows a sample."""
    params = evaluated_params(state)
    evaluation = parts.task.evaluate(params, batch_sharding(parts.mesh))
    if evaluation.val_loss < loop.best_loss:
        loop.best_loss, loop.evaluations_since_best = evaluation.val_loss, 0
    else:
        loop.evaluations_since_best += 1
    log.file.write({"step": step, **evaluation.row()})
    best = " (best)" if loop.evaluations_since_best == 0 else ""
    log.progress.line(f"step {step} · validation {evaluation}{best}")
    _show_sample(parts, params, step, log)
    log.restart_clock()
    return evaluation.val_loss


def _show_sample(parts: Parts, params: dict, step: int, log: Log) -> None:
    config = parts.config
    if not config.train.sample_tokens or config.heads:
        return
    options = SampleConfig(max_new_tokens=config.train.sample_tokens, temperature=0.8, seed=config.seed)
    if jax.process_count() > 1:
        params = get(parts.mesh, params)
        if not cluster.is_first():
            return
    params = jax.device_put(params, jax.local_devices()[0])
    try:
        template, prompt = chat_template(config), config.train.sample_prompt
        if template is not None:
            prompt = render_prompt([Message(USER, prompt)], template)
        [[text]] = sample_texts(config.model, params, parts.tokenizer, [prompt], options, at_start=template is not None)
    except Exception as error:  # of whatever kind: training must not end because a sample cannot be made
        log.progress.line(f"    no sample: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    log.progress.line(f"    {text!r}")
    with open(parts.run_dir / SAMPLES_FILE, "a", encoding="utf-8") as file:
        file.write(f"--- step {step}\n{prompt}{text}\n")


def _describe(parts: Parts, state: TrainState, step_program: Any) -> None:
    """Says what is about to run, before it does."""
    config, task, tokens = parts.config, parts.task, parts.tokens_per_step
    layout = " x ".join(f"{name} {size}" for name, size in parts.mesh.shape.items() if size > 1) or "one device"
    memory = step_program.memory_analysis()
    needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    pages = ", huge pages" if allocator.uses_huge_pages() else ""
    pages += ", cache of large buffers" if allocator.caches_buffers() else ""
    epochs = config.train.num_steps * tokens / task.windows.tokens_per_epoch
    learning, frozen = (cost.parameter_count(params) for params in (state.params, state.frozen))
    count = cost.readable_count(learning + frozen)
    if frozen:
        count += f", of which {cost.readable_count(learning)} learn ({100 * learning / (learning + frozen):.2f} %)"
    say(f"device      {jax.device_count()} x {jax.devices()[0].device_kind} ({layout}), {config.train.compute_dtype}")
    if jax.process_count() > 1:
        say(f"processes   {jax.process_count()}")
    stages, micro_batches = parts.mesh.shape["stage"], config.train.batch_size // config.train.micro_batch
    if stages > 1:
        waits = f"a stage waits {100 * bubble(stages, micro_batches):.0f} % of a step"
        say(f"pipeline    {stages} stages, {micro_batches} micro-batches: {waits}")
    say(f"parameters  {count}, vocabulary {config.model.vocab_size:,}")
    say(f"data        {task.windows.tokens_per_epoch:,} tokens per epoch, {tokens:,} per step")
    for note in task.notes:
        say(f"examples    {note}")
    say(f"steps       {config.train.num_steps:,} = {epochs:.2f} epochs")
    say(f"memory      {cost.readable_bytes(needs)} per device for a training step{pages}")
    say(f"attention   {_explain_attention(parts)}")
    if jax.default_backend() == "cpu":
        say(f"kernels     {state_of_kernels(parts.mesh.size)}")


def _explain_attention(parts: Parts) -> str:
    config = parts.config
    segments = config.task.kind != "classify" and not config.data.attend_across_documents
    explained = traced_in(parts.mesh, explain_attention)
    return explained(config.model, config.train.micro_batch, config.train.compute_dtype, segments, True)
