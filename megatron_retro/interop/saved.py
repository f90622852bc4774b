"""Files of `torch.save`, read without running what they say.

Such a file is a zip archive of one pickle and of the bytes of each storage. A pickle is a program: it names classes and
functions of any module and calls them. Here it gets an inert object for whatever it names, so nothing of its choice is
imported, called or changed; containers, numbers and text are as they were, and a tensor becomes the place of its bytes.
"""

import mmap
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from megatron_retro.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# What pickles and archives raise when they are damaged, or made to harm.
_DAMAGE: tuple[type[Exception], ...] = (pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, EOFError)
_DAMAGE += (OSError, RecursionError, MemoryError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_DTYPES = dict(Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64", Int="int32")
_DTYPES |= dict(Short="int16", Char="int8", Byte="uint8", Bool="bool")
_BYTES = dict(float64=8, float32=4, float16=2, bfloat16=2, int64=8, int32=4, int16=2, int8=1, uint8=1, bool=1)


class Inert:
    """Stands for an object of a class that is not read; its class and what it was made of are forgotten."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any): ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


class Values:
    """Stands for an `argparse.Namespace`: `vars()` are its values."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file, first: its storage's bytes begin there.
        dtype: torch's name of it.
        offset, shape, stride: in the storage, in numbers.
    """

    file: pathlib.Path
    first: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> "Tensor":
        """Its numbers, mapped: they take memory while they are looked at."""
        import torch

        dtype = getattr(torch, self.dtype)
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=dtype)
        begin = self.first + self.offset * dtype.itemsize
        page = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = _span(self.shape, self.stride) * dtype.itemsize
        with self.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), begin - page + length, access=mmap.ACCESS_COPY, offset=page)
        return torch.frombuffer(mapped, dtype=dtype, offset=begin - page).as_strided(self.shape, self.stride)


class _Storage(NamedTuple):
    key: str
    dtype: str
    length: int


def read(path: pathlib.Path) -> Any:
    """The object that a file holds, tensors as `Stored`, what is neither data nor a tensor as `Inert`.

    Raises:
        UserError: the file is damaged, or in no format that this reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError("there is no data.pkl in it")
            places = _Places(path, archive, pickled.removesuffix("data.pkl") + "data/")
            with archive.open(pickled) as file:
                return _Unpickler(file, places).load()
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as a file of torch.save ({reason}); restore it") from None


class _Places:
    """Where the storages of an archive lie."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile, folder: str):
        self._path, self._archive, self._folder = path, archive, folder
        self._first: dict[str, int] = {}

    def of(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Stored:
        """A tensor, if all its numbers lie in the storage."""
        if storage.key not in self._first:
            entry = self._archive.getinfo(self._folder + storage.key)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < storage.length * _BYTES[storage.dtype]:
                raise ValueError(f"storage {storage.key} is cut short")
            with self._archive.open(entry):  # checks the entry's own header
                self._first[storage.key] = first = _content_of(self._path, entry)
            if first + entry.file_size > self._path.stat().st_size:
                raise ValueError(f"storage {storage.key} reaches out of the file")
        whole = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *stride))
        if (
            not whole
            or len(shape) != len(stride)
            or (0 not in shape and offset + _span(shape, stride) > storage.length)
        ):
            raise ValueError(f"a tensor {list(shape)} reaches out of its storage")
        return Stored(self._path, self._first[storage.key], storage.dtype, offset, shape, stride)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], places: _Places):
        super().__init__(file, encoding="utf-8", errors="replace")
        self._places = places

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("argparse", "Namespace"):
            return Values
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name.endswith("Storage"):
            return _DTYPES.get(name.removesuffix("Storage"), name)
        return Inert

    def persistent_load(self, saved: Any) -> Any:
        _, dtype, key, _, length = saved
        return _Storage(str(key), str(dtype), int(length))

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> Any:
        if storage.dtype not in _DTYPES.values():
            return Inert()
        return self._places.of(storage, offset, tuple(shape), tuple(stride))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Numbers from a tensor's first to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _content_of(path: pathlib.Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its own header, whose name and extra field are of lengths of their own."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
