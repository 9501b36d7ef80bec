"""Next-token loss from hidden states, without the logits ever existing all at once.

Shape suffixes: B batch, T position, D n_embd, V vocabulary (padded), N = B times the positions of a chunk (two axes
where positions are cut over devices), K devices that share positions, Z chunks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.axes import HEADS, POSITIONS, ROWS, axis_size, flat, pin, positions_cut
from gptjax.ops.matmul import dot, weight_gradient

CHUNK_LOGITS = 2**25
"""Logits in memory at a time: 128 MB in float32."""
DEVICE_CHUNK_LOGITS = 2**28
"""The same on a GPU or TPU: each chunk reads and writes the table's gradient, which with 2**25 is 11 % of a step."""
KERNEL_VOCABULARY = 1024
"""Columns from which on a kernel is faster."""
KERNEL_ROWS = 4096
"""Rows that a kernel takes at a time; it holds 1,024 of their logits, in the compute dtype."""
NO_LOGIT = -1e30  # not -inf: the difference of two would be NaN


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What is minimised.

    `vocab_size`: columns of the logits that are real, the others get no probability. `label_smoothing`: share of
    the target spread evenly over them. `z_loss`: weight of the squared log-normalizer, which keeps logits from
    drifting (PaLM, arXiv:2204.02311, section 5). `softcap`: logits become `softcap * tanh(logits / softcap)`; 0: not.
    """

    vocab_size: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums over targets, to be divided once, after all other sums."""

    objective: jax.Array
    """Float32: what is minimised, nats."""
    nll: jax.Array
    """Float32: negative log-likelihood alone, nats."""
    count: jax.Array
    """Float32: targets that count."""
    extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Float32, by name: other parts of the objective, and what the metrics show; each times `count`."""


def with_extras(loss: Loss, values: dict[str, jax.Array], weights: dict[str, float]) -> Loss:
    """Adds named scalars to the objective, each times its weight (none: 0), and to what the metrics show."""
    added = sum((weights.get(name, 0.0) * value for name, value in values.items()), jnp.float32(0.0))
    extras = loss.extras | {name: value * loss.count for name, value in values.items()}
    return dataclasses.replace(loss, objective=loss.objective + added * loss.count, extras=extras)


def cross_entropy_reference(options: LossOptions, x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array) -> Loss:
    """What `cross_entropy` computes, with all logits in memory and differentiated by JAX."""
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

    Logits exist for one chunk of positions at a time. Under differentiation their gradient is made in the same
    visit, so nothing of size T times V is kept or computed twice.

    Args:
        options: Vocabulary and regularisers.
        x_BTD: Final hidden states in the compute dtype.
        w_VD: Unembedding; cast to the dtype of `x_BTD`.
        targets_BT: Token ids in `[0, vocab_size)`, or -1 where no loss is taken.
    """
    by_kernel = _kernel_fits(options, x_BTD, w_VD)
    w_VD = w_VD if by_kernel else w_VD.astype(x_BTD.dtype)

    def visit(x_BCD, targets_BC):
        x_ND, targets_N = flat(x_BCD), _rows(targets_BC)
        if by_kernel:
            return _sums(options, targets_N, *kernels.cross_entropy(x_ND, w_VD, targets_N, *_numbers(options))), None
        return _chunk_loss(options, x_ND, w_VD, targets_N)[0], None

    return _over_chunks(visit, x_BTD, targets_BT, _chunks(x_BTD, w_VD, by_kernel))[0]


def _forward(options, x_BTD, w_VD, targets_BT):
    by_kernel = _kernel_fits(options, x_BTD, w_VD)
    w_cast_VD = w_VD if by_kernel else w_VD.astype(x_BTD.dtype)

    def visit(x_BCD, targets_BC):
        x_ND = flat(x_BCD)
        if by_kernel:
            targets_N = _rows(targets_BC)
            parts, dx_ND, dw_VD = kernels.cross_entropy_gradient(x_ND, w_cast_VD, targets_N, *_numbers(options))
            return (_sums(options, targets_N, *parts), dw_VD), dx_ND.astype(x_BCD.dtype).reshape(x_BCD.shape)
        loss, dlogits_NV = _chunk_loss(options, x_ND, w_cast_VD, _rows(targets_BC))
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
    """Whether a kernel does it; small vocabularies are faster without."""
    if options.softcap or w_VD.shape[0] < KERNEL_VOCABULARY or w_VD.dtype not in (jnp.float32, x_BTD.dtype):
        return False
    B, T, D = x_BTD.shape
    return kernels.usable(x_BTD.dtype, B * (T // _chunks(x_BTD, w_VD, by_kernel=True)), D)


def _numbers(options):
    return options.vocab_size, options.label_smoothing, options.z_loss


def _sums(options, targets_N, log_z_N, target_N, total_N):
    """The `Loss` of some rows from their log-normalizers, their targets' logits and the totals of their logits."""
    smooth = options.label_smoothing
    nll_N = log_z_N - target_N
    objective_N = nll_N + options.z_loss * jnp.square(log_z_N) if options.z_loss else nll_N
    if smooth:
        objective_N += smooth * (target_N - total_N / options.vocab_size)
    mask_N = targets_N >= 0
    return Loss(jnp.sum(objective_N, where=mask_N), jnp.sum(nll_N, where=mask_N), jnp.sum(mask_N.astype(jnp.float32)))


def _chunk_loss(options, x_ND, w_VD, targets_N):
    """Returns the `Loss` of some rows and the gradient of its objective in the logits, `[N, V]` float32."""
    V, smooth = w_VD.shape[0], options.label_smoothing
    logits_NV = dot("...d,vd->...v", x_ND, w_VD, jnp.float32)
    share_NV = jnp.tanh(logits_NV / options.softcap) if options.softcap else None
    if share_NV is not None:
        logits_NV = options.softcap * share_NV
    column_1V = jnp.arange(V).reshape((1,) * targets_N.ndim + (V,))
    if options.vocab_size < V:
        logits_NV = jnp.where(column_1V < options.vocab_size, logits_NV, -jnp.inf)
    largest_N1, total_N1 = _largest_and_total(logits_NV)
    exp_NV = jnp.exp(logits_NV - largest_N1)
    log_z_N = (jnp.log(total_N1) + largest_N1)[..., 0]
    hit_NV = column_1V == targets_N[..., None]
    if axis_size(HEADS) > 1:  # each device looks among its own columns; a lookup would gather all of them
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
    loss = _sums(options, targets_N, log_z_N, target_N, logits_total_N)
    return loss, dlogits_NV if share_NV is None else dlogits_NV * (1.0 - share_NV * share_NV)


def _largest_and_total(logits_NV):
    """The largest logit of each row, and the sum of exponentials over that of the largest; `[N, 1]` each.

    On a GPU in one pass over memory (arXiv:1805.02867, algorithm 3), in place of two.
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
    """Adds up what `visit` gives first for chunks of positions, and puts together what it gives second.

    A chunk has positions of every sequence and of every device that holds some, so that a sharded batch stays where it
    is.
    """
    B, T, D = x_BTD.shape
    K = _sharing(T)
    if Z == 1:
        return visit(x_BTD, targets_BT)
    x_ZBKCD = x_BTD.reshape(B, K, Z, T // (K * Z), D).transpose(2, 0, 1, 3, 4)
    targets_ZBKC = targets_BT.reshape(B, K, Z, T // (K * Z)).transpose(2, 0, 1, 3)
    x_ZBCD = pin(x_ZBKCD, None, ROWS, POSITIONS).reshape(Z, B, T // Z, D)
    targets_ZBC = pin(targets_ZBKC, None, ROWS, POSITIONS).reshape(Z, B, T // Z)

    def visit_next(total, chunk):
        sums, out_BCD = visit(*chunk)
        return jax.tree.map(jnp.add, total, sums), out_BCD

    # The first is the sum that the others are added to: zeros instead would be another pass over a table's gradient.
    total, out_BCD = visit(x_ZBCD[0], targets_ZBC[0])
    total, others_YBCD = jax.lax.scan(visit_next, total, (x_ZBCD[1:], targets_ZBC[1:]))
    if out_BCD is None:
        return total, None
    out_ZBCD = jnp.concatenate([out_BCD[None], others_YBCD])
    return total, out_ZBCD.reshape(Z, B, K, T // (K * Z), D).transpose(1, 2, 0, 3, 4).reshape(B, T, D)


def _sharing(T):
    """Devices that share positions."""
    return axis_size(POSITIONS) if positions_cut() and T % axis_size(POSITIONS) == 0 else 1


def _chunks(x_BTD, w_VD, by_kernel):
    """In how many chunks of positions the vocabulary is visited."""
    B, T, _ = x_BTD.shape
    if by_kernel:
        return _chunk_count(T, -(-B * T // KERNEL_ROWS))
    # Each chunk ends in a sum over devices of what it gives to the table's gradient, so no more chunks than it takes.
    shared = math.prod(axis_size(axis) for axis in (*ROWS, POSITIONS, HEADS))
    at_a_time = CHUNK_LOGITS if target_platform() == "cpu" else DEVICE_CHUNK_LOGITS
    return _chunk_count(T // _sharing(T), -(-B * T * w_VD.shape[0] // (at_a_time * shared)))


def _rows(targets_BC):
    return targets_BC if positions_cut() else targets_BC.reshape(-1)


def _chunk_count(length: int, at_least: int) -> int:
    """The smallest divisor of `length` that is at least `at_least`."""
    return next(count for count in range(min(at_least, length), length + 1) if length % count == 0)
