"""One table from parameter path to sharding.

Models do not use it; they only constrain a few activations (`ops/axes.constrain_sharding`).
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError

# A table whose vocabulary mesh.tensor does not divide is sharded along its width, and padded where it is used.
VOCABULARY = (PartitionSpec("tensor", ("fsdp", "stage")), PartitionSpec(None, ("fsdp", "stage", "tensor")))
# The first matching pattern wins; of several specs, the first whose axes divide the shape. Paths end in the parameter's
# name also for Adam's moments and averages. Leaves of blocks and adapters have a leading layer axis.
RULES = (
    (r"(^|/)(v_row|v_col|v)/", PartitionSpec()),  # factored second moments: vectors
    (r"(^|/)adapters/", PartitionSpec("stage")),  # small: otherwise every device holds them whole
    (r"(^|/)(prompt|heads)/", PartitionSpec()),
    (r"embed/tokens$", *VOCABULARY),
    (r"embed/positions$", PartitionSpec(None, ("fsdp", "stage"))),
    (r"embed/norm/(scale|bias)$", PartitionSpec()),
    (r"head/w$", *VOCABULARY),
    (r"head/bias$", PartitionSpec()),
    (r"(attn/w_qkv|cross/w_(q|kv))$", PartitionSpec("stage", "fsdp", "tensor")),
    (r"(attn/b_qkv|cross/b_(q|kv))$", PartitionSpec("stage", "tensor")),
    (r"(attn|cross)/w_out$", PartitionSpec("stage", "tensor", "fsdp")),
    (r"attn/(norm_[qk]/(scale|bias)|distances)$", PartitionSpec("stage")),
    (r"experts/w_router$", PartitionSpec("stage")),
    (r"experts/(w_in|w_gate)$", PartitionSpec("stage", "expert", "fsdp", "tensor")),
    (r"experts/w_out$", PartitionSpec("stage", "expert", "tensor", "fsdp")),
    (r"mlp/(w_in|w_gate|w_out)$", PartitionSpec("stage", "fsdp", "tensor")),
    (r"mlp/(b_in|b_gate)$", PartitionSpec("stage", "tensor")),
    (r"(attn|cross|mlp)/b_out$", PartitionSpec("stage")),
    (r"norm_((out_)?[12]|cross)/(scale|bias)$", PartitionSpec("stage")),
    (r"blocks/(mix|skip|attn/value_mix)$", PartitionSpec("stage")),
    (r"norm_f/(scale|bias)$", PartitionSpec()),
    (r"(^|/)(step|skipped|count|good_steps|loss_scale/scale|b1|weight_sum|step_count|max_lr)$", PartitionSpec()),
    (r"^(watch|noise)/\w+$", PartitionSpec()),
)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Maps every leaf of `tree` (arrays or shapes) to its `NamedSharding`.

    Raises:
        ValueError: No rule matches a leaf.
        UserError: An axis of the mesh does not divide the dimension that it shards.
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
    """Returns which mesh axes do not divide which dimension; None: all do."""
    for size, axes in zip(shape, spec, strict=False):
        names = [axes] if isinstance(axes, str) else list(axes or ())
        sharding = {name: mesh.shape[name] for name in names if mesh.shape[name] > 1}
        if size % math.prod(sharding.values()):
            return f"{' x '.join(f'mesh.{name}={n}' for name, n in sharding.items())} does not divide {size}"
    return None
