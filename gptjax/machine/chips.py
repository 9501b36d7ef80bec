"""Published specifications of chips: peak FLOP/s, memory, links."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of one chip; rates of links are for one direction."""

    kinds: tuple[str, ...]
    """Words in `device.device_kind` that identify the chip."""
    peak_flops: float
    """Dense bfloat16, FLOP/s."""
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes/s."""
    node: int
    """Number of chips that fast links connect: those of a machine, or of a TPU pod."""
    link: float
    """Bytes/s to chips of the same node."""
    network: float
    """Bytes/s to chips of other nodes."""


# Sources: NVIDIA's data sheets (DGX and HGX for nodes and networks), Google's pages "TPU v4" to "TPU v6e".
# - NVIDIA's sheets print FLOP/s with sparsity; the table has half of that.
# - Of rates published for both directions the table has half.
# - Where NVLink does not connect all cards of a machine, `link` is the rate of PCIe x16.
# - Pods of v4 and v5p have more chips than `gptjax plan` supports.
# - H100 NVL: data sheet "NVIDIA H100 NVL" (1,671 TFLOPS with sparsity, 94 GB, 3.9 TB/s). Bridges join pairs only.
# - H200 NVL: nvidia.com/en-us/data-center/h200 (1,671 TFLOPS with sparsity; bridges of 900 GB/s join up to four).
# - GH200: data sheet "NVIDIA GH200 Grace Hopper Superchip", 2705455 (990 TFLOPS dense; 96 GB of HBM3, 4 TB/s).
# - GB200: nvidia.com/en-us/data-center/gb200-nvl72: all 72 GPUs have 360 PFLOPS with sparsity, 13.4 TB, 576 TB/s.
CHIPS = {
    "h100": Chip(("H100",), 989e12, 80e9, 3.35e12, 8, 450e9, 50e9),
    "h100-pcie": Chip(("H100 PCIe",), 756e12, 80e9, 2.0e12, 8, 64e9, 50e9),
    "h100-nvl": Chip(("H100 NVL",), 835e12, 94e9, 3.9e12, 8, 64e9, 50e9),
    "h200": Chip(("H200",), 989e12, 141e9, 4.8e12, 8, 450e9, 50e9),
    "h200-nvl": Chip(("H200 NVL",), 835e12, 141e9, 4.8e12, 4, 450e9, 50e9),
    "gh200": Chip(("GH200 480GB",), 989e12, 96e9, 4.0e12, 1, 50e9, 50e9),
    "b200": Chip(("B200",), 2250e12, 180e9, 8.0e12, 8, 900e9, 50e9),
    "gb200": Chip(("GB200",), 2500e12, 186e9, 8.0e12, 72, 900e9, 50e9),
    "a100": Chip(("A100",), 312e12, 80e9, 2.039e12, 8, 300e9, 25e9),
    "a100-pcie": Chip(("A100 80GB PCIe",), 312e12, 80e9, 1.935e12, 8, 32e9, 25e9),
    "a100-40gb": Chip(("A100-SXM4-40GB", "A100-SXM-40GB"), 312e12, 40e9, 1.555e12, 8, 300e9, 25e9),
    "a100-40gb-pcie": Chip(("A100-PCIE-40GB",), 312e12, 40e9, 1.555e12, 8, 32e9, 25e9),
    "l4": Chip(("L4",), 121e12, 24e9, 0.3e12, 8, 32e9, 12.5e9),
    "l40": Chip(("L40",), 181e12, 48e9, 0.864e12, 8, 32e9, 12.5e9),
    "l40s": Chip(("L40S",), 362e12, 48e9, 0.864e12, 8, 32e9, 25e9),
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1.228e12, 4096, 300e9, 300e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.819e12, 256, 200e9, 3.125e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2.765e12, 8960, 600e9, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1.638e12, 256, 400e9, 12.5e9),
}


def chip_of(kind: str) -> Chip | None:
    """Returns the chip that `device.device_kind` names; names are matched as whole words, and the longest match counts.

    Returns None for chips that are not in the table (an L400 is not an L4) and for partitions of a chip (MIG).
    """
    if " MIG " in f" {kind} ":
        return None
    known = [(len(name), chip) for chip in CHIPS.values() for name in chip.kinds if _has_words(kind, name)]
    return max(known, key=lambda found: found[0])[1] if known else None


def _has_words(kind: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", kind) is not None
