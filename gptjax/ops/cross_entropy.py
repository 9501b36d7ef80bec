"""Next-token loss from hidden states; only one chunk of the logits is in memory at a time.

Shape suffixes: B batch, T position, D n_embd, V vocabulary (padded), N = B times the positions of a chunk (two axes
where positions are sharded over devices), K devices that share a sequence's positions, Z chunks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.axes import (
    BATCH,
    HEADS,
    POSITIONS,
    axis_size,
    constrain_sharding,
    merge_leading_axes,
    positions_sharded,
)
from gptjax.ops.matmul import dot, weight_gradient

CHUNK_LOGITS = 2**25
"""Logits in memory at a time: 128 MB in float32."""
DEVICE_CHUNK_LOGITS = 2**28
"""The same on a GPU or TPU. Larger, because each chunk reads and writes the gradient of the whole embedding table."""
KERNEL_VOCABULARY = 1024
"""Smallest vocabulary for which the kernel is used; below it XLA is faster."""
KERNEL_ROWS = 4096
"""Rows in one call of the kernel, which stores 1,024 logits of each row in the compute dtype."""
NO_LOGIT = -1e30  # not -inf: the difference of two would be NaN


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of the objective.

    `vocab_size`: number of real columns of the logits; padding columns get no probability. `label_smoothing`: share of
    the target spread evenly over the vocabulary. `z_loss`: weight of the squared log-normalizer, which keeps logits
    from drifting (PaLM, arXiv:2204.02311, section 5). `softcap`: logits become `softcap * tanh(logits / softcap)`; 0:
    unchanged.
    """

    vocab_size: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over targets. Divide by `count` once, after all micro-batches and devices are summed."""

    objective: jax.Array
    """Float32: the minimised quantity, nats."""
    nll: jax.Array
    """Float32: negative log-likelihood alone, nats."""
    count: jax.Array
    """Float32: number of targets that are not masked."""
    extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Float32, by name: other parts of the objective and other metrics, each multiplied by `count`."""


def with_extras(loss: Loss, values: dict[str, jax.Array], weights: dict[str, float]) -> Loss:
    """Adds named scalars to the metrics and, each times its weight (default 0), to the objective."""
    added = sum((weights.get(name, 0.0) * value for name, value in values.items()), jnp.float32(0.0))
    extras = loss.extras | {name: value * loss.count for name, value in values.items()}
    return dataclasses.replace(loss, objective=loss.objective + added * loss.count, extras=extras)


def cross_entropy_reference(options: LossOptions, x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> Loss:
    """Computes `cross_entropy` with all logits in memory; differentiated by JAX."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    if options.softcap:
        logits_BTV = options.softcap * jnp.tanh(logits_BTV / options.softcap)
    logits_BTV = logits_BTV[..., : options.vocab_size]
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - target_BT
    even_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
    smooth = options.label_smoothing
    objective_BT = (1.0 - smooth) * nll_BT + smooth * even_BT + options.z_loss * jnp.square(log_z_BT)
    mask_BT = targets_BT >= 0
    return Loss(
        jnp.sum(objective_BT, where=mask_BT),
        jnp.sum(nll_BT, where=mask_BT),
        jnp.sum(mask_BT.astype(jnp.float32)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(options: LossOptions, x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> Loss:
    """Sums the next-token loss over targets that are not -1; only `objective` is differentiable.

    Logits exist for one chunk of positions at a time. Under differentiation the forward pass also computes the gradient
    of each chunk, so no array of size T times V is stored or computed twice.

    Args:
        options: Vocabulary and regularisers.
        x_BTD: Final hidden states in the compute dtype.
        w_VD: Weights of the output projection; cast to the dtype of `x_BTD`.
        targets_BT: Token ids in `[0, vocab_size)`, or -1 where no loss is taken.
    """
    by_kernel = _kernel_fits(options, x_BTD, w_VD)
    w_VD = w_VD if by_kernel else w_VD.astype(x_BTD.dtype)

    def visit(x_BCD, targets_BC):
        x_ND, targets_N = merge_leading_axes(x_BCD), _merge_targets(targets_BC)
        if by_kernel:
            return _sum_losses(
                options, targets_N, *kernels.cross_entropy(x_ND, w_VD, targets_N, *_kernel_options(options))
            ), None
        return _chunk_loss(options, x_ND, w_VD, targets_N)[0], None

    return _over_chunks(visit, x_BTD, targets_BT, _chunks(x_BTD, w_VD, by_kernel))[0]


def _forward(options, x_BTD, w_VD, targets_BT):
    by_kernel = _kernel_fits(options, x_BTD, w_VD)
    w_cast_VD = w_VD if by_kernel else w_VD.astype(x_BTD.dtype)

    def visit(x_BCD, targets_BC):
        x_ND = merge_leading_axes(x_BCD)
        if by_kernel:
            targets_N = _merge_targets(targets_BC)
            parts, dx_ND, dw_VD = kernels.cross_entropy_gradient(x_ND, w_cast_VD, targets_N, *_kernel_options(options))
            return (_sum_losses(options, targets_N, *parts), dw_VD), dx_ND.astype(x_BCD.dtype).reshape(x_BCD.shape)
        loss, dlogits_NV = _chunk_loss(options, x_ND, w_cast_VD, _merge_targets(targets_BC))
        dlogits_NV = dlogits_NV.astype(x_ND.dtype)
        dx_ND = dot("...v,vd->...d", dlogits_NV, w_cast_VD, x_ND.dtype)
        dw_VD = weight_gradient(dlogits_NV, x_ND, jnp.float32)
        return (loss, dw_VD), dx_ND.reshape(x_BCD.shape)

    (loss, dw_VD), dx_BTD = _over_chunks(visit, x_BTD, targets_BT, _chunks(x_BTD, w_VD, by_kernel))
    return loss, (dx_BTD, dw_VD.astype(w_VD.dtype))


def _backward(options, saved, dloss):
    dx_BTD, dw_VD = saved
    return dx_BTD * dloss.objective.astype(dx_BTD.dtype), dw_VD * dloss.objective.astype(dw_VD.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _kernel_fits(options, x_BTD, w_VD):
    """Whether the C++ kernel computes this loss. It supports no soft cap and is slower for small vocabularies."""
    if options.softcap or w_VD.shape[0] < KERNEL_VOCABULARY or w_VD.dtype not in (jnp.float32, x_BTD.dtype):
        return False
    B, T, D = x_BTD.shape
    return kernels.usable(x_BTD.dtype, B * (T // _chunks(x_BTD, w_VD, by_kernel=True)), D)


def _kernel_options(options):
    return options.vocab_size, options.label_smoothing, options.z_loss


def _sum_losses(options, targets_N, log_z_N, target_N, total_N):
    """Returns the `Loss` of some rows from their log-normalizers, target logits and sums of logits."""
    smooth = options.label_smoothing
    nll_N = log_z_N - target_N
    objective_N = nll_N + options.z_loss * jnp.square(log_z_N) if options.z_loss else nll_N
    if smooth:
        objective_N += smooth * (target_N - total_N / options.vocab_size)
    mask_N = targets_N >= 0
    return Loss(jnp.sum(objective_N, where=mask_N), jnp.sum(nll_N, where=mask_N), jnp.sum(mask_N.astype(jnp.float32)))


def _chunk_loss(options, x_ND, w_VD, targets_N):
    """Returns the `Loss` of some rows, and the gradient of its objective by the logits, `[N, V]` float32."""
    V, smooth = w_VD.shape[0], options.label_smoothing
    logits_NV = dot("...d,vd->...v", x_ND, w_VD, jnp.float32)
    share_NV = jnp.tanh(logits_NV / options.softcap) if options.softcap else None
    if share_NV is not None:
        logits_NV = options.softcap * share_NV
    column_1V = jnp.arange(V).reshape((1,) * targets_N.ndim + (V,))
    if options.vocab_size < V:
        logits_NV = jnp.where(column_1V < options.vocab_size, logits_NV, -jnp.inf)
    largest_N1, total_N1 = _max_and_exp_sum(logits_NV)
    exp_NV = jnp.exp(logits_NV - largest_N1)
    log_z_N = (jnp.log(total_N1) + largest_N1)[..., 0]
    hit_NV = column_1V == targets_N[..., None]
    if axis_size(HEADS) > 1:  # the sum stays within each device's columns; a lookup would gather all columns
        target_N = jnp.sum(logits_NV, axis=-1, where=hit_NV)
    else:
        target_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[..., None], axis=-1)[..., 0]
    weight_N1 = (targets_N >= 0)[..., None].astype(jnp.float32)
    z_weight_N1 = weight_N1 * (1.0 + 2.0 * options.z_loss * log_z_N[..., None])
    dlogits_NV = exp_NV * (z_weight_N1 / total_N1)
    dlogits_NV -= jnp.where(hit_NV, (1.0 - smooth) * weight_N1, 0.0)
    logits_total_N = None
    if smooth:
        real_NV = jnp.broadcast_to(column_1V < options.vocab_size, logits_NV.shape)
        logits_total_N = jnp.sum(logits_NV, axis=-1, where=real_NV)
        dlogits_NV -= jnp.where(real_NV, smooth / options.vocab_size * weight_N1, 0.0)
    loss = _sum_losses(options, targets_N, log_z_N, target_N, logits_total_N)
    return loss, dlogits_NV if share_NV is None else dlogits_NV * (1.0 - share_NV * share_NV)


def _max_and_exp_sum(logits_NV):
    """Returns the largest logit of each row and the sum of `exp(logit - largest)`, `[N, 1]` each.

    A GPU needs one pass over memory instead of two (online softmax, arXiv:1805.02867, algorithm 3).
    """
    if target_platform() != "gpu" or axis_size(HEADS) > 1:
        largest_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
        return largest_N1, jnp.sum(jnp.exp(logits_NV - largest_N1), axis=-1, keepdims=True)

    def merged(a, b):
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    nothing = (jnp.float32(NO_LOGIT), jnp.float32(0.0))
    parts = jax.lax.reduce((logits_NV, jnp.ones_like(logits_NV)), nothing, merged, (logits_NV.ndim - 1,))
    return parts[0][..., None], parts[1][..., None]


def _over_chunks(visit, x_BTD, targets_BT, Z):
    """Applies `visit` to chunks of positions; sums its first results and concatenates its second ones.

    A chunk takes positions from every sequence and from every device, so that no data moves between devices.
    """
    B, T, D = x_BTD.shape
    K = _position_shards(T)
    if Z == 1:
        return visit(x_BTD, targets_BT)
    x_ZBKCD = x_BTD.reshape(B, K, Z, T // (K * Z), D).transpose(2, 0, 1, 3, 4)
    targets_ZBKC = targets_BT.reshape(B, K, Z, T // (K * Z)).transpose(2, 0, 1, 3)
    x_ZBCD = constrain_sharding(x_ZBKCD, None, BATCH, POSITIONS).reshape(Z, B, T // Z, D)
    targets_ZBC = constrain_sharding(targets_ZBKC, None, BATCH, POSITIONS).reshape(Z, B, T // Z)

    def visit_next(total, chunk):
        sums, out_BCD = visit(*chunk)
        return jax.tree.map(jnp.add, total, sums), out_BCD

    # The sum starts from the first chunk: starting from zeros would cost another pass over the table's gradient.
    total, out_BCD = visit(x_ZBCD[0], targets_ZBC[0])
    total, rest_ZBCD = jax.lax.scan(visit_next, total, (x_ZBCD[1:], targets_ZBC[1:]))
    if out_BCD is None:
        return total, None
    out_ZBCD = jnp.concatenate([out_BCD[None], rest_ZBCD])
    return total, out_ZBCD.reshape(Z, B, K, T // (K * Z), D).transpose(1, 2, 0, 3, 4).reshape(B, T, D)


def _position_shards(T):
    """Number of devices that a sequence's positions are sharded over."""
    return axis_size(POSITIONS) if positions_sharded() and T % axis_size(POSITIONS) == 0 else 1


def _chunks(x_BTD, w_VD, by_kernel):
    """Number of chunks into which the positions are divided."""
    B, T, _ = x_BTD.shape
    if by_kernel:
        return _chunk_count(T, -(-B * T // KERNEL_ROWS))
    # As few chunks as memory allows: each ends in an all-reduce of its part of the table's gradient.
    shared = math.prod(axis_size(axis) for axis in (*BATCH, POSITIONS, HEADS))
    at_a_time = CHUNK_LOGITS if target_platform() == "cpu" else DEVICE_CHUNK_LOGITS
    return _chunk_count(T // _position_shards(T), -(-B * T * w_VD.shape[0] // (at_a_time * shared)))


def _merge_targets(targets_BC):
    return targets_BC if positions_sharded() else targets_BC.reshape(-1)


def _chunk_count(length: int, at_least: int) -> int:
    """The smallest divisor of `length` that is at least `at_least`."""
    return next(count for count in range(min(at_least, length), length + 1) if length % count == 0)
