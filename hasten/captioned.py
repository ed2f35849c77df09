"""Pictures and videos with captions, of any sizes, and the buckets in which they are trained without distortion."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten import clips
from hasten.core.errors import ConfigError
from hasten.data import SUFFIXES, _first_line, _plain
from hasten.models.encode import rows_in
from hasten.prompts import column_of, read_rows, read_text, split_column, text_of
from hasten.whole import write_tensors

TABLES = ("metadata.jsonl", "metadata.csv")  # the names of Hugging Face's imagefolder
ORIENTATION = 0x0112  # the EXIF tag
Size = tuple[int, int]  # (height, width) in pixels
SHARD = 64  # latents a file


@dataclass(frozen=True, eq=False)  # equality of arrays is no truth value
class Captions:
    """Pictures, read only when asked for, and the caption of each.

    Args:
        pictures: N files, or an array [N, H, W, 3] uint8.
        captions: N texts.
        name: What to call the set in messages and reports.
    """

    pictures: Sequence[Path] | np.ndarray
    captions: Sequence[str]
    name: str = "pictures"

    def __len__(self) -> int:
        return len(self.captions)

    def size(self, i: int) -> Size:
        """(height, width) of picture ``i`` as a person sees it, from the file's head alone.

        Raises:
            ConfigError: If the file is no picture.
        """
        file = self.pictures[i]
        return clips.size(file) if clips.is_video(file) else self._read(i, _size)  # type: ignore[arg-type]

    def length(self, i: int) -> int:
        """Frames of video or picture ``i``; one of a picture that does not move."""
        file = self.pictures[i]
        if clips.is_video(file):
            return clips.length(file)  # type: ignore[arg-type]
        return self._read(i, lambda picture: getattr(picture, "n_frames", 1))

    def load(self, i: int, size: Size) -> Tensor:
        """Picture ``i`` as float32 [3, H, W] in [-1, 1]: its central part of the shape of ``size`` = (H, W), resized.

        One antialiased bicubic resize with the same scale along both axes, from a box that need not end at a pixel:
        no shape is distorted, and a picture of the ratio H : W is not cropped at all. Transparency becomes white.

        Raises:
            ConfigError: If the file is corrupt, a video, or no picture of 8 bits a channel.
        """
        if clips.is_video(self.pictures[i]):
            raise ConfigError(f"{self.pictures[i].name} is a video, and this pipeline makes pictures; remove it.")  # type: ignore[union-attr]
        return resized(self._read(i, _upright), size)

    def clip(self, i: int, size: Size, count: int) -> Tensor:
        """The ``count`` frames in the middle of video ``i``, one after the other: [3, F, H, W], each as ``load``.

        Raises:
            ConfigError: If the file is corrupt, or has fewer frames.
        """
        file = self.pictures[i]
        if clips.is_video(file):
            frames = clips.middle(file, count)  # type: ignore[arg-type]
        else:
            first = clips.start(self.length(i), count, getattr(file, "name", f"number {i}"))

            def seek(picture: Any) -> list[Any]:
                return [picture.seek(first + k) or _upright(picture) for k in range(count)]

            frames = self._read(i, seek)
        return torch.stack([resized(frame, size) for frame in frames], 1)

    def _read(self, i: int, what: Callable[[Any], Any]) -> Any:
        from PIL import Image

        if isinstance(self.pictures, np.ndarray):
            return what(Image.fromarray(self.pictures[i]))
        file = self.pictures[i]
        try:
            with Image.open(file) as picture:
                return what(picture)
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... on corrupt files
            raise ConfigError(f"Cannot read the image {str(file)!r} ({_first_line(error)}); repair it.") from error


def resized(picture: Any, size: Size) -> Tensor:
    """A picture of PIL as float32 [3, H, W] in [-1, 1]; see :meth:`Captions.load`."""
    from PIL import Image

    if min(size) < 1:
        raise ConfigError(f"A picture's size must be at least (1, 1), not {size}.")
    box = crop((picture.height, picture.width), size)
    picture = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1).div_(127.5).sub_(1).contiguous()


def load_captioned(source: str | Path, column: str | None = None) -> Captions:
    """The captioned pictures or videos of a folder, or the pictures of an .npz file.

    A folder, with its sub-folders, holds images (or videos, and moving .gif, .png and .webp) and either
    ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face's imagefolder: ``file_name`` beside a caption, which
    :data:`hasten.prompts.COLUMNS` names), or beside every image a .txt file of the same stem. An .npz file holds
    ``images`` [N, H, W, 3] uint8 and ``captions`` [N]. An image that the table names twice counts twice, with each of
    its captions.

    Args:
        column: The table's column of captions, where it has another name; ``FOLDER:COLUMN`` says the same.

    Raises:
        ConfigError: Without images, for images without captions (how many, and the first), and for a table that
            cannot be read or names an image that is not there.
    """
    source, column = split_column(str(source), column, os.path.exists)
    path = Path(source).expanduser()
    if path.is_dir():
        found = _folder(path, column)
    elif path.is_file() and path.suffix.lower() == ".npz":
        found = _arrays(path)
    else:
        raise ConfigError(f"No captioned images at {str(source)!r}; name a folder or an .npz file.")
    without = [i for i, caption in enumerate(found.captions) if not caption]
    if without:
        first = f"number {without[0]}" if isinstance(found.pictures, np.ndarray) else found.pictures[without[0]].name
        raise ConfigError(
            f"{found.name}: {len(without)} of {len(found)} images have no caption (first: {first}); write a .txt file "
            f"beside each or name it in {TABLES[0]}, or remove them."
        )
    return found


def _folder(folder: Path, column: str | None) -> Captions:
    inside = (p for p in sorted(folder.rglob("*")) if not any(part[0] == "." for part in p.relative_to(folder).parts))
    images = [p for p in inside if p.suffix.lower() in (*SUFFIXES, *clips.VIDEOS) and p.is_file()]
    if not images:
        raise ConfigError(f"The folder {str(folder)!r} holds no images ({', '.join(SUFFIXES[:4])}, ...).")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) == 2:
        raise ConfigError(f"The folder {str(folder)!r} has {' and '.join(TABLES)}; keep one of the two.")
    if not tables:
        beside = [image.with_suffix(".txt") for image in images]
        captions = [" ".join(read_text(p).split()) if p.is_file() else "" for p in beside]
        return Captions(images, captions, folder.resolve().name)
    files, captions, table, key = [], [], tables[0].name, None
    for place, row in read_rows(tables[0]):
        key = key or column_of(row, table, column, str(folder))
        files.append(folder / text_of(row, "file_name", table, place))
        captions.append(text_of(row, key, table, place).strip())
        if not files[-1].is_file():
            raise ConfigError(f"{table}, {place}: there is no image {row['file_name']!r}; remove the line or add it.")
    rest = sorted({*images} - {*files})
    return Captions(files + rest, captions + [""] * len(rest), folder.resolve().name)


def _arrays(path: Path) -> Captions:
    name = path.name
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, arrays = file.files, [file[key] for key in ("images", "captions") if key in file.files]
    except Exception as error:  # as in hasten.data: numpy and zipfile raise half a dozen types
        raise ConfigError(f"Cannot read {name}: {_first_line(error)}.") from error
    if len(arrays) < 2:
        raise ConfigError(f"{name} has the keys {', '.join(keys) or '(none)'}; images and captions are needed.")
    images, captions = arrays
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise ConfigError(f"{name}: images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}.")
    if captions.dtype.kind != "U" or captions.shape != (len(images),):
        found = f"{captions.dtype} {list(captions.shape)}"
        raise ConfigError(f"{name}: {len(images)} images need as many captions of text, not {found}.")
    return Captions(images, [str(caption).strip() for caption in captions], name)


def crop(size: Size, target: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): the largest central box in a picture of ``size`` with the ratio of ``target``."""
    (h, w), (height, width) = size, target
    left = (w - min(w, h * width / height)) / 2
    top = (h - min(h, w * height / width)) / 2
    return left, top, w - left, h - top


def buckets(sizes: Sequence[Size] | None, area: int, step: int, max_ratio: float = 2.0) -> list[Size]:
    """The sizes (H, W) in which pictures of ``sizes`` are trained: multiples of ``step`` with about ``area`` pixels.

    The short side runs over the multiples of ``step``, the long one is the nearest multiple to area / short; so no
    bucket's area is off by more than 1.25 step / sqrt(area) of itself. Idea: NovelAI's aspect ratio bucketing (2022).

    Args:
        sizes: (height, width) of the pictures; buckets that are nearest to none are left out. None keeps all.
        area: Pixels, at least ``step`` squared.
        step: What height and width must be divisible by: the VAE's factor times the patch size.
        max_ratio: The largest long side : short side; a picture that is longer goes into the longest bucket.
    """
    if step < 1 or area < step**2 or not max_ratio >= 1:
        found = f"step {step}, area {area}, max_ratio {max_ratio:g}"
        raise ConfigError(f"Buckets need step >= 1, area >= step squared and max_ratio >= 1, not {found}.")
    root = math.sqrt(area)
    square = step * round(root / step)
    pairs = [(short, step * round(area / short / step)) for short in range(step, int(root) + 1, step)]
    flat = {(square, square)} | {pair for pair in pairs if pair[1] <= max_ratio * pair[0]}
    every = sorted(flat | {(w, h) for h, w in flat})
    return every if sizes is None else sorted({nearest(size, every) for size in sizes})


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket that crops least off a picture of ``size``: a share 1 - exp(-|difference of their log ratios|)."""
    if not buckets:
        raise ConfigError("There are no buckets to choose from.")
    return min(buckets, key=lambda b: abs(math.log(size[0] / size[1]) - math.log(b[0] / b[1])))


def grouped(pictures: Captions, sizes: Sequence[Size]) -> list[list[int]]:
    """Which pictures go into each of these sizes: those whose nearest ratio it has."""
    groups: list[list[int]] = [[] for _ in sizes]
    for i in range(len(pictures)):
        groups[sizes.index(nearest(pictures.size(i), sizes))].append(i)
    return groups


def encode_pictures(
    vae: Any, where: Any, pictures: Captions, group: Sequence[int], folder: Path, tell: Callable[[int, int], None]
) -> Path:
    """x0 of these pictures as ``latents-*.safetensors`` in ``folder``; whole shards that are there are kept.

    Args:
        where: The :class:`hasten.models.latents.Layout` of the size.
        folder: For these very pictures, whose :func:`content` its name should have.
    """
    device, (*frames, h, w) = next(vae.parameters()).device, where.pixels[1:]
    load = lambda i: pictures.clip(i, (h, w), *frames) if frames else pictures.load(i, (h, w))  # noqa: E731
    for k, start in enumerate(range(0, len(group), SHARD)):
        file = folder / f"latents-{k:05d}.safetensors"
        some = group[start : start + SHARD]
        if rows_in(file) != len(some):
            rows = [where.encode(vae, load(i)[None].to(device)).float().cpu() for i in some]
            write_tensors(file, {"x0": torch.cat(rows)})
        tell(start + len(some), len(group))
    return folder


def content(
    pictures: Captions, group: Sequence[int], tell: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """A hash of these pictures in turn, in hexadecimal: of every byte of them; names and times of files do not matter.

    Args:
        tell: Called with (read, wanted), before every picture and at the end.

    Raises:
        ConfigError: If a file cannot be read.
    """
    found = hashlib.sha256()
    for done, i in enumerate(group):
        tell(done, len(group))
        if isinstance(pictures.pictures, np.ndarray):
            found.update(hashlib.sha256(pictures.pictures[i].tobytes()).digest())
            continue
        try:
            with open(pictures.pictures[i], "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"Cannot read the image {str(pictures.pictures[i])!r} ({error.strerror}).") from error
    tell(len(group), len(group))
    return found.hexdigest()


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    return _plain(ImageOps.exif_transpose(picture)).convert("RGB")


def _size(picture: Any) -> Size:
    sideways = picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # height and width are exchanged
    return picture.size if sideways else picture.size[::-1]
