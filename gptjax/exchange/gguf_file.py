"""Reads a GGUF file, the format of llama.cpp: metadata, and tensors of many quantizations, through the gguf package."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open file. Tensors are read one at a time."""

    where: str
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tensor, in NumPy's order of axes."""
    read: Callable[[str], np.ndarray]
    """Returns a tensor by name, dequantized to float32."""


def import_gguf() -> Any:
    """Imports the package gguf.

    Raises:
        UserError: The package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf; install it with pip install 'gptjax[gguf]'") from None
    return gguf


def open_gguf(path: Path) -> GgufFile:
    """Opens a file and reads its metadata.

    Raises:
        UserError: The file does not exist, is no complete GGUF file, or is split into parts. `read` raises it for a
            quantization that the gguf package cannot dequantize.
    """
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not a complete GGUF file: {error}") from None
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UserError(f"{path}: is one of {parts} parts; merge them with llama-gguf-split --merge first")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            x = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: tensor {name} of type {kind} cannot be dequantized: {error}") from None
        return np.asarray(x, np.float32).reshape(shapes[name])

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    return GgufFile(str(path), metadata, shapes, read)
