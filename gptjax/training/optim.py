"""Schedules and optimizers, as pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gptjax.config.run import OptimConfig
from gptjax.training.muon import scale_by_muon


def make_schedule(config: OptimConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the number of updates made before: a float32 scalar.

    Warm-up is linear and reaches the peak at update `warmup_steps`. cosine: SGDR without restarts
    (arXiv:1608.03983); wsd: warm-up, stable, decay (arXiv:2404.06395, section 4).
    """
    peak, final, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, num_steps - round(config.wsd_decay_fraction * num_steps))

    def schedule(updates: jax.Array) -> jax.Array:
        n = updates.astype(jnp.float32)
        share = jnp.clip((n - start) / max(1, num_steps - start), 0.0, 1.0)  # of the decay that is behind
        if config.schedule == "constant":
            rate = jnp.float32(peak)
        elif config.schedule == "cosine":
            rate = final + 0.5 * (1.0 + jnp.cos(jnp.pi * share)) * (peak - final)
        else:
            rate = peak + share * (final - peak)
        return jnp.where(n < warmup, peak * (n + 1.0) / (warmup + 1.0), rate)

    return schedule


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
    """True for what weight decay pulls to zero: matrices and embeddings, neither biases nor norms.

    By name, since stacked biases are matrices too.
    """

    def one(path, _leaf):
        name = path[-1].key
        return not (name.startswith("b_") or name in ("scale", "bias", "mix", "distances"))

    return jax.tree_util.tree_map_with_path(one, params)
