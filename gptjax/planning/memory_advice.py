"""Says which option to lower, and by how much, for a training step that did not fit in the device's memory."""

import dataclasses
import os
import re
from collections.abc import Iterator

import jax

from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.parallel.mesh import batch_shards, make_mesh
from gptjax.planning import estimate
from gptjax.planning.compiled import abstract_state, device_bytes
from gptjax.report.cost import readable_bytes

USABLE = 0.9
"""Share of the device's memory that a suggestion may use by the estimate."""
Change = tuple[str, str, object]
"""Name of an option, its old value with an arrow, its new value."""


def explain_out_of_memory(config: Config, error: BaseException, limit: int) -> str:
    """Returns one line: what was asked for, and the smallest change of options that should fit.

    Args:
        config: The run, with the size of its vocabulary.
        error: What JAX raised.
        limit: Bytes of the device; 0: unknown.
    """
    asked = re.search(r"allocat\w*\D{0,40}([\d.,]+\s?(?:[KMGT]i?B|bytes|B)\b)", str(error))
    head = "out of memory on the device" + (f" (the allocation that failed: {asked[1]})" if asked else "")
    limit = limit or _memory_of_host()
    if not config.model.vocab_size:
        return f"{head}: lower train.micro_batch_size={config.train.micro_batch}, or set train.remat=full"
    needs = _needs(config)
    if limit:
        head += f", which has {readable_bytes(limit)}"
    # The step did not fit, so an estimate below the limit was too low.
    ratio = max(1.0, limit / needs.changing) if limit else 1.0
    for changes, smaller in _smaller(config):
        one = _needs(smaller)
        total = one.state + ratio * one.changing
        if total <= USABLE * limit:
            now = needs.state + ratio * needs.changing
            words = " and ".join(f"{name} {given}{value}" for name, given, value in changes)
            return (
                f"{head}: set {words}: estimated {readable_bytes(total)} in place of {readable_bytes(now)} per device"
            )
    state = f"parameters and optimizer alone need {readable_bytes(needs.state)} per device"
    return f"{head}: {state}; use more devices with mesh.fsdp, or a smaller model (model.n_embd, model.n_layer)"


@dataclasses.dataclass(frozen=True)
class _Needs:
    state: float
    """Bytes of parameters, optimizer and counters."""
    changing: float
    """Bytes of activations and temporaries of the step, by formula."""


def _needs(config: Config) -> _Needs:
    mesh = make_mesh(config.mesh)
    state = abstract_state(config, mesh)
    sizes = estimate.Sizes(config, dict(mesh.shape))
    parameters = device_bytes((state.params, state.frozen))
    return _Needs(device_bytes(state), estimate.activations(sizes) + estimate.temporaries(sizes, parameters))


def _smaller(config: Config) -> Iterator[tuple[list[Change], Config]]:
    """Yields configs that need less memory, those that slow training least first, each with its changes."""
    train, shards = config.train, batch_shards(make_mesh(config.mesh))
    micro_batches = [
        size
        for size in range(train.micro_batch - 1, 0, -1)
        if size % shards == 0 and all(batch % size == 0 for _, batch in train.batch_sizes)
    ]
    for remat in dict.fromkeys((train.remat, "full")):
        unroll = 1 if remat == "full" else train.unroll
        for size in [train.micro_batch, *micro_batches] if remat != train.remat else micro_batches:
            changes: list[Change] = [("train.remat", f"{train.remat} -> ", remat)] if remat != train.remat else []
            if size != train.micro_batch:
                changes.append(("train.micro_batch_size", f"{train.micro_batch} -> ", size))
            new = dataclasses.replace(train, micro_batch_size=size, remat=remat, unroll=unroll)
            yield changes, dataclasses.replace(config, train=new)
    length, size = config.model.block_size // 2, (micro_batches or [train.micro_batch])[-1]
    while length >= 16 and config.task.kind == "pretrain":
        new = dataclasses.replace(train, micro_batch_size=size, remat="full", unroll=1)
        try:
            smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, block_size=length), train=new)
        except UserError:  # another option, such as model.attention_window, needs the length
            return
        changes = [("model.block_size", f"{config.model.block_size} -> ", length)]
        changes += [("train.remat", f"{train.remat} -> ", "full")] if train.remat != "full" else []
        changes += [("train.micro_batch_size", f"{train.micro_batch} -> ", size)] if size != train.micro_batch else []
        yield changes, smaller
        length //= 2


def device_memory() -> int:
    """Bytes that this process may use on its first device; 0: unknown, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def _memory_of_host() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # as on Windows
        return 0
