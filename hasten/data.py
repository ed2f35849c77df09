"""Data: arrays, folders of images, Hugging Face datasets, the embedded digits, and conditions without data."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from hasten.core.denoiser import Batch, Cond
from hasten.core.errors import ConfigError, unknown

IMAGE_KEYS = ("images", "x_train", "x")
LABEL_KEYS = ("labels", "y_train", "y")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DATASETS = ("digits",)


class Source(Protocol):
    """Where batches come from: one sample's ``shape`` (C, H, W) and the number of ``classes`` (0 unlabelled)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> int: ...

    @property
    def has_data(self) -> bool: ...

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` samples, a pure function of the generator's state; x0 is None where there is no data."""
        ...


def conditions(labels: Tensor | None, classes: int, device: torch.device) -> tuple[Cond, Cond]:
    """(cond, uncond) of labels [n]; the null class is ``classes``, as in ``DiT.null``."""
    if labels is None:
        return {}, {}
    labels = labels.to(device)
    return {"label": labels}, {"label": torch.full_like(labels, classes)}


@dataclass(frozen=True, eq=False)  # equality of tensors is no truth value
class Images:
    """Images ``x`` [N, C, H, W], float32 in [-1, 1], with ``labels`` [N] int64 in [0, classes) or None.

    Args:
        classes: Number of classes; -1 counts them from the labels (largest + 1); 0 without labels.
        name: What to call the set in messages and reports.

    Raises:
        ConfigError: For a wrong shape or dtype, NaN, infinite or out-of-range values, labels of another length
            or outside [0, classes).
    """

    x: Tensor
    labels: Tensor | None = None
    classes: int = -1
    name: str = "images"
    has_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        x, labels, name = self.x, self.labels, self.name
        if x.ndim != 4 or not x.numel():
            raise ConfigError(f"{name}: images must be [N, C, H, W] with N of at least 1, not {list(x.shape)}.")
        if x.dtype != torch.float32:
            raise ConfigError(f"{name}: images must be float32 in [-1, 1], not {x.dtype}.")
        _finite(x, name)
        low, high = float(x.min()), float(x.max())
        if low < -1 or high > 1:
            raise ConfigError(f"{name}: images must lie in [-1, 1], but range from {low:g} to {high:g}; rescale them.")
        if labels is None:
            object.__setattr__(self, "classes", 0)
            return
        if labels.shape != (len(x),):
            raise ConfigError(f"{name}: {len(x)} images need labels of shape [{len(x)}], not {list(labels.shape)}.")
        if labels.dtype != torch.int64:
            raise ConfigError(f"{name}: labels must be int64, not {labels.dtype}.")
        if self.classes < 0:
            object.__setattr__(self, "classes", int(labels.max()) + 1)
        bad = ((labels < 0) | (labels >= self.classes)).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ConfigError(
                f"{name}: label {int(labels[at])} of image {at} is out of range; labels are 0 to {self.classes - 1}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample: (C, H, W)."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` images drawn with replacement from the generator: x0 [n, C, H, W]."""
        device = torch.device(device)
        index = torch.randint(len(self.x), (n,), generator=generator, device=generator.device).to(self.x.device)
        labels = None if self.labels is None else self.labels[index]
        cond, uncond = conditions(labels, self.classes, device)
        return Batch(cond, uncond, (n, *self.shape), self.x[index].to(device), device=device)

    def split(self, fractions: Sequence[float], seed: int = 0) -> tuple[Images, ...]:
        """Disjoint parts of these fractions, each with every class in proportion; the same for the same seed.

        Every image gets the place (rank in its class + offset)/(size of its class), ranks and offsets random;
        sorted by it, every class is spread evenly, so any contiguous piece is stratified to within one image.

        Raises:
            ConfigError: For fractions that are not positive, sum to more than 1, or leave a part empty.
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise ConfigError(f"Split fractions must be positive and sum to at most 1, not {list(fractions)}.")
        generator = torch.Generator().manual_seed(seed)
        labels = torch.zeros(len(self.x), dtype=torch.int64) if self.labels is None else self.labels.cpu()
        place = torch.empty(len(self.x), dtype=torch.float64)
        for label in labels.unique().tolist():
            members = (labels == label).nonzero()[:, 0]
            rank = torch.randperm(len(members), generator=generator).double()
            offset = torch.rand((), generator=generator, dtype=torch.float64)
            place[members] = (rank + offset) / len(members)
        order = place.argsort(stable=True).to(self.x.device)
        parts, start, total = [], 0, 0.0
        for fraction in fractions:
            total += fraction
            stop = round(min(total, 1.0) * len(order))
            if stop == start:
                raise ConfigError(f"{self.name}: a part of {fraction:g} of {len(order)} images is empty; enlarge it.")
            index = order[start:stop].sort().values
            part_labels = None if self.labels is None else self.labels[index]
            parts.append(replace(self, x=self.x[index], labels=part_labels))
            start = stop
        return tuple(parts)


@dataclass(frozen=True)
class Conditions:
    """A source without data, for methods that need none: labels drawn uniformly, x0 is None."""

    shape: tuple[int, ...]
    classes: int = 0
    name: str = "conditions"
    has_data: ClassVar[bool] = False

    @classmethod
    def of(cls, net: Any) -> Conditions:
        """Of a native network's shape and classes."""
        return cls((net.config.channels, *net.config.size), net.config.classes)

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` uniform labels (none for 0 classes) and the samples' shape."""
        device = torch.device(device)
        labels = None
        if self.classes:
            labels = torch.randint(self.classes, (n,), generator=generator, device=generator.device)
        cond, uncond = conditions(labels, self.classes, device)
        return Batch(cond, uncond, (n, *self.shape), device=device)


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None = None, classes: int = -1, name: str = "images"
) -> Images:
    """Images of an array [N, H, W], [N, C, H, W] or [N, H, W, C] (C = 1 or 3 last, when the second axis is neither).

    uint8 becomes x / 127.5 - 1. Floats are taken as they are when some are negative (they must lie in [-1, 1]);
    floats in [0, 1] become 2 x - 1, with a warning that says so. Labels are integers [N] or [N, 1].

    Raises:
        ConfigError: As :class:`Images`, and for other dtypes or ranges.
    """
    array = np.asarray(images)
    if array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or not array.size:
        raise ConfigError(f"{name}: images must be [N, H, W], [N, C, H, W] or [N, H, W, C], not {list(images.shape)}.")
    if array.dtype == np.uint8:
        x = torch.from_numpy(array.astype(np.float32)).div_(127.5).sub_(1)
    elif array.dtype.kind == "f":
        x = torch.from_numpy(array.astype(np.float32))
        _finite(x, name)
        low, high = float(x.min()), float(x.max())
        if low < -1 or high > 1:
            raise ConfigError(
                f"{name}: float images must lie in [-1, 1] or [0, 1], but range from {low:g} to {high:g}; "
                "rescale them, or save them as uint8 in [0, 255]."
            )
        if low >= 0:
            warnings.warn(
                f"{name}: no value is negative, so the images are read as [0, 1] and mapped to [-1, 1].", stacklevel=2
            )
            x = x * 2 - 1
    else:
        raise ConfigError(f"{name}: images must be uint8 or float, not {array.dtype}; convert them with astype.")
    return Images(x.contiguous(), None if labels is None else _labels(labels, name), classes, name)


def digits() -> Images:
    """The 1,797 handwritten 8x8 digits inside scikit-learn (Alpaydin & Kaynak 1998): [1797, 1, 8, 8], 10 classes."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()  # 17 grey levels, 0 to 16
    x = torch.from_numpy(bunch.images.astype(np.float32))[:, None] / 8 - 1
    return Images(x, torch.from_numpy(bunch.target.astype(np.int64)), 10, "digits")


def load(spec: str) -> Images:
    """The images that ``spec`` names: ``digits``, an .npz or .npy file, a folder, or a Hugging Face dataset.

    An .npz holds ``images``, ``x_train`` or ``x``, and optionally ``labels``, ``y_train`` or ``y``. A folder holds
    image files, or one sub-folder of image files per class (classes in alphabetical order). A dataset's first
    image column and first class column of the ``train`` split are taken (needs ``pip install datasets``).

    Raises:
        ConfigError: For anything that is missing, unreadable, ambiguous or out of range; names the culprit.
    """
    if spec == "digits":
        return digits()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if path.suffix.lower() in (".npz", ".npy", *SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec):
        raise ConfigError(f"No data at {spec!r}: there is no such file or folder.")
    return _hub(spec)


def _file(path: Path) -> Images:
    name = path.name
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ConfigError(f"Cannot read {name!r}: data files are .npz or .npy; put image files into a folder.")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return from_arrays(found, name=name)
        with found:
            keys = list(found.files)
            image_key = next((k for k in IMAGE_KEYS if k in keys), None)
            label_key = next((k for k in LABEL_KEYS if k in keys), None)
            if image_key is None:
                raise ConfigError(
                    f"{name} has the keys {', '.join(keys) or '(none)'}; images are looked for "
                    f"under {', '.join(IMAGE_KEYS)}."
                )
            return from_arrays(found[image_key], found[label_key] if label_key else None, name=name)
    except ConfigError:
        raise
    except Exception as error:  # numpy raises ValueError, OSError, EOFError, BadZipFile, zlib.error, UnicodeError, ...
        if "pickle" in str(error).lower():
            raise ConfigError(f"{name} holds pickled objects or is no NumPy file; save a plain array.") from error
        raise ConfigError(f"Cannot read {name}: {_first_line(error)}.") from error


def _folder(path: Path) -> Images:
    from PIL import Image

    loose = _pictures(path)
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    groups = [(p, files) for p in folders if (files := _pictures(p))]
    if loose and groups:
        raise ConfigError(
            f"The folder {str(path)!r} has images beside class folders ({loose[0].name}, {groups[0][0].name}/); "
            "keep one of the two."
        )
    files = loose or [file for _, group in groups for file in group]
    if not files:
        raise ConfigError(f"The folder {str(path)!r} holds no images ({', '.join(SUFFIXES[:4])}, ...).")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                picture.load()
                pictures.append(_plain(picture))
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... on corrupt files
            raise ConfigError(f"Cannot read the image {str(file)!r}; repair or remove it.") from error
        if pictures[-1].size != pictures[0].size:
            (w, h), (w0, h0) = pictures[-1].size, pictures[0].size
            raise ConfigError(f"{str(file)!r} is {w}x{h} but {files[0].name!r} is {w0}x{h0}; resize all to one size.")
    array = _stack(pictures)
    labels = None if loose else np.concatenate([np.full(len(group), i) for i, (_, group) in enumerate(groups)])
    return from_arrays(array, labels, -1 if loose else len(groups), path.resolve().name)


def _pictures(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
    return sorted(p for p in files if not p.name.startswith("."))


def _plain(picture: Any) -> Any:
    """A copy as 8-bit grey or RGB; transparency is laid over white."""
    from PIL import Image

    if picture.mode in ("1", "L"):
        return picture.convert("L")
    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel")
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def _stack(pictures: Sequence[Any]) -> np.ndarray:
    """[N, 1, H, W] uint8 where every picture is grey, else [N, 3, H, W]."""
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    array = np.stack([np.asarray(p.convert(mode)) for p in pictures])
    return array[:, None] if mode == "L" else array.transpose(0, 3, 1, 2)


def _hub(spec: str) -> Images:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        if "/" not in spec:
            raise unknown("dataset (and there is no file or folder of that name)", spec, DATASETS) from None
        raise ConfigError(
            f"{spec!r} is neither a file nor a folder; to load the Hugging Face dataset, pip install datasets."
        ) from None
    try:
        table = hub.load_dataset(spec, split="train")
    except Exception as error:  # offline, unknown, gated: the hub raises a dozen types for them
        raise ConfigError(
            f"Cannot load the dataset {spec!r} ({_first_line(error)}); check name and network."
        ) from error
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    image = next((c for c, kind in kinds.items() if kind == "Image"), None)
    label = next((c for c, kind in kinds.items() if kind == "ClassLabel"), None)
    if image is None:
        raise ConfigError(f"The dataset {spec!r} has no image column; its columns are {', '.join(kinds)}.")
    pictures = [_plain(p) for p in table[image]]
    sizes = {p.size for p in pictures}
    if len(sizes) != 1:
        raise ConfigError(f"The dataset {spec!r} has images of {len(sizes)} sizes; resize all to one and save an .npz.")
    array = _stack(pictures)
    classes = int(table.features[label].num_classes) if label else -1
    return from_arrays(array, np.asarray(table[label]) if label else None, classes, spec)


def _labels(labels: np.ndarray, name: str) -> Tensor:
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name}: labels must be integers, not {array.dtype}.")
    return torch.from_numpy(array.astype(np.int64))


def _finite(x: Tensor, name: str) -> None:
    bad = ~torch.isfinite(x).flatten(1).all(dim=1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ConfigError(
            f"{name}: {int(bad.sum())} of {len(x)} images hold NaN or infinity (first: {first}); remove them."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
