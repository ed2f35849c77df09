"""Folders and files that are written whole or not at all: under a hidden name beside their own, renamed at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as File

from safetensors import SafetensorError

from hasten.core.errors import ConfigError
from hasten.distribute import recover, sync


@contextmanager
def whole_folder(folder: File, mark: str) -> Iterator[File]:
    """A hidden folder that takes the place of ``folder`` at the end.

    Args:
        mark: A file that says that ``folder`` may be replaced; without it, it must be missing or empty.

    Raises:
        ConfigError: If ``folder`` holds something else, or cannot be written, such as on a full disk.
    """
    recover(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file()):
        raise ConfigError(f"{folder} holds something else than an exported student; choose another folder.")
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
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        explain(error, file)
        raise


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
