"""GPT-1 (openai-gpt): post-norm blocks without a final norm."""

from typing import Any

from gptjax.config.model import ModelConfig
from gptjax.exchange.families.family import Family, same
from gptjax.exchange.families.fields import Fields
from gptjax.exchange.families.gpt2 import BLOCK, read_sizes, write_sizes

OUTER = (same("embed/tokens", "tokens_embed.weight"), same("embed/positions", "positions_embed.weight"))
ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Names of this family, in which gelu is the tanh form, and ours."""


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **read_sizes(fields),
        block_size=fields.size("n_positions", 512),
        vocab_size=fields.size("vocab_size", 40478),
        norm_position="post",
        activation=ACTIVATIONS[fields.need("afn", "gelu", *ACTIVATIONS)],
    )


def _write(model: ModelConfig) -> dict:
    return write_sizes(model) | {"afn": model.activation if model.activation in ACTIVATIONS else "gelu"}


GPT1 = Family(
    *("openai-gpt", "OpenAIGPTLMHeadModel", _read, _write, OUTER, BLOCK),
    **{"prefix": "transformer.", "layer": "h.{}.", "buffers": ("attn.bias",)},
    label_heads=("classify",),
    conv1d=True,
)
