"""The shape of a decoder, as a frozen dataclass."""

import dataclasses
from typing import Literal

from gptjax.config.rules import fraction, no_effect, not_negative, positive
from gptjax.config.task import AdapterConfig
from gptjax.errors import UserError

MAX_PARAMETERS = 10**13
"""Larger values are typing errors, which would otherwise cause an error of the compiler."""
WIDTH_MULTIPLE = 32
"""Default widths of gated MLPs are a multiple of this, as the CPU kernels need."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder; the defaults are GPT-2's."""

    n_layer: int = 12
    """Number of transformer blocks (depth)."""
    encoder_layers: int = 0
    """Number of encoder blocks, for task.kind=seq2seq; every decoder block attends to the encoder's output. 0: a
    decoder-only model."""
    n_head: int = 12
    """Number of attention (query) heads per block."""
    n_kv_head: int = 0
    """Key and value heads, each shared by n_head / n_kv_head query heads; 0: as many as n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    head_dim: int = 0
    """Width of one attention head; 0: n_embd / n_head."""
    mlp_width: int = 0
    """Hidden width of the MLP; 0: 4 n_embd, or 8/3 n_embd if the MLP is gated."""
    block_size: int = 1024
    """Context length: longest sequence, in tokens."""
    vocab_size: int = 0
    """Vocabulary size of the model; 0: that of the tokenizer."""
    vocab_multiple: int = 1
    """Pad the embedding to a multiple of this many rows. Rows after vocab_size are never predicted."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention weights and outputs of attention and MLP."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of norm. layer: layer norm (arXiv:1607.06450); rms: RMSNorm (arXiv:1910.07467)."""
    norm_epsilon: float = 1e-5
    """Epsilon of norms, added to the variance."""
    norm_scale: bool = True
    """Norms have a learned scale (and a bias, if bias is true)."""
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    """Position of norms. pre: before each sublayer; post: after each residual addition (arXiv:1706.03762); output: on
    the output of each sublayer (OLMo 2); sandwich: before it and on its output (Gemma 2)."""
    parallel: Literal["none", "one_norm", "two_norms"] = "none"
    """Compute attention and MLP in parallel from the same residual stream, with one norm (GPT-J) or two (GPT-NeoX)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """QK norm: norm of queries and keys, per head (Qwen 3) or over all heads together (OLMo 2)."""
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "silu", "tanh", "sigmoid"] = "gelu"
    """Activation of the MLP; gelu is the tanh form of GPT-2."""
    gated: bool = False
    """Gated MLP (arXiv:2002.05202): activation silu makes SwiGLU, gelu GeGLU."""
    bias: bool = True
    """Bias vectors in linear layers and norms, as GPT-2 has."""
    qkv_bias: bool = False
    """Bias on queries, keys and values even if bias is false (Qwen 2)."""
    output_bias: bool = False
    """Bias of the output projection."""
    tied_embeddings: bool = True
    """Use the token embedding as output projection."""
    positions: Literal["learned", "none", "sinusoidal", "rope", "alibi", "t5", "shaw"] = "learned"
    """Position method: learned (GPT-2), none, sinusoidal (arXiv:1706.03762), rope (arXiv:2104.09864), alibi
    (arXiv:2108.12409), t5 (arXiv:1910.10683, a table in each layer), shaw (arXiv:1803.02155, vectors of distances that
    are added to keys)."""
    relative_distance: int = 16
    """shaw: tokens that are further away share a vector."""
    relative_values: bool = False
    """shaw: vectors of distances are added to values too."""
    rope_base: float = 10000.0
    """Base of the frequencies of rotary embeddings (theta)."""
    rope_local_base: float = 0.0
    """Rope base in local layers of attention_pattern, which then have no rope_scaling (Gemma 3); 0: rope_base."""
    rope_fraction: float = 1.0
    """Share of a head's channels that rope rotates."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Method that extends rope to longer contexts."""
    rope_factor: float = 1.0
    """Factor by which rope_scaling extends the context."""
    rope_original_length: int = 0
    """Context length in tokens before the extension by rope_scaling yarn or llama3; 0: block_size."""
    rope_low_frequency_factor: float = 1.0
    """For rope_scaling=llama3: channels with fewer rotations over the original length are scaled."""
    rope_high_frequency_factor: float = 4.0
    """For rope_scaling=llama3: channels with more rotations over the original length are unchanged."""
    bidirectional: bool = False
    """Bidirectional attention: for task.objective.kind=masked, and for tasks with labels that start from such a run.
    """
    attention_window: int = 0
    """Tokens that each token attends to, itself included (arXiv:2004.05150, section 3.1); 0: all before it."""
    attention_pattern: tuple[Literal["full", "local", "full_nope", "strided", "fixed"], ...] = ()
    """Kinds of layers, repeated over the depth: local ones have attention_window, full ones none, full_nope ones do not
    rotate either (SmolLM 3), strided and fixed ones are those of arXiv:1904.10509, section 4.3; empty: all alike."""
    attention_stride: int = 0
    """strided layers attend to so many newest tokens, and to every token whose distance is a multiple of it; fixed ones
    to the tokens of their own block of so many."""
    attention_summary: int = 0
    """fixed layers: tokens at the end of every block that all later tokens attend to."""
    attention_sinks: int = 0
    """First tokens of a text that stay visible past attention_window, and when a full context slides
    (arXiv:2309.17453)."""
    attention_scale: float = 0.0
    """Factor of the attention logits; 0: 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Attention logits become cap tanh(logits / cap) (arXiv:2408.00118, section 2); 0: unchanged."""
    logit_softcap: float = 0.0
    """Soft cap of the output logits: they become cap tanh(logits / cap); 0: unchanged."""
    embedding_scale: float = 1.0
    """Factor on token embeddings (Gemma: the square root of n_embd)."""
    residual_scale: float = 1.0
    """Factor on the outputs of attention and MLP before the residual addition (Granite)."""
    logit_scale: float = 1.0
    """Factor on the output logits, before their soft cap (Granite: 1 / logits_scaling)."""
    embedding_norm: bool = False
    """Apply a norm to the embeddings before the first block."""
    residual_mix: bool = False
    """Each block reads r x + s x0 instead of x, with learned r and s; x0 are the embeddings (modded-nanogpt)."""
    value_residual: bool = False
    """Use a v + b v1 as the values of each layer, with learned a and b; v1 are the values of the first layer
    (arXiv:2410.17897, section 3)."""
    learned_skips: bool = False
    """Add learned skip connections: each layer of the upper half reads x + s y, with learned s; y is the output of the
    layer at the same distance below the middle (modded-nanogpt)."""
    n_expert: int = 0
    """Number of experts of a mixture of experts, which replaces the MLP (arXiv:1701.06538); 0: a dense MLP."""
    experts_per_token: int = 2
    """Number of experts per token."""
    expert_width: int = 0
    """Hidden width of an expert; 0: mlp_width."""
    n_shared_expert: int = 0
    """Number of shared experts, which process every token (arXiv:2401.06066)."""
    expert_capacity: float = 0.0
    """Capacity of an expert as a multiple of an even share of the tokens. Further tokens are dropped and counted. 0:
    unlimited."""
    balance_loss: float = 0.01
    """Weight of the load balancing loss of experts (arXiv:2101.03961, section 2.2)."""
    router_z_loss: float = 0.0
    """Weight of the squared log-normalizer of the router's logits (arXiv:2202.08906, section 3.1)."""
    init: Literal["gpt2", "uniform"] = "gpt2"
    """Initialization. gpt2: normal with standard deviation 0.02; uniform: between -sqrt(3 / n_embd) and
    sqrt(3 / n_embd), and output projections are zero."""
    mup_base_width: int = 0
    """muP (arXiv:2203.03466, table 8): the n_embd for which learning rates were tuned. Initial values and learning
    rates of matrices in blocks shrink in proportion to the width, and logits are divided by it; 0: off."""
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    def __post_init__(self):
        positive("model", self, "n_layer", "n_head", "n_embd", "block_size", "vocab_multiple", "norm_epsilon")
        positive("model", self, "relative_distance")
        not_negative(
            "model", self, "n_kv_head", "head_dim", "mlp_width", "vocab_size", "attention_window", "encoder_layers"
        )
        not_negative("model", self, "mup_base_width")
        not_negative("model", self, "attention_stride", "attention_summary", "attention_sinks")
        not_negative("model", self, "attention_scale", "attention_softcap", "logit_softcap", "rope_original_length")
        not_negative("model", self, "rope_local_base", "rope_low_frequency_factor")
        not_negative("model", self, "n_expert", "expert_width", "n_shared_expert", "expert_capacity")
        not_negative("model", self, "balance_loss", "router_z_loss")
        positive("model", self, "rope_base", "rope_factor", "embedding_scale", "residual_scale", "logit_scale")
        fraction("model", self, "dropout")
        self._check_sizes()
        self._check_rope()
        for name in ("relative_distance", "relative_values"):
            no_effect("model", self, name, self.positions == "shaw", "model.positions=shaw")
        self._check_experts()
        self._check_encoder()
        no_effect("model", self, "qkv_bias", not self.bias, "model.bias=false")
        no_effect("model", self, "parallel", self.norm_position == "pre", "model.norm_position=pre")
        self._check_pattern()
        if self.adapter.kind in ("prompt", "prefix") and self.positions in ("alibi", "t5", "shaw"):
            raise UserError(
                f"model.adapter.kind={self.adapter.kind} has no distances to texts, which"
                f" model.positions={self.positions} needs; use lora or bottleneck"
            )
        for name in ("value_residual", "learned_skips"):
            no_effect("model", self, name, self.n_layer > 1, "model.n_layer above 1")
            no_effect("model", self, name, self.adapter.kind != "prompt", "another adapter than prompt")
        mlp = (3 if self.gated else 2) * self.n_embd * self.mlp_size
        if self.n_expert:
            mlp = (3 if self.gated else 2) * self.n_embd * self.expert_size * (self.n_expert + self.n_shared_expert)
        attention = 2 * self.n_embd * (self.n_head + self.kv_heads) * self.head_width
        attention *= 2 if self.encoder_layers else 1
        parameters = (self.n_layer + self.encoder_layers) * (mlp + attention) + (
            self.padded_vocab_size + self.block_size
        ) * self.n_embd
        if parameters > MAX_PARAMETERS:
            raise UserError(
                f"model.n_layer={self.n_layer}, n_embd={self.n_embd}, vocab_size={self.vocab_size}:"
                f" {parameters:.1e} parameters, must be at most {MAX_PARAMETERS:.1e}"
            )

    def _check_sizes(self) -> None:
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd={self.n_embd} must be divisible by model.n_head={self.n_head};"
                f" the nearest that is: {max(1, round(self.n_embd / self.n_head)) * self.n_head}"
            )
        if self.n_head % self.kv_heads:
            raise UserError(f"model.n_head={self.n_head} must be divisible by model.n_kv_head={self.n_kv_head}")
        if self.attention_window >= self.block_size:
            raise UserError(
                f"model.attention_window={self.attention_window} has no effect at model.block_size={self.block_size};"
                " give less, or 0 for all"
            )

    def _check_pattern(self) -> None:
        kinds, pattern = set(self.attention_pattern), f"model.attention_pattern={' '.join(self.attention_pattern)}"
        if kinds and ("local" in kinds) != bool(self.attention_window):
            raise UserError(
                f"{pattern} and model.attention_window={self.attention_window}: local layers need a window, and a"
                " window local layers"
            )
        for name, users in (("attention_stride", {"strided", "fixed"}), ("attention_summary", {"fixed"})):
            if bool(kinds & users) != bool(getattr(self, name)):
                raise UserError(
                    f"{pattern} and model.{name}={getattr(self, name)}: {' and '.join(sorted(users))} layers need it,"
                    " and others do not have it"
                )
        if self.attention_stride >= self.block_size or 0 < self.attention_stride <= self.attention_summary:
            raise UserError(
                f"model.attention_stride={self.attention_stride} must be less than model.block_size={self.block_size}"
                f" and more than model.attention_summary={self.attention_summary}"
            )
        if self.attention_sinks + max(1, self.attention_window) > self.block_size:
            raise UserError(
                f"model.attention_sinks={self.attention_sinks} and model.attention_window={self.attention_window}"
                f" together must be at most model.block_size={self.block_size}"
            )
        no_effect("model", self, "attention_sinks", not self.bidirectional or bool(self.attention_window), "a window")
        if "full_nope" in kinds and self.positions != "rope":
            raise UserError(f"{pattern}: full_nope layers are those without rotation; they need model.positions=rope")
        if self.n_layer < len(self.attention_pattern):
            raise UserError(
                f"model.attention_pattern names {len(self.attention_pattern)} layers, model.n_layer={self.n_layer}"
                " has fewer"
            )

    def _check_encoder(self) -> None:
        if not self.encoder_layers:
            return
        for name in (
            "norm_position",
            "parallel",
            "residual_mix",
            "n_expert",
            "bidirectional",
            "value_residual",
            "learned_skips",
        ):
            if getattr(self, name) not in (getattr(ModelConfig, name), "post"):
                raise UserError(f"model.{name}={getattr(self, name)} does not go with model.encoder_layers")
        if self.adapter.kind != "none":
            raise UserError(f"model.adapter.kind={self.adapter.kind} does not go with model.encoder_layers")

    def _check_experts(self) -> None:
        positive("model", self, "experts_per_token")
        for name in ("experts_per_token", "expert_width", "n_shared_expert", "expert_capacity", "balance_loss"):
            no_effect("model", self, name, bool(self.n_expert), "model.n_expert")
        no_effect("model", self, "router_z_loss", bool(self.n_expert), "model.n_expert")
        no_effect("model", self, "mlp_width", not self.n_expert or not self.expert_width, "model.expert_width=0")
        if self.n_expert and self.experts_per_token > self.n_expert:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} must be at most model.n_expert={self.n_expert}"
            )
        if self.n_expert and self.bias:
            raise UserError("model.n_expert needs model.bias=false: experts have no biases")
        if self.n_expert and any(target.startswith("mlp/") for target in self.adapter.targets):
            raise UserError(
                f"model.adapter.targets={' '.join(self.adapter.targets)}: lora adapts the attention of a model with"
                " experts, not its MLP; leave out mlp/w_in and mlp/w_out"
            )

    def _check_rope(self) -> None:
        rope, scaled = self.positions == "rope", self.rope_scaling != "none"
        for name in ("rope_base", "rope_local_base", "rope_fraction", "rope_scaling"):
            no_effect("model", self, name, rope, "model.positions=rope")
        no_effect("model", self, "rope_local_base", bool(self.attention_pattern), "model.attention_pattern")
        no_effect("model", self, "rope_factor", scaled, "model.rope_scaling")
        by_length = self.rope_scaling in ("yarn", "llama3")
        no_effect("model", self, "rope_original_length", by_length, "model.rope_scaling=yarn or llama3")
        for name in ("rope_low_frequency_factor", "rope_high_frequency_factor"):
            no_effect("model", self, name, self.rope_scaling == "llama3", "model.rope_scaling=llama3")
        if not 0 < self.rope_fraction <= 1:
            raise UserError(f"model.rope_fraction={self.rope_fraction} must lie in (0, 1]")
        if rope and round(self.rope_fraction * self.head_width / 2) < 1:
            raise UserError(f"model.rope_fraction={self.rope_fraction} rotates no pair of {self.head_width} channels")
        if rope and self.rope_fraction == 1 and self.head_width % 2:
            raise UserError(f"model.positions=rope rotates pairs of channels, and a head has {self.head_width}")
        if self.rope_high_frequency_factor <= self.rope_low_frequency_factor:
            raise UserError("model.rope_high_frequency_factor must be larger than model.rope_low_frequency_factor")

    @property
    def width_ratio(self) -> float:
        """The base width of muP over the width; 1: muP is off, or this is the base."""
        return self.mup_base_width / self.n_embd if self.mup_base_width else 1.0

    @property
    def logit_factor(self) -> float:
        """Factor of the output logits, that of muP included."""
        return self.logit_scale * self.width_ratio

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one head, with the default resolved."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP, with the default resolved."""
        if self.mlp_width or not self.gated:
            return self.mlp_width or 4 * self.n_embd
        return -(-8 * self.n_embd // (3 * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE

    @property
    def expert_size(self) -> int:
        """Hidden width of an expert, with the default resolved."""
        return self.expert_width or self.mlp_size

    @property
    def has_dropout(self) -> bool:
        """Whether training uses random numbers in the model."""
        return self.dropout > 0 or self.adapter.dropout > 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_kind(self, layer: int) -> str:
        """The kind of a layer's attention, as `attention_pattern` names it."""
        if not self.attention_pattern:
            return "local" if self.attention_window else "full"
        return self.attention_pattern[layer % len(self.attention_pattern)]

    def attended_keys(self, layer: int) -> int:
        """Most keys that a token attends to in a layer."""
        kind, blocks = self.layer_kind(layer), self.block_size // max(1, self.attention_stride)
        return {
            "local": min(self.attention_window + self.attention_sinks, self.block_size),
            "strided": self.attention_stride + blocks - 1,
            "fixed": self.attention_stride + (blocks - 1) * self.attention_summary,
        }.get(kind, self.block_size)
