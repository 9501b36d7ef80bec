"""LoRA adapters ⇄ folders of PEFT: adapter_config.json and adapter_model.safetensors.

gptjax has one pair of matrices for a target such as `attn/w_qkv`; PEFT has one for each linear layer. On import, the
pairs of several linear layers are concatenated to one: their ranks add up, and each linear layer uses its own part.

Shape suffixes: L layer, R rank.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gptjax.config.model import ModelConfig
from gptjax.config.task import LORA_TARGETS, AdapterConfig
from gptjax.errors import UserError
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.families.family import Entry, Family, choose_family, differences
from gptjax.exchange.hf_files import make_empty_folder, read_json, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OUTPUTS_FIRST = "mlp/w_out"
"""The target that we store `[out, in]`."""
NEUTRAL = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("fan_in_fan_out", "bias", "inference_mode", "revision", "auto_mapping", "use_rslora", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "peft_version", "runtime_config", "loftq_config", "eva_config"),
    *("corda_config", "megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "lora_ga_config"),
    *("exclude_modules",),
}
"""Fields that are read, or that change nothing once the matrices are there."""


def is_peft(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (folder / CONFIG).is_file()


def export_lora(model: ModelConfig, params: dict, to: Path, family_name: str = "") -> None:
    """Writes the adapter of a model as a folder for `PeftModel.from_pretrained`, together with the exported base.

    Args:
        model: Config with a LoRA adapter.
        params: Parameters with `adapters`.
        to: Folder to create; it may exist if it is empty.
        family_name: The `model_type` of the base; empty: the first equivalent one.

    Raises:
        UserError: No family is equivalent to the model, or the folder is not empty.
    """
    options, plain = model.adapter, dataclasses.replace(model, adapter=AdapterConfig())
    family = choose_family(FAMILIES, plain, family_name)
    make_empty_folder(to)
    tensors, modules = dict[str, np.ndarray](), set[str]()
    for entry, target in _targets(family, options.targets):
        low = params["adapters"][target.replace("/", "_")]
        a_LIR, b_LRO = (np.asarray(low[name]).astype(np.float32) for name in "ab")
        for layer in range(model.n_layer):
            for name, b in zip(entry.names, _their_b(family, plain, entry, target, b_LRO[layer]), strict=True):
                module = name.removesuffix(".weight")
                modules.add(module)
                place = PREFIX + family.prefix + family.layer.format(layer) + module
                tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(a_LIR[layer].T)
                tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, to / WEIGHTS, {"format": "pt"})
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "bias": "none"},
        **{"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout},
        **{"target_modules": sorted(modules), "fan_in_fan_out": family.conv1d, "inference_mode": True},
    }
    write_json(to / CONFIG, config)


def import_lora(folder: Path, model: ModelConfig) -> tuple[ModelConfig, dict]:
    """Reads a PEFT folder as an adapter of a model; layers without matrices get zeros.

    Raises:
        UserError: A file is damaged, the adapter is of another kind, or a matrix has no place in the model.
    """
    where, config = str(folder), read_json(folder / CONFIG)
    rank, scale = _read_config(config, where)
    tensors = _read_tensors(folder)
    if model.adapter.kind != "none":
        raise UserError(f"{where}: the base has a {model.adapter.kind} adapter already; export it with --merge first")
    family = _family_of(model, tensors)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    used: set[str] = set()
    for entry, target in _targets(family, LORA_TARGETS):
        names = _modules(family, model, entry)
        present = {name for layer in names for name in layer if f"{name}.lora_A.weight" in tensors}
        if present:
            used |= {f"{name}.lora_{part}.weight" for name in present for part in "AB"}
            found[target] = _our_pair(family, model, entry, target, names, tensors, rank, where)
    if unknown := sorted(tensors.keys() - used):
        raise UserError(
            f"{where}: {unknown[0]} has no place in a lora adapter of gptjax, whose targets are"
            f" {', '.join(LORA_TARGETS)}; merge it with peft's merge_and_unload, and import the model"
        )
    if not found:
        raise UserError(f"{where}: {WEIGHTS} holds no matrix of a {family.model_type} with {model.n_layer} layers")
    R = max(a_LIR.shape[-1] for a_LIR, _ in found.values())
    adapters = {}
    for target, (a_LIR, b_LRO) in found.items():
        missing = R - a_LIR.shape[-1]
        a_LIR = np.pad(a_LIR, ((0, 0), (0, 0), (0, missing)))
        b_LRO = np.pad(b_LRO, ((0, 0), (0, missing), *((0, 0),) * (b_LRO.ndim - 2)))
        adapters[target.replace("/", "_")] = {"a": jnp.asarray(a_LIR), "b": jnp.asarray(b_LRO)}
    options = AdapterConfig(
        kind="lora", rank=R, alpha=scale * R, targets=tuple(found), dropout=float(config.get("lora_dropout", 0.0))
    )
    return dataclasses.replace(model, adapter=options), adapters


def _family_of(model: ModelConfig, tensors: dict[str, np.ndarray]) -> Family:
    """The first family that is equivalent to the model and has the linear layers that the adapter names.

    Raises:
        UserError: No family is equivalent.
    """
    first = choose_family(FAMILIES, model)
    for family in FAMILIES.values():
        if not differences(family, model):
            modules = {
                name
                for entry, _ in _targets(family, LORA_TARGETS)
                for layer in _modules(family, model, entry)
                for name in layer
            }
            if all(name.rsplit(".lora_", 1)[0] in modules for name in tensors):
                return family
    return first


def _modules(family: Family, model: ModelConfig, entry: Entry) -> list[list[str]]:
    """The linear layers of an entry, for each layer of the model."""
    return [
        [f"{family.prefix}{family.layer.format(layer)}{name.removesuffix('.weight')}" for name in entry.names]
        for layer in range(model.n_layer)
    ]


def _read_config(config: dict, where: str) -> tuple[int, float]:
    """The rank and the scale of the update."""

    def refuse(name: str, rule: str) -> UserError:
        return UserError(f"{where}: {CONFIG}: {name}={str(config.get(name))[:60]} is not supported; {rule}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "must be LORA")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "must be none")
    for name, value in config.items():
        if name not in NEUTRAL and value:
            raise refuse(name, "must be empty")
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1:
        raise refuse("r", "must be a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise refuse("lora_alpha", "must be above 0")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return {re.sub(r"\.default(?=\.weight$)", "", name.removeprefix(PREFIX)): x for name, x in tensors.items()}


def _targets(family: Family, targets: tuple[str, ...]) -> Iterator[tuple[Entry, str]]:
    for target in targets:
        yield next(entry for entry in family.block if target in entry.leaves), target


def _their_b(family: Family, model: ModelConfig, entry: Entry, target: str, b_RO: np.ndarray) -> tuple[np.ndarray, ...]:
    """The second matrix of each linear layer, `[out, R]`."""
    weight = b_RO.T if target == OUTPUTS_FIRST else b_RO
    # Other parts of the tensor, such as a gate, have no adapter.
    parts = tuple(weight if leaf == target else np.zeros_like(weight) for leaf in entry.leaves)
    return tuple(_outputs_first(family, x) for x in entry.to_theirs(model, parts))


def _our_pair(
    family: Family,
    model: ModelConfig,
    entry: Entry,
    target: str,
    names: list[list[str]],
    tensors: dict[str, np.ndarray],
    rank: int,
    where: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Builds our two matrices of one target, stacked over layers, from the matrices of its linear layers."""
    widths = _widths(family, model, entry, target)

    def matrices(name: str, outputs: int) -> tuple[np.ndarray | None, np.ndarray]:
        a, b = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
        if a is None and b is None:
            return None, np.zeros((outputs, rank), np.float32)
        if a is None or b is None or a.shape != (rank, widths.inputs) or b.shape != (outputs, rank):
            found = [None if x is None else list(x.shape) for x in (a, b)]
            raise UserError(
                f"{where}: {name} has matrices of shapes {found[0]} and {found[1]}, must be [{rank}, {widths.inputs}]"
                f" and [{outputs}, {rank}]"
            )
        return a.astype(np.float32), b.astype(np.float32)

    layers = [[matrices(name, n) for name, n in zip(layer, widths.outputs, strict=True)] for layer in names]
    shared = all(_all_equal([a for a, _ in layer]) for layer in layers)
    pairs = [(_share if shared else _side_by_side)(layer, rank, widths.inputs) for layer in layers]
    ours = [_our_b(family, model, entry, target, bs, where) for _, bs in pairs]
    return np.stack([a.T for a, _ in pairs]), np.stack(ours)


@dataclasses.dataclass(frozen=True)
class _Widths:
    inputs: int
    outputs: tuple[int, ...]


def _widths(family: Family, model: ModelConfig, entry: Entry, target: str) -> _Widths:
    """Inputs of a target, and outputs of each of its linear layers."""
    inputs = {"attn/w_out": model.n_head * model.head_width, OUTPUTS_FIRST: model.mlp_size}.get(target, model.n_embd)
    G, E = model.kv_heads, model.n_head // model.kv_heads + 2
    shape = {"attn/w_qkv": (G, E, model.head_width), "mlp/w_in": (model.mlp_size,)}.get(target, (model.n_embd,))
    return _Widths(inputs, tuple(len(x) for x in _their_b(family, model, entry, target, np.zeros((1, *shape)))))


def _all_equal(arrays: list[np.ndarray | None]) -> bool:
    first = arrays[0]
    return first is not None and all(x is not None and np.array_equal(x, first) for x in arrays)


def _share(layer: list, rank: int, inputs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    return layer[0][0], [b for _, b in layer]


def _side_by_side(layer: list, rank: int, inputs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One matrix `[n R, in]`, and for each of the n linear layers a matrix `[out, n R]` that is zero outside its
    part.
    """
    a = np.concatenate([np.zeros((rank, inputs), np.float32) if a is None else a for a, _ in layer])
    padded = [np.pad(b, ((0, 0), (i * rank, (len(layer) - 1 - i) * rank))) for i, (_, b) in enumerate(layer)]
    return a, padded


def _our_b(
    family: Family, model: ModelConfig, entry: Entry, target: str, theirs: list[np.ndarray], where: str
) -> np.ndarray:
    ours = entry.to_ours(model, tuple(_outputs_first(family, b) for b in theirs))
    for leaf, x in zip(entry.leaves, ours, strict=True):
        if leaf != target and x.any():
            raise UserError(f"{where}: adapts {leaf}, which is no target of gptjax; merge it with peft first")
    weight = ours[entry.leaves.index(target)]
    return weight.T if target == OUTPUTS_FIRST else weight


def _outputs_first(family: Family, x: Any) -> Any:
    """Converts the family's layout of a weight to `[out, R]`, and back."""
    return x.T if family.conv1d else x
