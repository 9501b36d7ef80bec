"""The files of a Hugging Face model folder: JSON and safetensors."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    """Reads one JSON object.

    Raises:
        UserError: The file does not exist or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes JSON as transformers does, indented by two spaces."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(hf_dir: Path) -> dict:
    """Returns a model folder's config.json.

    Raises:
        UserError: There is no such folder or file.
    """
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such folder; give one that holds config.json and {WEIGHTS}")
    if not (hf_dir / "config.json").is_file():
        raise UserError(f"{hf_dir}: no Hugging Face model folder (it has no config.json)")
    return read_json(hf_dir / "config.json")


@contextmanager
def open_tensors(hf_dir: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]]:
    """Opens model.safetensors, or the parts that its index names, without reading the tensors.

    Yields:
        `(shapes, read)`: the shape of each tensor by name, and a function that reads one, in the dtype of the file.

    Raises:
        UserError: A file is missing or damaged.
    """
    with ExitStack() as stack:
        files = {}
        for path in _weight_files(hf_dir):
            try:
                file = stack.enter_context(safe_open(path, "numpy"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read: {error}") from None
            files |= dict.fromkeys(file.keys(), file)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
        yield shapes, lambda name: files[name].get_tensor(name)


def write_tensors(hf_dir: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 0) -> None:
    """Writes model.safetensors, or with `shard_bytes` several parts of at most this size and an index.

    Memory holds the tensors of one part. A tensor larger than `shard_bytes` is written as a separate part.
    """
    parts: list[list[str]] = []
    total, part, size = 0, dict[str, np.ndarray](), 0

    def write_part():
        # transformers requires this metadata.
        save_file(part, hf_dir / f"part-{len(parts)}", {"format": "pt"})
        parts.append(list(part))

    for name, tensor in tensors:
        if part and shard_bytes and size + tensor.nbytes > shard_bytes:
            write_part()
            part, size = {}, 0
        part[name] = np.ascontiguousarray(tensor)
        total, size = total + tensor.nbytes, size + tensor.nbytes
    write_part()
    if len(parts) == 1:
        (hf_dir / "part-0").rename(hf_dir / WEIGHTS)
        return
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for i, file in enumerate(files):
        (hf_dir / f"part-{i}").rename(hf_dir / file)
    weight_map = {name: file for names, file in zip(parts, files, strict=True) for name in names}
    write_json(hf_dir / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def make_empty_folder(path: Path) -> None:
    """Creates a folder; an existing empty folder is accepted.

    Raises:
        UserError: The folder is not empty or cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make this folder: {error.strerror}") from None
    if found := sorted(path.iterdir()):
        raise UserError(f"{path}: the folder is not empty (it holds {found[0].name}); name another one")


def _weight_files(hf_dir: Path) -> list[Path]:
    if (hf_dir / WEIGHTS).is_file():
        return [hf_dir / WEIGHTS]
    if not (hf_dir / INDEX).is_file():
        old = " pytorch_model.bin is not read: load and save it with transformers once."
        has_old = (hf_dir / "pytorch_model.bin").exists()
        raise UserError(f"{hf_dir}: has neither {WEIGHTS} nor {INDEX}.{old if has_old else ''}")
    weight_map = read_json(hf_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{hf_dir / INDEX}: has no weight_map from tensors to files")
    return [hf_dir / name for name in sorted(set(weight_map.values()))]
