"""Checks before compilation that a run can be sharded over its mesh."""

import jax

from gptjax.batches.labelled import widths
from gptjax.config.run import Config
from gptjax.config.task import PADDED, SEVERAL
from gptjax.errors import UserError
from gptjax.parallel.mesh import batch_shards


def check_fits(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Checks that a run can be sharded over its mesh.

    Raises:
        UserError: An axis does not divide the dimension that it shards, or the run has a feature that it cannot shard.
    """
    model, train, size = config.model, config.train, mesh.shape
    if train.micro_batch % batch_shards(mesh):
        name = "micro_batch_size" if train.micro_batch_size else "batch_size"
        raise UserError(
            f"train.{name}={train.micro_batch} must be divisible by the {batch_shards(mesh)} devices that share a"
            " batch (mesh.data x mesh.fsdp x mesh.expert)"
        )
    for step, size_then in train.batch_sizes:
        if (train.micro_batch_size or size_then) % batch_shards(mesh):
            raise UserError(
                f"train.batch_ramp: {size_then} sequences, from step {step} on, must be divisible by the"
                f" {batch_shards(mesh)} devices that share a batch (mesh.data x mesh.fsdp x mesh.expert)"
            )
    if size["expert"] > 1 and (model.n_expert == 0 or model.n_expert % size["expert"]):
        raise UserError(f"mesh.expert={size['expert']} does not divide model.n_expert={model.n_expert}")
    heads = "n_kv_head" if model.n_kv_head else "n_head"
    if model.kv_heads % size["tensor"]:
        raise UserError(f"mesh.tensor={size['tensor']} does not divide model.{heads}={model.kv_heads}")
    if model.n_layer % size["stage"]:
        raise UserError(f"mesh.stage={size['stage']} does not divide model.n_layer={model.n_layer}")
    for name, length in _lengths(config):
        if size["context"] > 1 and length % (2 * size["context"]):
            raise UserError(
                f"{name} must be a multiple of {2 * size['context']}, two chunks for each of"
                f" mesh.context={size['context']} devices"
            )
    if config.task.kind == "reinforce" and jax.process_count() > 1:
        raise UserError("task.kind=reinforce samples on one device and runs in one process; start a single one")
    if size["stage"] > 1:
        _check_stages(config, f"mesh.stage={size['stage']}", model.n_layer // size["stage"])


def _lengths(config: Config) -> list[tuple[str, int]]:
    """Lengths that sequences may have, each with the option that sets it."""
    found = [(f"model.block_size={config.model.block_size}", config.model.block_size)]
    found += [(f"train.length_ramp: {length} tokens", length) for _, length in config.train.lengths]
    for task in (config.task, *(part.task for part in config.parts)):
        longest = task.max_tokens or config.model.block_size
        name = f"task.max_tokens={task.max_tokens}" if task.max_tokens else found[0][0]
        if task.kind in PADDED:
            found += [(f"{name}: texts of up to {length} tokens, but {length}", length) for length in widths(longest)]
        elif task.max_tokens:
            found.append((name, longest))
    return found


def _check_stages(config: Config, stages: str, layers: int) -> None:
    pattern = config.model.attention_pattern
    if pattern and layers % len(pattern):
        raise UserError(
            f"{stages}: each stage has {layers} layers, which must be a multiple of the {len(pattern)} that"
            " model.attention_pattern names"
        )
    if config.train.noise_scale:
        raise UserError(f"{stages} does not go with train.noise_scale=true: stages sum gradients over micro-batches")
    if config.task.objective.kind == "multi_token":
        raise UserError(f"{stages} does not go with task.objective.kind=multi_token: its heads follow the last stage")
    if config.model.encoder_layers:
        raise UserError(f"{stages} does not go with model.encoder_layers: all stages would need the encoder's output")
    if config.model.n_expert:
        raise UserError(f"{stages} cannot be combined with model.n_expert: stages do not pass on the router's losses")
    earlier = {"residual_mix": "the embeddings", "value_residual": "values", "learned_skips": "outputs"}
    for name, what in earlier.items():
        if getattr(config.model, name):
            raise UserError(
                f"{stages} cannot be combined with model.{name}=true: later stages do not have {what} of earlier ones"
            )
    if config.task.kind == "multi":
        raise UserError(
            f"{stages} cannot be combined with task.kind=multi: its batches are not a single list of micro-batches"
        )
    if config.task.both_orders or config.task.kind in SEVERAL:
        name = "task.both_orders" if config.task.both_orders else f"task.kind={config.task.kind}"
        raise UserError(f"{stages} cannot be combined with {name}: its rows are several sequences")
    if config.task.layer_mixture:
        raise UserError(f"{stages} cannot be combined with task.layer_mixture: the head reads all layers")
    if config.task.delimiters == "learned":
        raise UserError(f"{stages} cannot be combined with task.delimiters=learned: the first stage has no head")
    if config.model.adapter.kind == "prompt":
        raise UserError(
            f"{stages} cannot be combined with model.adapter.kind=prompt: the prompt passes all blocks before the text"
        )
    if config.finetune.mixout:
        raise UserError(f"{stages} cannot be combined with finetune.mixout: each stage has only its own weights")
    if config.finetune.train == "top":
        raise UserError(
            f"{stages} cannot be combined with finetune.train=top: only the last stages would have trainable parameters"
        )
