"""One optimizer step, as a pure function of its arguments.

Shape suffixes: M micro-batch, B sequences in one, T position.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.config.run import Config
from gptjax.model.gpt import Compute
from gptjax.ops.axes import STAGES, axis_size
from gptjax.ops.cross_entropy import Loss
from gptjax.ops.scheduling import schedule_each_after
from gptjax.parallel.mesh import traced_in
from gptjax.parallel.pipeline import Pieces, pipelined_gradient
from gptjax.parallel.place import get
from gptjax.tasks.registry import make_loss, make_states_loss
from gptjax.tasks.trainable import forward_params, init_split, join, mixed_with_start, rates
from gptjax.training.by_layer import by_layer, group_names
from gptjax.training.noise import SMALL_SQUARE, Noise, init_noise, update_noise
from gptjax.training.optim import make_optimizer, rate_factors
from gptjax.training.precision import LossScale, compute_dtype, init_loss_scale, next_loss_scale
from gptjax.training.schedules import Schedule, make_schedule
from gptjax.training.watch import ACCEPTED, HALTED, NOT_FINITE, Watch, init_watch, judge, update_watch

Metrics = dict[str, Any]
"""Scalars, and under `by_layer` arrays with a number for each layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and therefore everything that a checkpoint must contain."""

    step: jax.Array
    """Number of batches, int32."""
    skipped: jax.Array
    """Number of batches without an update, because their gradient was not finite or a spike, int32."""
    params: dict
    """Trainable parameters."""
    opt_state: Any
    loss_scale: LossScale | None
    """Only for float16."""
    ema: dict | None
    """Average of the parameters over steps: of `train.ema` or the optimizer's own; None: there is none."""
    watch: Watch
    """Statistics for spike detection."""
    frozen: dict
    """Frozen parameters."""
    noise: Noise | None = None
    """Only where the config asks for the noise scale."""


def init_state(config: Config, given: dict | None = None) -> TrainState:
    """Initializes a state from `config.seed`; parameters in `given` are used as they are."""
    params, frozen = init_split(config, given)
    return TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(config.optim).init(params),
        loss_scale=init_loss_scale() if config.train.compute_dtype == "float16" else None,
        ema=jax.tree.map(jnp.copy, params) if config.averages_params else None,
        watch=init_watch(),
        frozen=frozen,
        noise=init_noise() if config.train.noise_scale else None,
    )


def evaluated_params(state: TrainState) -> dict:
    """All parameters, as evaluation and sampling use them."""
    return join(state.params if state.ema is None else state.ema, state.frozen)


def make_gradient(config: Config) -> Callable[[TrainState, Any], tuple[Loss, dict]]:
    """Returns `gradient(state, batch) -> (loss, grads)`: sums over micro-batches, gradients divided by the number of
    targets. Leaves of `batch` are `[M, B, ...]`, those of the task.
    """
    task_loss = make_loss(config, compute_options(config))

    def scaled_loss(learning, frozen, micro_batch, key, scale):
        if config.finetune.mixout:
            learning = mixed_with_start(config, learning, frozen, key)
        loss = task_loss(forward_params(learning, frozen), micro_batch, key if config.model.has_dropout else None)
        return loss.objective * scale, loss

    def gradient(state: TrainState, batch: Any) -> tuple[Loss, dict]:
        is_random = config.model.has_dropout or config.finetune.mixout
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if is_random else None
        scale = jnp.float32(1.0) if state.loss_scale is None else state.loss_scale.scale

        def of_micro_batch(micro_batch, number):
            micro_key = None if key is None else jax.random.fold_in(key, number)
            grad = jax.value_and_grad(scaled_loss, has_aux=True)
            (_, loss), grads = grad(state.params, state.frozen, micro_batch, micro_key, scale)
            if config.train.noise_scale:
                norm = optax.tree.norm(grads) / (scale * jnp.maximum(loss.count, 1.0))
                loss = dataclasses.replace(loss, extras=loss.extras | {SMALL_SQUARE: jnp.square(norm)})
            return loss, grads

        if axis_size(STAGES) > 1:
            states_loss = make_states_loss(config, config.task.kind)
            pieces = Pieces(config.model, compute_options(config), states_loss, forward_params)
            loss, grads = pipelined_gradient(pieces, state.params, state.frozen, batch, key, scale)
        else:
            loss, grads = _summed(of_micro_batch, batch)
        return loss, jax.tree.map(lambda g: g / (scale * jnp.maximum(loss.count, 1.0)).astype(g.dtype), grads)

    return gradient


def make_train_step(
    config: Config, schedule: Schedule | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Leaves of `batch` are `[M, B, ...]`, those of the task. Gradients and losses are summed over micro-batches and
    divided once by the number of targets, so the result does not depend on how the batch is cut. A step that `watch`
    does not accept leaves parameters, moments, average and schedule as they were, and is counted. `schedule` replaces
    that of the config.
    """
    gradient = make_gradient(config)
    schedule = schedule or make_schedule(config.optim, config.train.num_steps)
    optimizer = make_optimizer(config.optim, schedule)
    sigma, limit = config.train.spike_sigma, config.train.max_skipped_in_a_row

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        sums, grads = gradient(state, batch)
        loss, grad_norm = sums.nll / jnp.maximum(sums.count, 1.0), optax.tree.norm(grads)
        verdict = judge(state.watch, sigma, limit, loss, grad_norm)
        accepted = verdict == ACCEPTED
        learning_rate = schedule(state.step - state.skipped)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        for factors in (rates(config, state.params), rate_factors(config, state.params)):
            if factors is not None:
                updates = jax.tree.map(jnp.multiply, updates, factors)
        rate = 1.0 if optimizer.includes_rate else learning_rate
        params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), state.params, updates)
        params, opt_state = _where(accepted, (params, opt_state), (state.params, state.opt_state))
        ema = state.ema
        if optimizer.average is not None:
            ema = optimizer.average(opt_state, params)
        else:
            # Moments wait for the parameters that are made of them; unordered, XLA would copy all moments before.
            opt_state = optax.tree.map_params(optimizer.init, _after_params, opt_state, params, is_leaf=_is_masked)
            if ema is not None:
                decay = config.train.ema
                ema = jax.tree.map(lambda a, p: jnp.where(accepted, decay * a + (1.0 - decay) * p, a), ema, params)
        noise, extras = state.noise, dict(sums.extras)
        if noise is not None:
            M, B = jax.tree.leaves(batch)[0].shape[:2]
            small = extras.pop(SMALL_SQUARE) / M
            if M > 1:  # else the batch of this step of a ramp is a single micro-batch
                noise = update_noise(noise, accepted, small, jnp.square(grad_norm), (B, M * B))
        metrics: Metrics = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "targets": sums.count}
        metrics |= {name: total / jnp.maximum(sums.count, 1.0) for name, total in extras.items()}
        if noise is not None:
            metrics["noise_scale"] = noise.scale
        loss_scale, counts = state.loss_scale, verdict != HALTED
        if loss_scale is not None:
            metrics["loss_scale"] = loss_scale.scale
            counts &= (verdict != NOT_FINITE) | (loss_scale.scale <= 1.0)
            loss_scale = next_loss_scale(loss_scale, verdict != NOT_FINITE)
        skipped = state.skipped + jnp.where(accepted, 0, 1)
        watch = update_watch(state.watch, verdict, counts, loss, grad_norm, sums.count)
        metrics |= {"skipped": skipped, "verdict": verdict, "in_a_row": watch.in_a_row}
        if config.log.by_layer:
            changes = jax.tree.map(lambda u: jnp.where(accepted, rate * u, 0.0), updates)
            metrics["by_layer"] = _where_logged(config, state.step + 1, grads, changes, state.params)
        new_state = TrainState(state.step + 1, skipped, params, opt_state, loss_scale, ema, watch, state.frozen, noise)
        return new_state, metrics

    return train_step


def jit_train_step(config: Config, mesh: jax.sharding.Mesh, state_shardings: TrainState) -> jax.stages.Wrapped:
    """Returns the step as it runs on a mesh; the state is donated."""
    # Without out_shardings the compiler may return the state laid out differently from how it came in.
    return jax.jit(traced_in(mesh, make_train_step(config)), donate_argnums=0, out_shardings=(state_shardings, None))


def make_gradient_norms(
    config: Config, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Any], dict[str, list[float] | float]]:
    """Returns the norm of each parameter's gradient by the parameter's path: a list over layers for those of blocks.
    Of several processes the first one gets them.
    """
    gradient = jax.jit(traced_in(mesh, make_gradient(config)))

    def gradient_norms(state: TrainState, batch: Any) -> dict[str, list[float] | float]:
        _, grads = gradient(state, batch)
        norms = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(get(mesh, grads)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            rows = leaf.astype("float64").reshape(leaf.shape[0] if name.startswith("blocks/") else 1, -1)
            values = [float(value) for value in (rows**2).sum(axis=1) ** 0.5]
            norms[name] = values if name.startswith("blocks/") else values[0]
        return norms

    return gradient_norms


def compute_options(config: Config) -> Compute:
    """The options of the forward pass in the config."""
    return Compute(compute_dtype(config.train.compute_dtype), config.train.remat, config.train.unroll)


def _summed(gradient, batch):
    """Adds losses and gradients over the leading axis of the batch; a single micro-batch needs no zeros to add to."""
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    first = gradient(jax.tree.map(lambda x: x[0], batch), 0)
    if micro_batches == 1:
        return first

    def add(total, numbered):
        number, micro_batch = numbered
        return jax.tree.map(jnp.add, total, gradient(micro_batch, number)), None

    rest = (jnp.arange(1, micro_batches), jax.tree.map(lambda x: x[1:], batch))
    return jax.lax.scan(add, first, rest)[0]


def is_logged(config: Config, step: Any) -> Any:
    """Whether a step's metrics are logged in any case; a step at which a run is stopped is logged too."""
    return (step % config.train.log_every == 0) | (step == 1) | (step == config.train.num_steps)


def _where_logged(config: Config, step: jax.Array, grads: dict, changes: dict, params: dict) -> dict[str, jax.Array]:
    """The numbers by layer, computed only at the steps that are logged; NaN at others."""
    n_layer = config.model.n_layer
    empty = jnp.full(len(group_names(params, n_layer)), jnp.nan)
    return jax.lax.cond(
        is_logged(config, step),
        lambda: by_layer(grads, changes, params, n_layer),
        lambda: {"grad_norm": empty, "update_ratio": empty},
    )


def _where(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _is_masked(leaf: Any) -> bool:
    """Whether an optimizer that trains only some parameters leaves this one out."""
    return isinstance(leaf, optax.MaskedNode)


def _after_params(moment: Any, param: jax.Array) -> Any:
    """A moment of the shape of its parameter, scheduled after it; others, as factored moments, stay as they are."""
    return schedule_each_after(moment, param) if getattr(moment, "shape", None) == param.shape else moment
