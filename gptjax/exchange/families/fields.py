"""Reads the fields of a config.json one by one, so that unread fields are known at the end."""

import math
from collections.abc import Callable
from typing import Any

from gptjax.config.rules import LARGEST_COUNT
from gptjax.errors import UserError

ACTIVATIONS = {
    **{"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu"},
    **{"relu2": "relu2", "silu": "silu", "swish": "silu", "tanh": "tanh", "sigmoid": "sigmoid"},
}
"""Names of transformers, and ours; `gelu` is the exact one there."""
ACTIVATION_NAMES = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"}
"""Ours where theirs differs."""
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer"), 10_000
"""Names of the number of layers, and the largest one: readers make lists as long as this."""
NEUTRAL = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("_name_or_path", "name_or_path", "attn_implementation", "_attn_implementation", "cache_implementation"),
    *("id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions", "torchscript"),
    *("output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "tokenizer_class"),
    *("task_specific_params", "finetuning_task", "pruned_heads", "tie_encoder_decoder", "prefix", "use_bfloat16"),
    *("tf_legacy_loss", "bos_token", "eos_token", "auto_map", "classifier_dropout", "pretraining_tp", "add_bos_token"),
}
"""Fields that do not change the function of a model."""
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_SCALINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}
"""The allowed fields of each kind of rope scaling."""


class Fields:
    """A config.json. The caller gives the default of a missing field, which is that of transformers."""

    def __init__(self, raw: dict, where: str):
        self.raw, self.where, self.seen = raw, where, set[str]()
        self.notes: list[str] = []
        """Lines for the user about fields that are read and have no effect here."""

    def get(self, name: str, default: Any) -> Any:
        """The value of a field."""
        self.seen.add(name)
        return self.raw.get(name, default)

    def need(self, name: str, default: Any, *allowed: Any) -> Any:
        """The value of a field with a list of allowed values."""
        value = self.get(name, default)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise self.refusal(name, value, f"must be {' or '.join(repr(a) for a in allowed)}")
        return value

    def size(self, name: str, default: int | None) -> int:
        """An integer from 1 on. A default of None means that the field is required."""
        value, most = self.get(name, default), MOST_LAYERS if name in LAYERS else LARGEST_COUNT
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{self.where}: {name}={value!r} must be a whole number from 1 to {most}")
        return value

    def optional_size(self, name: str, default: int | None) -> int:
        """The same, where null (and 0 in the answer) stands for none."""
        return 0 if self.get(name, default) is None else self.size(name, default)

    def number(self, name: str, default: float) -> float:
        """A number."""
        return self._number(name, self.get(name, default))

    def optional_number(self, name: str, default: float | None) -> float:
        """The same, where null (and 0 in the answer) stands for none."""
        return 0.0 if self.get(name, default) is None else self.number(name, default or 0.0)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self.need(name, default, True, False)

    def activation(self, name: str, default: str) -> Any:
        """Our name of an activation."""
        return ACTIVATIONS[self.need(name, default, *ACTIVATIONS)]

    def kinds(self, name: str, count: int, default: Callable[[int], str]) -> tuple[str, ...]:
        """The kind of attention of each layer; the default is a function of the layer."""
        value = self.get(name, None)
        value = [default(layer) for layer in range(count)] if value is None else value
        if not isinstance(value, list) or len(value) != count:
            raise UserError(f"{self.where}: {name} must be a list of {count} kinds of layers")
        names = {"full_attention": "full", "sliding_attention": "local"}
        for kind in value:
            if not isinstance(kind, str) or kind not in names:
                raise self.refusal(name, kind, f"must be {' or '.join(map(repr, names))}")
        return tuple(names[kind] for kind in value)

    def rope(self, theta: float = 10_000.0, theta_name: str = "rope_theta", layers: str = "") -> dict:
        """Options of rope, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).

        Args:
            theta: Default of the base frequency.
            theta_name: Its field in transformers before version 5.
            layers: Kind of layers whose parameters are read, if kinds have their own.
        """
        old, new = self.get("rope_scaling", None), self.get("rope_parameters", None)
        if layers and new is not None:
            if not isinstance(new, dict):
                raise self.refusal("rope_parameters", new, "must be an object")
            new = new.get(layers)
        if layers == "sliding_attention":
            old = None  # the old field applies to full layers
        name = "rope_parameters" if old is None else "rope_scaling"
        rope = (new if old is None else old) or {}
        if not isinstance(rope, dict):
            raise self.refusal(name, rope, "must be an object")
        rope = {key: value for key, value in rope.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_SCALINGS:
            kinds = " or ".join(map(repr, ROPE_SCALINGS))
            raise self.refusal(f"{name}.rope_type", kind, f"must be {kinds}")
        if unknown := sorted(rope.keys() - ROPE_KEYS - ROPE_SCALINGS[kind]):
            raise self.refusal(f"{name}.{unknown[0]}", rope[unknown[0]], f"rope_type {kind} does not have it")
        old_theta = self.get(theta_name, None)
        base = rope.get("rope_theta", theta if old_theta is None else old_theta)
        options: dict = {"positions": "rope", "rope_base": self._number("rope_theta", base)}
        if kind == "default":
            return options
        if "factor" not in rope:
            raise UserError(f"{self.where}: {name} of rope_type {kind} needs factor")
        if kind == "dynamic":
            self._number(f"{name}.factor", rope["factor"])
            self.notes.append(f"{name}.rope_type=dynamic stretches texts past max_position_embeddings; none is so long")
            return options
        options |= {"rope_scaling": kind, "rope_factor": self._number(f"{name}.factor", rope["factor"])}
        if kind == "linear":
            return options
        length = self.optional_size("original_max_position_embeddings", None)
        options["rope_original_length"] = length or int(rope.get("original_max_position_embeddings", 0))
        if kind == "llama3":
            options["rope_low_frequency_factor"] = self._number("low_freq_factor", rope.get("low_freq_factor"))
            options["rope_high_frequency_factor"] = self._number("high_freq_factor", rope.get("high_freq_factor"))
            return options
        self._check_yarn(name, rope)
        return options

    def rope_fraction(self, head_width: int, default: float, name: str = "partial_rotary_factor") -> float:
        """Share of a head's channels that rope rotates."""
        nested = self.get("rope_scaling", None) or self.get("rope_parameters", None) or {}
        value = self._number(name, nested.get("partial_rotary_factor", self.get(name, default)))
        if int(value * head_width) != 2 * round(value * head_width / 2):
            raise self.refusal(name, value, f"rotates an odd number of the {head_width} channels of a head")
        return value

    def unread(self) -> list[str]:
        """Fields that were not read and may have an effect."""
        return sorted(name for name in self.raw.keys() - self.seen - NEUTRAL if self.raw[name] is not None)

    def refusal(self, name: str, value: Any, rule: str) -> UserError:
        """The error that names a field."""
        return UserError(f"{self.where}: {name}={value!r} is not supported; {rule}")

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {name}={value!r} must be a number")
        return float(value)

    def _check_yarn(self, name: str, rope: dict) -> None:
        factor = rope["factor"]
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": magnitude}
        for key, value in usual.items():
            if key in rope and not math.isclose(rope[key], value):
                raise self.refusal(f"{name}.{key}", rope[key], f"must be {value}")
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            raise self.refusal(f"{name}.mscale", rope["mscale"], "must be left out, or mscale_all_dim")


def rope_fields(model, theta_name: str = "rope_theta") -> dict:
    """Inverse of `Fields.rope`, in the fields of transformers before version 5, which all versions read."""
    scaling: dict | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
        if model.rope_scaling in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = model.rope_original_length or model.block_size
        if model.rope_scaling == "llama3":
            scaling |= {
                "low_freq_factor": model.rope_low_frequency_factor,
                "high_freq_factor": model.rope_high_frequency_factor,
            }
    return {theta_name: model.rope_base, "rope_scaling": scaling}
