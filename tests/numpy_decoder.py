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
    def __init__(self, config, params, prefix=0):
        """`prefix`: so many tokens are visible to all."""
        self.c, self.prefix = config, prefix
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
        first = x
        for layer in range(c.n_layer):
            x = self.block(x, first, positions, layer)
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
        if c.qk_norm == "head":
            q, k = self.norm(q, "blocks/attn/norm_q", layer), self.norm(k, "blocks/attn/norm_k", layer)
        if c.qk_norm == "all":
            q = self.norm(q.reshape(T, -1), "blocks/attn/norm_q", layer).reshape(q.shape)
            k = self.norm(k.reshape(T, -1), "blocks/attn/norm_k", layer).reshape(k.shape)
        kind = c.attention_pattern[layer % len(c.attention_pattern)] if c.attention_pattern else "local"
        if c.positions == "rope" and kind != "full_nope":
            own = kind == "local" and c.rope_local_base
            base, factor = (c.rope_local_base, 1.0) if own else (c.rope_base, c.rope_factor)
            q, k = self.rotate(q, positions, base, factor), self.rotate(k, positions, base, factor)
        y = np.zeros((T, H, C))
        for head in range(H):
            g, r = divmod(head, R)
            scores = q[:, g, r] @ k[:, g].T * (c.attention_scale or C**-0.5)
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            for t in range(T):
                for s in range(T):
                    window = c.attention_window if kind == "local" else 0
                    hidden = s > t and s >= self.prefix and not c.bidirectional
                    if hidden or (window and abs(t - s) >= window):
                        scores[t, s] = -np.inf
                    elif c.positions == "alibi":
                        scores[t, s] -= abs(t - s) * 2.0 ** (-8.0 * (head + 1) / H)
                    elif c.positions == "t5":
                        scores[t, s] += self.get("blocks/attn/distances", layer)[bucket(t - s, c.bidirectional), head]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            y[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, g]
        out = y.reshape(T, H * C) @ self.get("blocks/attn/w_out", layer)
        bias = self.get("blocks/attn/b_out", layer)
        return out if bias is None else out + bias

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
