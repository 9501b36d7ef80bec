"""A decoder in NumPy, float64, one sequence at a time: the reference that every variant of the model is held to.

Written from the papers that `gptjax/config/model.py` names, without anything of `gptjax`.
"""

import math

import numpy as np


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


class NumpyDecoder:
    def __init__(self, config, params, prefix=0, slides=False):
        """`prefix`: so many tokens are visible to all. `slides`: a token sees the newest `block_size` alone, its first
        tokens included, whose distances are those in a text of `block_size`."""
        self.c, self.prefix, self.slides = config, prefix, slides
        self.p = {}
        self._flatten("", params)

    def _flatten(self, name, tree):
        for key, value in tree.items():
            path = f"{name}/{key}" if name else str(key)
            if isinstance(value, dict):
                self._flatten(path, value)
            else:
                self.p[path] = np.asarray(value, np.float64)

    def get(self, path, layer=None):
        value = self.p.get(path)
        return value if value is None or layer is None else value[layer]

    def norm(self, x, path, layer=None):
        c = self.c
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        scale, bias = self.get(f"{path}/scale", layer), self.get(f"{path}/bias", layer)
        x = x if scale is None else x * scale
        return x if bias is None else x + bias

    def logits(self, tokens, positions=None):
        """`[T, V]` of one document."""
        c, T = self.c, len(tokens)
        positions = np.arange(T) if positions is None else positions
        x = self.p["embed/tokens"][tokens] * c.embedding_scale
        if c.positions == "learned":
            x = x + self.p["embed/positions"][positions]
        if c.positions == "sinusoidal":
            half = c.n_embd // 2
            angles = positions[:, None] / 10_000 ** (np.arange(half) / half)
            x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        if c.embedding_norm:
            x = self.norm(x, "embed/norm")
        first, outputs, self.first_values = x, [], None
        for layer in range(c.n_layer):
            if c.learned_skips and layer > c.n_layer - 1 - layer:
                x = x + self.get("blocks/skip", layer) * outputs[c.n_layer - 1 - layer]
            x = self.block(x, first, positions, layer)
            outputs.append(x)
        x = x if c.norm_position == "post" else self.norm(x, "norm_f")
        head = self.p.get("head/w", self.p["embed/tokens"])[: c.vocab_size]
        logits = x @ head.T
        if c.output_bias:
            logits = logits + self.p["head/bias"][: c.vocab_size]
        logits = logits * c.logit_scale
        return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits

    def block(self, x, first, positions, layer):
        c = self.c
        if c.residual_mix:
            r, s = self.get("blocks/mix", layer)
            x = r * x + s * first
        attention = lambda h: self.attention(h, positions, layer)  # noqa: E731
        mlp = lambda h: self.experts(h, layer) if c.n_expert else self.mlp(h, layer)  # noqa: E731
        if c.parallel != "none":
            h1 = self.norm(x, "blocks/norm_1", layer)
            h2 = h1 if c.parallel == "one_norm" else self.norm(x, "blocks/norm_2", layer)
            return x + c.residual_scale * (attention(h1) + mlp(h2))
        for number, sublayer in ((1, attention), (2, mlp)):
            h = self.norm(x, f"blocks/norm_{number}", layer) if c.norm_position in ("pre", "sandwich") else x
            y = sublayer(h)
            if c.norm_position in ("output", "sandwich"):
                y = self.norm(y, f"blocks/norm_out_{number}", layer)
            x = x + c.residual_scale * y
            if c.norm_position == "post":
                x = self.norm(x, f"blocks/norm_{number}", layer)
        return x

    def mlp(self, h, layer):
        def linear(name, bias, transpose=False):
            w, b = self.get(f"blocks/mlp/{name}", layer), self.get(f"blocks/mlp/{bias}", layer)
            y = (
                (lambda v: v @ (w.T if transpose else w))
                if b is None
                else (lambda v: v @ (w.T if transpose else w) + b)
            )
            return y

        up, activation = linear("w_in", "b_in")(h), ACTIVATIONS[self.c.activation]
        inner = activation(linear("w_gate", "b_gate")(h)) * up if self.c.gated else activation(up)
        return linear("w_out", "b_out", True)(inner)

    def experts(self, h, layer):
        """Token by token, expert by expert; without a limit of capacity."""
        c, activation = self.c, ACTIVATIONS[self.c.activation]
        logits = h @ self.get("blocks/experts/w_router", layer)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        y = self.mlp(h, layer) if c.n_shared_expert else np.zeros_like(h)
        for t, token in enumerate(h):
            best = np.argsort(-probabilities[t])[: c.experts_per_token]
            for e in best:
                up = token @ self.get("blocks/experts/w_in", layer)[e]
                gate = self.get("blocks/experts/w_gate", layer)
                inner = activation(up) if gate is None else activation(token @ gate[e]) * up
                y[t] += (
                    probabilities[t, e]
                    / probabilities[t, best].sum()
                    * inner
                    @ self.get("blocks/experts/w_out", layer)[e]
                )
        return y

    def attention(self, h, positions, layer):
        c, T = self.c, len(h)
        H, G, C = c.n_head, c.n_kv_head or c.n_head, c.head_dim or c.n_embd // c.n_head
        R = H // G
        qkv = np.einsum("td,dgec->tgec", h, self.get("blocks/attn/w_qkv", layer))
        bias = self.get("blocks/attn/b_qkv", layer)
        qkv = qkv if bias is None else qkv + bias
        q, k, v = qkv[:, :, :R], qkv[:, :, R], qkv[:, :, R + 1]
        if c.value_residual:
            self.first_values = v if layer == 0 else self.first_values
            own, shared = self.get("blocks/attn/value_mix", layer)
            v = own * v + shared * self.first_values
        if c.qk_norm == "head":
            q, k = self.norm(q, "blocks/attn/norm_q", layer), self.norm(k, "blocks/attn/norm_k", layer)
        if c.qk_norm == "all":
            q = self.norm(q.reshape(T, -1), "blocks/attn/norm_q", layer).reshape(q.shape)
            k = self.norm(k.reshape(T, -1), "blocks/attn/norm_k", layer).reshape(k.shape)
        kind = c.attention_pattern[layer % len(c.attention_pattern)] if c.attention_pattern else "local"
        if c.positions == "rope" and kind != "full_nope":
            own = kind == "local" and c.rope_local_base
            base, factor = (c.rope_local_base, 1.0) if own else (c.rope_base, c.rope_factor)
            capped = self.rotate(q, np.minimum(positions, c.block_size - 1), base, factor)
            q, k = self.rotate(q, positions, base, factor), self.rotate(k, positions, base, factor)
        else:
            capped = q
        y = np.zeros((T, H, C))
        for head in range(H):
            g, r = divmod(head, R)
            scores = q[:, g, r] @ k[:, g].T * (c.attention_scale or C**-0.5)
            if self.slides and c.attention_sinks:
                first = slice(c.attention_sinks)
                scores[:, first] = capped[:, g, r] @ k[first, g].T * (c.attention_scale or C**-0.5)
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            for t in range(T):
                for s in range(T):
                    if c.positions == "shaw":
                        vector = self.get("blocks/attn/distances", layer)[0][self.vector(t, s)]
                        scores[t, s] += q[t, g, r] @ vector * (c.attention_scale or C**-0.5)
                    hidden = s > t and s >= self.prefix and not c.bidirectional
                    sink = s < c.attention_sinks and (self.slides or kind == "local")
                    distance = min(t, c.block_size - 1) - s if sink and self.slides else t - s
                    if hidden or not (sink or self.in_pattern(kind, t, s)):
                        scores[t, s] = -np.inf
                    elif c.positions == "alibi":
                        scores[t, s] -= abs(distance) * 2.0 ** (-8.0 * (head + 1) / H)
                    elif c.positions == "t5":
                        scores[t, s] += self.get("blocks/attn/distances", layer)[
                            bucket(distance, c.bidirectional), head
                        ]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y[:, head] = weights @ v[:, g]
            if c.relative_values:
                vectors = self.get("blocks/attn/distances", layer)[1]
                y[:, head] += [sum(weights[t, s] * vectors[self.vector(t, s)] for s in range(T)) for t in range(T)]
        out = y.reshape(T, H * C) @ self.get("blocks/attn/w_out", layer)
        bias = self.get("blocks/attn/b_out", layer)
        return out if bias is None else out + bias

    def vector(self, t, s):
        """Index of the vector that belongs to a distance (Shaw et al.)."""
        limit = self.c.relative_distance
        return max(-limit, min(limit, t - s)) + limit

    def in_pattern(self, kind, t, s):
        """Whether the token at t attends to the one at s, later ones aside."""
        c, length = self.c, self.c.attention_stride
        if self.slides and t - s >= c.block_size - c.attention_sinks:
            return False
        if kind == "local" and c.attention_window:
            return abs(t - s) < c.attention_window
        if kind == "strided":
            return t - s < length or (t - s) % length == 0
        if kind == "fixed":
            return t // length == s // length or s % length in range(length - c.attention_summary, length)
        return True

    def rotate(self, x, positions, base, factor):
        """Channel i with channel i + half of those that rotate."""
        c, C = self.c, x.shape[-1]
        rotated = 2 * round(c.rope_fraction * C / 2)
        half = rotated // 2
        frequencies = base ** (-2 * np.arange(half) / rotated)
        if c.rope_scaling == "linear":
            frequencies = frequencies / factor
        y = x.copy()
        for t, position in enumerate(positions):
            for i, frequency in enumerate(frequencies):
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                a, b = x[t, ..., i], x[t, ..., i + half]
                y[t, ..., i], y[t, ..., i + half] = a * cos - b * sin, b * cos + a * sin
        return y


def bucket(distance, bidirectional):
    """T5's bucket of a distance: the first half exact, then logarithmic ones up to 128; both ways: half for each."""
    if bidirectional and distance < 0:
        return 16 + bucket_of(-distance, 8)
    return bucket_of(max(0, distance), 8 if bidirectional else 16)


def bucket_of(distance, exact):
    if distance < exact:
        return distance
    return min(2 * exact - 1, exact + int(math.log(distance / exact) / math.log(128 / exact) * exact))
