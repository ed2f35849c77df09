"""Videos and moving pictures, frame by frame: PyAV reads the former, PIL the latter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.core.errors import ConfigError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def is_video(file: Any) -> bool:
    """Whether a file is one for PyAV, by its suffix."""
    return isinstance(file, Path) and file.suffix.lower() in VIDEOS


@contextmanager
def stream(file: Path) -> Iterator[tuple[Any, Any]]:
    """A video's container and its first stream of pictures.

    Raises:
        ConfigError: Where PyAV is not installed, or the file is corrupt or has no pictures.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ConfigError(f"Reading {file.name} needs PyAV: pip install av (or give moving .gif or .webp).") from error
    try:
        with av.open(str(file)) as opened:
            if not opened.streams.video:
                raise ConfigError(f"The video {str(file)!r} has no pictures; remove it.")
            yield opened, opened.streams.video[0]
    except FFmpegError as error:
        raise ConfigError(f"Cannot read the video {str(file)!r} ({error.strerror}); repair it.") from error


def size(file: Path) -> tuple[int, int]:
    """(height, width) of a video, from its head. Raises ConfigError as :func:`stream`."""
    with stream(file) as (_, pictures):
        return pictures.height, pictures.width


def length(file: Path) -> int:
    """Frames of a video, without decoding them. Raises ConfigError as :func:`stream`."""
    with stream(file) as (opened, pictures):
        return sum(packet.size > 0 for packet in opened.demux(pictures))


def middle(file: Path, count: int) -> list[Any]:
    """The ``count`` frames in the middle of a video, one after the other, as pictures of PIL.

    Raises:
        ConfigError: As :func:`stream`, and for a video of fewer frames.
    """
    first = start(length(file), count, file.name)
    with stream(file) as (opened, pictures):
        found = [frame.to_image() for frame in islice(opened.decode(pictures), first, first + count)]
    start(first + len(found), first + count, file.name)  # fewer can be decoded than are there
    return found


def start(there: int, count: int, name: str) -> int:
    """The first of the ``count`` frames in the middle. Raises ConfigError for too few."""
    if there < count:
        raise ConfigError(
            f"{name} has {there} frame{'s' * (there != 1)}, and the pipeline's videos have {count}; give longer clips, "
            "or ask the pipeline for fewer frames (num_frames)."
        )
    return (there - count) // 2
