"""A mixture of experts (MoE), which replaces a block's MLP.

Shape suffixes: B batch, T position, N tokens (B times T), D n_embd, F width of an expert, E experts, K experts of a
token, M = N K assignments, C capacity of an expert.

`mesh.expert` shards the experts. With a capacity, the compiler sends tokens to their experts by all-to-all; without
one, each device gathers the tokens of the axis and computes its own experts.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from gptjax.config.model import ModelConfig
from gptjax.model.parameters import normal, output_init, weight_init
from gptjax.ops.activations import ACTIVATIONS
from gptjax.ops.axes import (
    BATCH,
    EXPERTS,
    HEADS,
    POSITIONS,
    axis_size,
    constrain_sharding,
    partition_spec,
    per_device,
    sharded_by_compiler,
)

Extras = dict[str, jax.Array]
"""Named float32 scalars that a layer adds to the objective or to the metrics."""


class Experts(nnx.Module):
    """A router sends each token to its top-K experts and sums their outputs, weighted by the router's probabilities.

    Without `model.expert_capacity`, no token is dropped. With it, an expert takes only the first C tokens that are
    assigned to it; the others pass through the residual connection alone (arXiv:2101.03961, section 2.2).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F, E = config.n_embd, config.expert_size, config.n_expert
        self.w_router = nnx.Param(normal(D**-0.5)(rngs.params(), (D, E)))
        self.w_in = nnx.Param(weight_init(config)(rngs.params(), (E, D, F)))
        self.w_gate = nnx.Param(weight_init(config)(rngs.params(), (E, D, F))) if config.gated else None
        self.w_out = nnx.Param(output_init(config)(rngs.params(), (E, F, D)))
        self.config = config

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Extras]:
        """Returns the float32 output of the layer and the router's losses."""
        config = self.config
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = jnp.dot(x_ND.astype(jnp.float32), self.w_router[...].astype(jnp.float32), precision="highest")
        probabilities_NE = jax.nn.softmax(logits_NE)
        weights_NK, experts_NK = jax.lax.top_k(probabilities_NE, config.experts_per_token)
        weights_NK = weights_NK / jnp.sum(weights_NK, axis=-1, keepdims=True)
        chosen_NKE = jax.nn.one_hot(experts_NK, config.n_expert, dtype=jnp.float32)
        share_E = jnp.mean(jnp.sum(chosen_NKE, axis=1), axis=0) / config.experts_per_token
        extras = {
            "balance_loss": config.n_expert * jnp.sum(share_E * jnp.mean(probabilities_NE, axis=0)),
            "router_z_loss": jnp.mean(jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))),
        }
        if config.expert_capacity:
            y_ND, extras["dropped_assignments"] = self._with_capacity(x_ND, weights_NK, chosen_NKE)
        else:
            weights = self.w_in[...], None if self.w_gate is None else self.w_gate[...], self.w_out[...]
            dropless = self._dropless_sharded if sharded_by_compiler() and axis_size(EXPERTS) > 1 else self._dropless
            B, T, _ = x_BTD.shape
            y_ND = dropless(x_BTD, weights_NK.reshape(B, T, -1), experts_NK.reshape(B, T, -1), weights)
        return y_ND.reshape(x_BTD.shape), extras

    def _dropless(self, x_BTD, weights_BTK, experts_BTK, weights, first=0):
        """Sorts assignments by expert, so that each expert multiplies one contiguous block (a grouped matmul).

        `weights` may be those of some experts only, from number `first`; the output is then their part of the sum.
        """
        w_in_EDF, w_gate_EDF, w_out_EFD = weights
        K, E = experts_BTK.shape[-1], w_in_EDF.shape[0]
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_M = experts_BTK.reshape(-1) - first
        mine_M = (experts_M >= 0) & (experts_M < E)
        order_M = jnp.argsort(jnp.where(mine_M, experts_M, E), stable=True)
        sizes_E = jnp.bincount(jnp.where(mine_M, experts_M, E), length=E).astype(jnp.int32)
        x_MD = x_ND[order_M // K]

        def multiply(x, w, dtype):
            return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes_E, preferred_element_type=jnp.float32).astype(dtype)

        gate = None if w_gate_EDF is None else multiply(x_MD, w_gate_EDF, x_MD.dtype)
        h_MF = self._inner(multiply(x_MD, w_in_EDF, x_MD.dtype), gate)
        y_MD = multiply(h_MF, w_out_EFD, jnp.float32) * weights_BTK.reshape(-1)[order_M][:, None]
        y_MD = jnp.where(mine_M[order_M][:, None], y_MD, 0.0)  # no expert multiplied the rows of others
        return jnp.zeros(x_ND.shape, jnp.float32).at[order_M // K].add(y_MD)

    def _dropless_sharded(self, x_BTD, weights_BTK, experts_BTK, weights):
        """Like `_dropless` with expert parallelism: each device applies its own experts to the tokens of all devices
        along the axis.
        """

        def one_device(x_BTD, weights_BTK, experts_BTK, weights):
            gather = functools.partial(jax.lax.all_gather, axis_name=EXPERTS, tiled=True)
            x_BTD, weights_BTK, experts_BTK = map(gather, (x_BTD, weights_BTK, experts_BTK))
            first = jax.lax.axis_index(EXPERTS) * weights[0].shape[0]
            y_ND = self._dropless(x_BTD, weights_BTK, experts_BTK, weights, first)
            y_BTD = jax.lax.psum_scatter(y_ND.reshape(x_BTD.shape), EXPERTS, tiled=True)
            return jax.lax.psum(y_BTD, HEADS)

        tokens = partition_spec(x_BTD.shape, BATCH, POSITIONS)
        columns, rows = PartitionSpec(EXPERTS, None, HEADS), PartitionSpec(EXPERTS, HEADS)
        matrices = columns, None if weights[1] is None else columns, rows
        call = per_device(one_device, (tokens, tokens, tokens, matrices), tokens)
        return call(x_BTD, weights_BTK, experts_BTK, weights).reshape(-1, x_BTD.shape[-1])

    def _with_capacity(self, x_ND, weights_NK, chosen_NKE):
        """Gathers up to C tokens of each expert by matmuls with one-hot matrices (GShard, arXiv:2006.16668)."""
        N, K, E = chosen_NKE.shape
        C = math.ceil(self.config.expert_capacity * N * K / E)
        # The first choices of all tokens have priority over the second ones.
        in_order_ME = chosen_NKE.swapaxes(0, 1).reshape(K * N, E)
        place_ME = jnp.cumsum(in_order_ME, axis=0) * in_order_ME - 1.0
        place_KN = jnp.max(place_ME, axis=-1).reshape(K, N)
        fits_NK = (place_KN < C).T
        slot_NKC = jax.nn.one_hot(place_KN.T.astype(jnp.int32), C, dtype=jnp.float32) * fits_NK[..., None]
        taken_NEC = jnp.einsum("nke,nkc->nec", chosen_NKE, slot_NKC).astype(x_ND.dtype)
        x_ECD = constrain_sharding(jnp.einsum("nec,nd->ecd", taken_NEC, x_ND), EXPERTS)

        def multiply(spec, x, w, dtype):
            return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(dtype)

        gate = None if self.w_gate is None else multiply("ecd,edf->ecf", x_ECD, self.w_gate[...], x_ND.dtype)
        h_ECF = self._inner(multiply("ecd,edf->ecf", x_ECD, self.w_in[...], x_ND.dtype), gate)
        y_ECD = constrain_sharding(multiply("ecf,efd->ecd", h_ECF, self.w_out[...], jnp.float32), EXPERTS)
        weight_NEC = jnp.einsum("nke,nkc,nk->nec", chosen_NKE, slot_NKC, weights_NK)
        y_ND = jnp.einsum("nec,ecd->nd", weight_NEC, y_ECD)
        return y_ND, 1.0 - jnp.mean(fits_NK.astype(jnp.float32))

    def _inner(self, up, gate):
        activation = ACTIVATIONS[self.config.activation]
        return activation(up) if gate is None else activation(gate) * up
