"""One table from parameter path to sharding. Model code knows nothing of it."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError

# First match wins. Paths end in the parameter's name, for parameters, Adam's moments and averages alike; leaves of
# blocks have a leading layer axis.
RULES = (
    (r"(^|/)(adapters|prompt|heads)/", PartitionSpec()),  # small: every device holds them whole
    (r"embed/tokens$", PartitionSpec("tensor", "fsdp")),
    (r"embed/positions$", PartitionSpec(None, "fsdp")),
    (r"head/w$", PartitionSpec("tensor", "fsdp")),
    (r"attn/w_qkv$", PartitionSpec(None, "fsdp", "tensor")),
    (r"attn/b_qkv$", PartitionSpec(None, "tensor")),
    (r"attn/w_out$", PartitionSpec(None, "tensor", "fsdp")),
    (r"mlp/(w_in|w_out)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"mlp/b_in$", PartitionSpec(None, "tensor")),
    (r"(attn|mlp)/b_out$", PartitionSpec()),
    (r"norm_\w+/(scale|bias)$", PartitionSpec()),
    (r"(^|/)(step|skipped|count|good_steps|loss_scale/scale)$", PartitionSpec()),
    (r"^watch/\w+$", PartitionSpec()),
)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Maps every leaf of `tree` (arrays or shapes) to its `NamedSharding`.

    Raises:
        ValueError: No rule matches a leaf.
        UserError: An axis of the mesh does not divide the dimension that it cuts.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in RULES:
            if re.search(pattern, name):
                _check_divides(mesh, name, leaf.shape, spec)
                return NamedSharding(mesh, spec)
        raise ValueError(f"no sharding rule matches {name!r}; add one to RULES in gptjax/parallel/rules.py")

    return jax.tree_util.tree_map_with_path(one, tree)


def _check_divides(mesh: Mesh, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            hint = "; set model.vocab_multiple to a multiple of it" if name.endswith(("embed/tokens", "head/w")) else ""
            raise UserError(f"mesh.{axis}={mesh.shape[axis]} does not divide {size}, a dimension of {name}{hint}")
