"""Tensors of files that PyTorch saved, read without PyTorch and without running what is in them."""

from collections import OrderedDict
import io
import math
import pickle
from typing import Any, NamedTuple
import zipfile

import numpy as np

# How files start that PyTorch wrote before version 1.6: this number, by pickle.
MAGIC = 0x1950A86A20F9469CFC6C
# Of storages; ml_dtypes, which JAX imports, adds bfloat16 to numpy's.
DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class RefusedError(Exception):
    """A pickle that asks for more than tensors and containers."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2`.

    An object without attributes, so that a pickle cannot set any: a class or function could be
    changed for all that come after it.
    """

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    """Loads what `torch.save` wrote; `storages` are those that its tensors name."""

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or dtype not in DTYPES.values() or any(view):
            raise ValueError(f"it names {pid!r:.80}")
        storage = _Storage(str(key), np.dtype(dtype), int(size))
        return self.storages.setdefault(storage.key, storage)


def read(path: str) -> dict[str, np.ndarray]:
    """Return the tensors of a state dictionary that `torch.save` wrote, by name.

    Args:
      path: A zip archive, or a file from before PyTorch 1.6.

    Raises:
      RefusedError: If it names anything but tensors and containers; nothing of it is run.
      Exception: Of any kind, if it is damaged or is no such file.
    """
    found, storages = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("it holds no dictionary of tensors by name")
    return {name: _array(name, tensor, storages) for name, tensor in found.items()}


def _read_legacy(path: str) -> tuple[Any, dict[str, bytes]]:
    with open(path, "rb") as file:
        magic, version, info = (_Unpickler(file).load() for _ in range(3))
        if magic != MAGIC or version != 1001 or not info["little_endian"]:
            raise ValueError("it does not start as such files do")
        unpickler = _Unpickler(file)
        found, keys = unpickler.load(), _Unpickler(file).load()
        storages = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            storages[key] = file.read(count * unpickler.storages[key].dtype.itemsize)
        return found, storages


def _read_zip(path: str) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (main,) = (name for name in names if name.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(main)))
        found = unpickler.load()
        return found, {key: archive.read(f"{folder}data/{key}") for key in unpickler.storages}


def _array(name: str, tensor: Any, storages: dict[str, bytes]) -> np.ndarray:
    if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
        raise ValueError(f"{name} is no tensor, but {tensor!r:.80}")
    storage, offset, shape, strides = tensor
    count = len(storages[storage.key]) // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # numpy trusts what it is told of memory.
    inside = min(offset, *shape, *strides, 0) == 0 and (last < count or 0 in shape)
    if not inside or count < storage.size or math.prod(shape) > count:
        raise ValueError(f"{name} reaches beyond its bytes")
    flat = np.frombuffer(storages[storage.key], storage.dtype, count)[offset:]
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()
