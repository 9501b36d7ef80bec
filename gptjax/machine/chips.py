"""What vendors publish of a chip: peak, memory, links."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates are of one chip, and of links in one direction."""

    kinds: tuple[str, ...]
    """Parts of `device.device_kind` that tell it."""
    peak_flops: float
    """Dense bfloat16, FLOP/s."""
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes/s."""
    node: int
    """Chips that the fast links join: those of a machine, or of a TPU's pod."""
    link: float
    """Bytes/s to chips of the same node."""
    network: float
    """Bytes/s to chips of other nodes."""


# Data sheets of NVIDIA (DGX for nodes and networks; H100 PCIe and L4 over PCIe), Google's TPU documentation. Of links,
# half of what is published for both directions. A pod of v4 or v5p has more chips than can be planned.
CHIPS = {
    "h100": Chip(("H100",), 989e12, 80e9, 3.35e12, 8, 450e9, 50e9),
    "h100-pcie": Chip(("H100 PCIe",), 756e12, 80e9, 2.0e12, 8, 64e9, 50e9),
    "h200": Chip(("H200",), 989e12, 141e9, 4.8e12, 8, 450e9, 50e9),
    "b200": Chip(("B200",), 2250e12, 180e9, 8.0e12, 8, 900e9, 50e9),
    "a100": Chip(("A100",), 312e12, 80e9, 2.039e12, 8, 300e9, 25e9),
    "l4": Chip(("L4",), 121e12, 24e9, 0.3e12, 8, 32e9, 12.5e9),
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1.228e12, 4096, 300e9, 300e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.819e12, 256, 200e9, 3.125e9),
    "v5p": Chip(("TPU v5",), 459e12, 95 * 2**30, 2.765e12, 8960, 600e9, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1.638e12, 256, 400e9, 12.5e9),
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a `device.device_kind`, the one with the longest name in it; None: it is not in the table."""
    known = [(len(name), chip) for chip in CHIPS.values() for name in chip.kinds if name in kind]
    return max(known, key=lambda found: found[0])[1] if known else None
