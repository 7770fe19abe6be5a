"""What a file may make its reader do: memory and time stay within a few times its size, whoever wrote it.

A dump is untrusted. `check_pt` looks at a .pt before torch does: torch inflates what is compressed, and takes any
pickle of functions it knows, however often that copies or hashes the same part. `check_contents` looks at what a file
of any kind held: parts that are referred to many times, and tensors with more elements than the file has bytes.
"""

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from kda_kernels.errors import InputError

_TIMES = 8  # parts may be shared: as often as this on average
_FREE = 1 << 20  # bytes that need no account
_DEPTH = 32

# What torch.save writes for dense tensors and plain values, beside storages and dtypes. torch itself admits more, such
# as functions that allocate as much as a number says.
_GLOBALS = (
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
)
_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")


def check_pt(path: Path) -> None:
    """Raises `InputError` if `path` is no whole zip file as torch.save writes it, of tensors and plain values.

    Damage raises what zipfile and pickletools make of it. torch checks no checksum of what it maps, and finds entries
    by the directory at the end of the file: it must be where zipfile finds it too.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith(b"PK"):
            raise InputError(
                f"{path} is not a zip file as torch.save writes (older formats cannot be mapped: save again)"
            )
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if packed := next((info for info in infos if info.compress_type != zipfile.ZIP_STORED), None):
            raise InputError(f"{path}: {packed.filename} is compressed, which torch.save never does: save it again")
        if sum(info.file_size for info in infos) > size or not _ends_with_directory(path, size, archive.start_dir):
            raise zipfile.BadZipFile("its directory and its size do not agree")
        pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path} is a zip file but not one that torch.save wrote: it has no data.pkl")
        check_pickle(archive.read(pickles[0]), path)
        for info in infos:
            archive.open(info).close()  # compares the entry's own header with the directory


def _ends_with_directory(path: Path, size: int, start: int) -> bool:
    """Whether the directory that starts at `start` reaches to the records that end the file, and those to its end."""
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        wide, locator, plain = struct.unpack("<56s20s22s", file.read().rjust(98, b"\0"))
    length, offset, comment = struct.unpack("<12xIIH", plain)
    end = size - 22
    if locator.startswith(b"PK\x06\x07"):
        length, offset = struct.unpack("<40xQQ", wide)
        end = size - 98
        if struct.unpack("<8xQ4x", locator)[0] != end or not wide.startswith(b"PK\x06\x06"):
            return False
    return plain.startswith(b"PK\x05\x06") and not comment and offset == start and offset + length == end


def check_pickle(data: bytes, path: Path) -> None:
    """Raises `InputError` if a pickle holds more than tensors and plain values, or copies or hashes one part too often.

    Goes through it as torch will, with sizes in the place of objects: a tuple is as large as all that it holds.
    """
    stack: list[list[int]] = []
    memo: dict[int, list[int]] = {}
    marks: list[int] = []
    work = 0
    arg: Any
    for op, arg, _ in pickletools.genops(data):
        if op.name == "GLOBAL" and not _is_plain(arg):
            name = arg.replace(" ", ".").removeprefix("builtins.")[:80]
            only = "a dump may hold tensors and plain values only, and only dense tensors"
            raise InputError(f"{path} holds a pickled {name}: {only}")
        if op.name == "MARK":
            marks.append(len(stack))
        elif op.name.endswith("PUT"):
            memo[arg] = stack[-1]
        elif op.name.endswith("GET"):
            stack.append(memo[arg])
        else:
            needs = op.stack_before
            first = len(stack) - len(needs)
            if pickletools.markobject in needs:
                first = marks.pop() - needs.index(pickletools.markobject)
            if first < 0:
                raise ValueError("its pickle takes more than it put")
            parts = stack[first:]
            del stack[first:]
            made = parts.pop(0) if op.name in _IN_PLACE else [1]
            grown = sum(part[0] for part in parts)
            made[0] += grown
            work += grown
            if work > _TIMES * len(data) + _FREE:
                raise InputError(f"{path} is not as torch.save writes: its pickle copies the same parts over and over")
            stack += [made] * len(op.stack_after)


def _is_plain(name: str) -> bool:
    if name in _GLOBALS:
        return True
    module, _, thing = name.partition(" ")
    found = vars(torch).get(thing) if module == "torch" else None
    return isinstance(found, torch.dtype) or (isinstance(found, type) and thing.endswith("Storage"))


def check_contents(tree: Any, path: Path) -> None:
    """Raises `InputError` if what a file held is much larger than the file; a shared part counts each time.

    So whoever goes through all of it, or reads every tensor, does work in proportion to the file.
    """
    size = path.stat().st_size
    left = _TIMES * size + _FREE
    todo = [(tree, 0)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict | list | tuple):
            left -= len(value)
        elif isinstance(value, torch.Tensor):
            left -= value.numel() * value.element_size()
        elif isinstance(value, str):
            left -= len(value)
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise InputError(f"{path} holds text that is no Unicode: {value[:40]!a}")
        if left < 0:
            raise InputError(
                f"{path} has {size} bytes and holds far more in shared parts or tensors without memory of their own: "
                "save tensors as .contiguous()"
            )
        if depth > _DEPTH:
            raise InputError(
                f"{path} is nested more than {_DEPTH} levels deep: it should hold a dict of tensors by name"
            )
        if isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            todo += [(part, depth + 1) for part in value]
