"""The facts of a run that are printed before its first step."""

from typing import Any

import jax

from gptjax.config.task import PADDED
from gptjax.machine import allocator
from gptjax.machine.native.build import state as state_of_kernels
from gptjax.model.attention import explain_attention
from gptjax.parallel.mesh import describe_layout, traced_in
from gptjax.parallel.pipeline import bubble
from gptjax.report import cost
from gptjax.report.progress import say
from gptjax.tasks.trainable import START
from gptjax.training.parts import Parts
from gptjax.training.step import TrainState


def describe_run(parts: Parts, state: TrainState, step_program: Any) -> list[tuple[str, str]]:
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
