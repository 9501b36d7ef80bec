"""A linear model over the token n-grams of a text, whose logits are added to those of a head (arXiv:1606.07792).

The head has two more arrays than `w` and `bias`: `words [M, N]`, which is trained, and the constant `idf [M]`, the
inverse document frequencies in the training texts. The hash of an n-gram's tokens is its row in both.

Shape suffixes: B texts, T position, F n-grams of a text, M buckets, N outputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

BUCKETS = 2**18
SCALE = 32.0
"""Factor of the logits. The features of a text have norm 1, so without it the weights would have to grow far."""


def init_bag(outputs: int) -> dict:
    """The leaves of a head that reads n-grams; `idf` is set by `document_frequencies` before the first step."""
    return {"words": jnp.zeros((BUCKETS, outputs)), "idf": jnp.ones(BUCKETS)}


def bag_logits(head: dict, inputs_BT: jax.Array, lengths_B: jax.Array, longest: int) -> jax.Array:
    """Returns float32 logits `[B, N]` of the n-grams of up to `longest` tokens, weighted by TF-IDF.

    The weights are those of scikit-learn's TfidfVectorizer with sublinear_tf: `(1 + ln count) idf`, scaled to length 1.
    """
    buckets_BF, real_BF = _ngrams(inputs_BT, lengths_B, longest, jnp)
    same_BFF = (buckets_BF[:, :, None] == buckets_BF[:, None, :]) & real_BF[:, None, :]
    count_BF = jnp.maximum(jnp.sum(same_BFF, axis=-1, dtype=jnp.float32), 1.0)
    idf_M = jax.lax.stop_gradient(head["idf"].astype(jnp.float32))
    weight_BF = jnp.where(real_BF, (1.0 + jnp.log(count_BF)) * idf_M[buckets_BF], 0.0)
    length_B1 = jnp.sqrt(jnp.sum(jnp.square(weight_BF) / count_BF, axis=1, keepdims=True))
    share_BF = weight_BF / count_BF / jnp.maximum(length_B1, 1e-6)  # repeats of an n-gram sum to its weight
    return SCALE * jnp.einsum("bf,bfn->bn", share_BF, head["words"].astype(jnp.float32)[buckets_BF])


def document_frequencies(texts: Sequence[np.ndarray], longest: int) -> np.ndarray:
    """Returns float32 `idf [M]` of token ids of texts: `ln((1 + texts) / (1 + texts that have it)) + 1`."""
    found_M = np.zeros(BUCKETS)
    for ids in texts:
        buckets_1F, real_1F = _ngrams(ids[None], np.array([len(ids)]), longest, np)
        found_M[np.unique(buckets_1F[real_1F])] += 1
    return (np.log((1 + len(texts)) / (1 + found_M)) + 1).astype(np.float32)


def _ngrams(inputs_BT, lengths_B, longest: int, numpy):
    """The bucket of each n-gram, `[B, F]`, and whether all of it is text; `numpy` is that module or `jax.numpy`."""
    uint32, T = numpy.uint32, inputs_BT.shape[1]
    ids_BT = inputs_BT.astype(uint32)
    hash_BT, buckets, real = numpy.zeros_like(ids_BT), [], []
    for n in range(1, min(longest, T) + 1):
        # Each token is mixed into the hash of the n-gram before it; the constants are those of MurmurHash3.
        hash_BT = (hash_BT[:, : T - n + 1] + ids_BT[:, n - 1 :] + uint32(n)) * uint32(0x85EBCA6B)
        hash_BT = (hash_BT ^ (hash_BT >> uint32(13))) * uint32(0xC2B2AE35)
        hash_BT = hash_BT ^ (hash_BT >> uint32(16))
        buckets.append((hash_BT % uint32(BUCKETS)).astype("int32"))
        real.append(numpy.arange(T - n + 1)[None] + n <= lengths_B[:, None])
    return numpy.concatenate(buckets, axis=1), numpy.concatenate(real, axis=1)
