"""Folders and files that are written whole or not at all: under a hidden name beside their own, renamed at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path as File
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hasten.core.errors import ConfigError


@contextmanager
def whole_folder(folder: File, mark: str) -> Iterator[File]:
    """A hidden folder that takes the place of ``folder`` at the end.

    Args:
        mark: A file that says that ``folder`` may be replaced; without it, it must be missing or empty.

    Raises:
        ConfigError: If ``folder`` holds something else, or cannot be written, such as on a full disk.
    """
    recover(folder)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; choose another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise ConfigError(f"{folder} is not empty and has no {mark}, so it is not replaced; choose another folder.")
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        for left in (partial, old):  # by a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        if folder.exists():  # a rename cannot replace a full folder: set the old one aside first
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:  # an interrupt too leaves nothing half-written
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)
        explain(error, folder)
        raise


@contextmanager
def whole_file(file: File) -> Iterator[File]:
    """A hidden file that takes the place of ``file`` at the end. Raises ConfigError as :func:`whole_folder` does."""
    rank = os.environ.get("RANK", "")  # under torchrun each rank writes a partial file of its own
    partial = file.with_name(f".partial{rank}-{file.name}")  # with the suffix, which some writers append otherwise
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        explain(error, file)
        raise


def write(file: File | str, save: Callable[[File], Any]) -> None:
    """Let ``save`` write a file by :func:`whole_file`."""
    with whole_file(File(file)) as partial:
        save(partial)


def write_tensors(file: File, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file by :func:`whole_file`; tensors that share memory are stored one by one."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    seen: set[int] = set()
    for k, v in plain.items():  # the format refuses shared memory
        place = v.untyped_storage().data_ptr()
        plain[k] = v.clone() if place in seen or v.untyped_storage().nbytes() > v.nbytes else v
        seen.add(place)
    write(file, lambda partial: save_file(plain, partial))


def recover(folder: File) -> None:
    """Put back the folder that was set aside when its writer was killed between its two renames."""
    old = folder.parent / f".{folder.name}.old"  # "." has no name
    if old.is_dir() and not folder.exists():
        with suppress(FileNotFoundError):  # another rank was first
            os.replace(old, folder)


def sync(file: File) -> None:
    """Flush a file to the disk, so that a rename never precedes its content."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def explain(error: BaseException, place: File) -> None:
    """Raise ConfigError in place of an error of the file system; safetensors reports its own as text."""
    code = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(code[1]) if code else error.errno if isinstance(error, OSError) else None
    if number is None:
        return
    why = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number)
    raise ConfigError(
        f"Cannot write {place}: {why}; nothing was left there. Free it, or choose another place."
    ) from error
