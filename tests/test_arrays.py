"""Arrays on disk: they are read back as written, with and without direct access."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from gptjax.checkpoints import direct
from gptjax.checkpoints.arrays import checkpointer, restore, start_saving
from gptjax.checkpoints.direct import read_direct, write_direct

SIZES = [0, 1, 4095, 4096, 4097, 2**22, 2**22 + 4096 + 3]


def random_bytes(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def refuse_to_open(monkeypatch):
    """Behaves like a file system without direct access."""
    real = os.open

    def open_file(path, flags, mode=0o777, **more):
        if flags & direct._DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", open_file)


def refuse_to_transfer(monkeypatch):
    """Behaves like a file system with larger blocks."""
    for name in ("write", "readv"):
        real = getattr(os, name)

        def transfer(file, data, real=real):
            if direct._is_direct(file):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(file, data)

        monkeypatch.setattr(os, name, transfer)


@pytest.mark.parametrize("refuse", [None, refuse_to_open, refuse_to_transfer])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_read_as_written(tmp_path, monkeypatch, size, refuse):
    if refuse:
        refuse(monkeypatch)
    content = random_bytes(size)
    write_direct(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content.tobytes()
    assert b"".join(bytes(piece) for piece in read_direct(tmp_path / "file")) == content.tobytes()


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_direct(tmp_path / "file", random_bytes(5))
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_is_an_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            direct._write(file, memoryview(b"x"))
    finally:
        os.close(file)


def save_and_load(folder, items, reader=None):
    writer = checkpointer()
    start_saving(writer, folder, items)
    writer.wait_until_finished()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), items)
    return restore(reader or writer, folder, shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
def test_every_dtype_and_shape_is_restored(tmp_path, dtype):
    values = jnp.asarray(np.random.default_rng(0).normal(0, 10, (3, 5, 7)).astype(jnp.dtype(dtype)))
    items = {"params": {"cube": values, "scalar": values[0, 0, 0], "row": values[0, 0]}}
    jax.tree.map(np.testing.assert_array_equal, save_and_load(tmp_path / "saved", items), items)


@pytest.mark.parametrize(("writes", "reads"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_arrays_of_one_platform_are_read_on_another(tmp_path, monkeypatch, writes, reads):
    monkeypatch.setattr(jax, "default_backend", lambda: reads)
    reader = checkpointer()
    monkeypatch.setattr(jax, "default_backend", lambda: writes)
    items = {"params": {"w": jnp.arange(12.0).reshape(3, 4)}, "rest": {"step": jnp.int32(7)}}
    loaded = save_and_load(tmp_path / "saved", items, reader)
    jax.tree.map(np.testing.assert_array_equal, loaded, items)
    assert (tmp_path / "saved" / "params" / "manifest.ocdbt").exists() == (writes == "gpu")


def test_the_arrays_are_standard_zarr(tmp_path):
    value = jnp.arange(60.0).reshape(3, 4, 5)
    writer = checkpointer()
    start_saving(writer, tmp_path / "saved", {"params": {"layer": {"weight": value}}})
    writer.wait_until_finished()
    writer.close()
    store = {"driver": "file", "path": str(tmp_path / "saved" / "params" / "layer.weight")}
    read = tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()
    np.testing.assert_array_equal(read, value)
