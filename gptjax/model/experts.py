"""A mixture of experts (MoE), which replaces a block's MLP.

Shape suffixes: B batch, T position, N tokens (B times T), D n_embd, F width of an expert, E experts, K experts of a
token, M = N K assignments, C capacity of an expert.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.model.parameters import normal, output_init, weight_init
from gptjax.ops.activations import ACTIVATIONS

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
            y_ND = self._dropless(x_ND, weights_NK, experts_NK)
        return y_ND.reshape(x_BTD.shape), extras

    def _dropless(self, x_ND, weights_NK, experts_NK):
        """Sorts assignments by expert, so that each expert multiplies one contiguous block (a grouped matmul)."""
        K = experts_NK.shape[1]
        experts_M = experts_NK.reshape(-1)
        order_M = jnp.argsort(experts_M, stable=True)
        sizes_E = jnp.bincount(experts_M, length=self.config.n_expert).astype(jnp.int32)
        x_MD = x_ND[order_M // K]

        def multiply(x, w, dtype):
            return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes_E, preferred_element_type=jnp.float32).astype(dtype)

        gate = None if self.w_gate is None else multiply(x_MD, self.w_gate[...], x_MD.dtype)
        h_MF = self._inner(multiply(x_MD, self.w_in[...], x_MD.dtype), gate)
        y_MD = multiply(h_MF, self.w_out[...], jnp.float32) * weights_NK.reshape(-1)[order_M][:, None]
        return jnp.zeros(x_ND.shape, jnp.float32).at[order_M // K].add(y_MD)

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
        x_ECD = jnp.einsum("nec,nd->ecd", taken_NEC, x_ND)

        def multiply(spec, x, w, dtype):
            return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(dtype)

        gate = None if self.w_gate is None else multiply("ecd,edf->ecf", x_ECD, self.w_gate[...], x_ND.dtype)
        h_ECF = self._inner(multiply("ecd,edf->ecf", x_ECD, self.w_in[...], x_ND.dtype), gate)
        y_ECD = multiply("ecf,efd->ecd", h_ECF, self.w_out[...], jnp.float32)
        weight_NEC = jnp.einsum("nke,nkc,nk->nec", chosen_NKE, slot_NKC, weights_NK)
        y_ND = jnp.einsum("nec,ecd->nd", weight_NEC, y_ECD)
        return y_ND, 1.0 - jnp.mean(fits_NK.astype(jnp.float32))

    def _inner(self, up, gate):
        activation = ACTIVATIONS[self.config.activation]
        return activation(up) if gate is None else activation(gate) * up
