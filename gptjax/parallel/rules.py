"""One table from parameter path to sharding. Models do not use it: they only pin a few activations (`ops/axes.pin`)."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError

# A vocabulary that mesh.tensor does not divide keeps its size, is cut along its width, and is padded where it is used.
VOCABULARY = (PartitionSpec("tensor", ("fsdp", "stage")), PartitionSpec(None, ("fsdp", "stage", "tensor")))
# First match wins; of several specs the first that divides. Paths end in the parameter's name, for parameters, Adam's
# moments and averages alike; leaves of blocks and adapters have a leading layer axis.
RULES = (
    (r"(^|/)(v_row|v_col|v)/", PartitionSpec()),  # factored second moments: vectors
    (r"(^|/)adapters/", PartitionSpec("stage")),  # small: otherwise every device holds them whole
    (r"(^|/)(prompt|heads)/", PartitionSpec()),
    (r"embed/tokens$", *VOCABULARY),
    (r"embed/positions$", PartitionSpec(None, ("fsdp", "stage"))),
    (r"embed/norm/(scale|bias)$", PartitionSpec()),
    (r"head/w$", *VOCABULARY),
    (r"head/bias$", PartitionSpec()),
    (r"attn/w_qkv$", PartitionSpec("stage", "fsdp", "tensor")),
    (r"attn/b_qkv$", PartitionSpec("stage", "tensor")),
    (r"attn/w_out$", PartitionSpec("stage", "tensor", "fsdp")),
    (r"attn/(norm_[qk]/(scale|bias)|distances)$", PartitionSpec("stage")),
    (r"experts/w_router$", PartitionSpec("stage")),
    (r"experts/(w_in|w_gate)$", PartitionSpec("stage", None, "fsdp", "tensor")),
    (r"experts/w_out$", PartitionSpec("stage", None, "tensor", "fsdp")),
    (r"mlp/(w_in|w_gate|w_out)$", PartitionSpec("stage", "fsdp", "tensor")),
    (r"mlp/(b_in|b_gate)$", PartitionSpec("stage", "tensor")),
    (r"(attn|mlp)/b_out$", PartitionSpec("stage")),
    (r"norm_(out_)?[12]/(scale|bias)$", PartitionSpec("stage")),
    (r"blocks/mix$", PartitionSpec("stage")),
    (r"norm_f/(scale|bias)$", PartitionSpec()),
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
        for pattern, *specs in RULES:
            if re.search(pattern, name):
                misfits = [_misfit(mesh, leaf.shape, spec) for spec in specs]
                if None in misfits:
                    return NamedSharding(mesh, specs[misfits.index(None)])
                raise UserError(f"{misfits[-1]}, a dimension of {name}")
        raise ValueError(f"no sharding rule matches {name!r}; add one to RULES in gptjax/parallel/rules.py")

    return jax.tree_util.tree_map_with_path(one, tree)


def _misfit(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> str | None:
    """Says which axes of the mesh do not divide which dimension, where that is so."""
    for size, axes in zip(shape, spec, strict=False):
        names = [axes] if isinstance(axes, str) else list(axes or ())
        cutting = {name: mesh.shape[name] for name in names if mesh.shape[name] > 1}
        if size % math.prod(cutting.values()):
            return f"{' x '.join(f'mesh.{name}={n}' for name, n in cutting.items())} does not divide {size}"
    return None
