"""Learning-rate schedules and optimizers, as pure functions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gptjax.config.optim import EXTENSION, OptimConfig
from gptjax.training.muon import scale_by_muon

Schedule = Callable[[jax.Array], jax.Array]
"""The learning rate as a function of the number of updates made before: a float32 scalar."""


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Returns the learning rate of a run of `num_steps`, with the changes of this number that `config.extended` lists.

    Warm-up is linear. cosine: SGDR without restarts (arXiv:1608.03983); wsd: warm-up, stable, decay (arXiv:2404.06395,
    section 4); inverse_sqrt: as the first transformers (arXiv:1706.03762, equation 3), with another peak.
    """
    changes = [match.groups() for match in map(EXTENSION.fullmatch, config.extended) if match]
    lengths = [*(int(planned) for _, _, planned in changes), num_steps]
    schedule = _warmed_up(config, 0, lengths[0], lambda n: jnp.zeros(()))
    for (how, update, _), length in zip(changes, lengths[1:], strict=True):
        after = _warmed_up if how == "restart" else _continued
        schedule = _switched(schedule, int(update), after(config, int(update), length, schedule))
    return schedule


def _switched(before: Schedule, update: int, after: Schedule) -> Schedule:
    return lambda updates: jnp.where(updates < update, before(updates), after(updates))


def _warmed_up(config: OptimConfig, first: int, num_steps: int, before: Schedule) -> Schedule:
    """Linear warm-up from the rate of `before` at update `first` to the peak, then decay until `num_steps`."""
    warmup = config.warmup_steps or math.ceil(config.warmup_fraction * (num_steps - first))
    peak, end = config.learning_rate, first + warmup
    steps = float(max(1, warmup) if config.warmup_rule == "to_peak" else warmup + 1)
    decay = _decay(config, end, num_steps, first + steps)

    def schedule(updates: jax.Array) -> jax.Array:
        n, start = updates.astype(jnp.float32), before(jnp.int32(first))
        warm = start + (peak - start) * (n - first + 1.0) / steps
        return jnp.where(n < end, warm, decay(n, jnp.float32(peak)))

    return schedule


def _continued(config: OptimConfig, first: int, num_steps: int, before: Schedule) -> Schedule:
    """Decay until `num_steps` from the rate that `before` has at update `first`."""
    decay = _decay(config, first, num_steps, first + 1.0)
    return lambda updates: decay(updates.astype(jnp.float32), before(jnp.int32(first)))


def _decay(
    config: OptimConfig, first: int, num_steps: int, peak_step: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `rate(n, start)`: from `start` at update `first` or later to `min_learning_rate` at `num_steps`.

    inverse_sqrt has `start` at step `peak_step`, where update n is step n + 1.
    """
    begin = first
    if config.schedule == "wsd":
        begin = max(first, num_steps - round(config.wsd_decay_fraction * num_steps))

    def rate(n: jax.Array, start: jax.Array) -> jax.Array:
        done = jnp.clip((n - begin) / max(1, num_steps - begin), 0.0, 1.0)
        if config.schedule == "constant":
            return start
        if config.schedule == "inverse_sqrt":
            return start * jnp.sqrt(peak_step / (n + 1.0))
        if config.schedule == "cosine":
            return config.min_learning_rate + 0.5 * (1.0 + jnp.cos(jnp.pi * done)) * (start - config.min_learning_rate)
        return start + done * (config.min_learning_rate - start)

    return rate


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns clipping, moments and decoupled decay; the caller multiplies its updates by minus the learning rate."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    moments = OPTIMIZERS[config.name](config)
    return optax.chain(clip, moments, optax.add_decayed_weights(config.weight_decay, mask=decayed))


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.beta1, config.beta2)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Second moments of matrices as a product of two vectors; no first moments (arXiv:1804.04235, sections 3 and 6)."""
    factored = optax.scale_by_factored_rms(decay_rate=config.factored_decay, min_dim_size_to_factor=32)
    return optax.chain(factored, optax.clip_by_block_rms(1.0))


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices of blocks, Adam for all else."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if in_block_matrix(path) else "adam", params)

    return optax.partition({"muon": scale_by_muon(config.muon_beta), "adam": _adam(config)}, labels)


OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""By `optim.name`: what turns gradients into updates, before decay and learning rate."""


def in_block_matrix(path: tuple) -> bool:
    """Whether a path of the parameters leads to a matrix of a block."""
    return any(getattr(key, "key", None) == "blocks" for key in path) and path[-1].key.startswith("w_")


def rate_factors(config: OptimConfig, params: dict) -> dict | None:
    """Factor of the learning rate of each parameter, by its group; None: all are 1."""
    matrices = config.muon_learning_rate / config.learning_rate if config.name == "muon" else 1.0
    if matrices == config.embedding_rate == config.head_rate == 1.0:
        return None

    def one(path, _leaf):
        if in_block_matrix(path):
            return jnp.float32(matrices)
        if path[0].key == "embed" and path[-1].key == "tokens":
            return jnp.float32(config.embedding_rate)
        return jnp.float32(config.head_rate if path[0].key == "head" else 1.0)

    return jax.tree_util.tree_map_with_path(one, params)


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay applies to: matrices and embeddings, neither biases nor norms.

    By name, since stacked biases are matrices too.
    """

    def one(path, _leaf):
        name = path[-1].key
        return not (name.startswith("b_") or name in ("scale", "bias", "mix", "distances"))

    return jax.tree_util.tree_map_with_path(one, params)
