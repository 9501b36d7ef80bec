"""A linear model over the n-grams of a text; a head adds its logits to its own (arXiv:1606.07792).

The head has two more arrays than `w` and `bias`: `words [M, N]`, which is trained, and the constant `idf [M]`, the
inverse document frequencies in the training texts. `text.ngrams` says which row of both an n-gram has.

Shape suffixes: B texts, F n-grams of a text, M buckets, N outputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.text.ngrams import BUCKETS, HALF

SCALE = 32.0
"""Factor of the logits. The features of a text have norm 1, so without it the weights would have to grow far."""


def init_bag(outputs: int) -> dict:
    """The leaves of a head that reads n-grams; `idf` is set before the first step."""
    return {"words": jnp.zeros((BUCKETS, outputs)), "idf": jnp.ones(BUCKETS)}


def bag_logits(head: dict, buckets_BF: jax.Array, counts_BF: jax.Array) -> jax.Array:
    """Returns float32 logits `[B, N]` of n-grams, weighted by TF-IDF.

    The weights are those of scikit-learn's TfidfVectorizer with sublinear_tf: `(1 + ln count) idf`, scaled to length 1:
    those of words together, and those of characters.
    """
    idf_M = jax.lax.stop_gradient(head["idf"].astype(jnp.float32))
    weight_BF = jnp.where(counts_BF > 0, (1.0 + jnp.log(jnp.maximum(counts_BF, 1.0))) * idf_M[buckets_BF], 0.0)
    in_words_BF = buckets_BF < HALF
    square_BF = jnp.square(weight_BF)
    words_B1, all_B1 = (jnp.sum(x, axis=1, keepdims=True) for x in (jnp.where(in_words_BF, square_BF, 0.0), square_BF))
    length_BF = jnp.sqrt(jnp.maximum(jnp.where(in_words_BF, words_B1, all_B1 - words_B1), 1e-12))
    return SCALE * jnp.einsum("bf,bfn->bn", weight_BF / length_BF, head["words"].astype(jnp.float32)[buckets_BF])


def inverse_document_frequencies(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns float32 `idf [M]` of the distinct n-grams of texts: `ln((1 + texts) / (1 + texts that have it)) + 1`."""
    found_M = np.bincount(np.concatenate(texts), minlength=BUCKETS)
    return (np.log((1 + len(texts)) / (1 + found_M)) + 1).astype(np.float32)
