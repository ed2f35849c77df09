"""The judge: every quality number of a set of samples against one reference, which travels as a small file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.measure.features import Features
from hasten.measure.files import read_tensors, write_tensors
from hasten.measure.quality import (
    class_accuracy,
    coverage,
    directions,
    finite,
    frechet_moments,
    interval,
    kernel_distance,
    kernel_mean,
    moments,
    paired,
    precision_recall,
    quantiles,
    root,
    sliced,
)

FORMAT = "hasten-judge-1"
KEPT = 5000  # rows of a reference that kernels and neighbours see; mean and covariance see all of them
KEPT_SHOWN = 256
QUANTILES = 1000  # of every projection, in a saved judge


@dataclass
class Real:
    """A set of real images, seen once: all that a comparison needs of it."""

    features: Tensor  # [at most KEPT, D]
    labels: Tensor | None
    classes: int
    projected: Tensor  # [N, P] sorted pixel projections
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        self.root = root(self.cov)
        self.within = kernel_mean(self.features, self.features, True)

    @classmethod
    def of(cls, features: Tensor, pixels: Tensor, labels: Tensor | None, classes: int) -> Real:
        """From features [N, D] and pixels [N, C*H*W]."""
        projected, all_of_them = (pixels @ directions(pixels.shape[1])).sort(dim=0).values, moments(features)
        if len(features) > KEPT:
            rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:KEPT]
            features, labels = features[rows], None if labels is None else labels[rows]
        return cls(features, labels, classes, projected, *all_of_them)

    def fd(self, features: Tensor) -> float:
        """Fréchet distance of features [M, D] to this set."""
        return frechet_moments(*moments(features), self.mean, self.cov, self.root)

    def compare(
        self, features: Tensor, pixels: Tensor, labels: Tensor | None, logits: Tensor | None
    ) -> dict[str, float]:
        """Every number of samples, of which features, pixels, classes and logits are given."""
        precision, recall = precision_recall(self.features, features)
        numbers = {
            "fd": self.fd(features),
            "kd": kernel_distance(features, self.features, self.within),
            "precision": precision,
            "recall": recall,
            "sw": sliced((pixels @ directions(pixels.shape[1])).sort(dim=0).values, self.projected),
        }
        if labels is not None and self.labels is not None:
            if logits is not None:
                numbers["accuracy"] = class_accuracy(logits, labels)
            covered = coverage(self.features, self.labels, features, labels, self.classes)
        else:  # one class of everything
            ones = (torch.zeros(len(x), dtype=torch.long) for x in (self.features, features))
            covered = coverage(self.features, next(ones), features, next(ones), 1)
        known = covered[~covered.isnan()]
        if len(known):
            numbers["coverage"], numbers["coverage_worst"] = float(known.mean()), float(known.min())
        return numbers


class Judge:
    """Judges samples against a reference, of which everything that can be is computed once.

    Args:
        features: The space of all metrics but ``sw``, which is in pixels.
        reference: Real images [N, C, H, W] in [-1, 1].
        labels: Their classes [N], or None.
        held_out: Other real images, which neither the models nor the feature network have seen: the floor.
        held_out_labels: Their classes, or None.

    Raises:
        ConfigError: For NaN, shapes that differ, or labels that do not fit.
    """

    def __init__(
        self,
        features: Features,
        reference: Tensor,
        labels: Tensor | None = None,
        held_out: Tensor | None = None,
        held_out_labels: Tensor | None = None,
    ):
        self.features, self.shape = features, tuple(reference.shape[1:])
        self.classes = max(features.classes, 0 if labels is None else int(labels.max()) + 1)
        self._seen = self._look(reference, labels)
        self._real = Real.of(*self._seen[:3], self.classes)
        self._held_out = None if held_out is None else (held_out, held_out_labels)
        self.shown = reference[:KEPT_SHOWN].cpu()  # real images for pictures, and their classes
        self.shown_labels = None if labels is None else labels[:KEPT_SHOWN].cpu()

    def __call__(self, samples: Tensor, labels: Tensor | None = None, interval: bool = False) -> dict[str, float]:
        """Quality of samples [M, C, H, W], M >= 8, made for ``labels`` [M].

        Returns:
            ``fd`` Fréchet and ``kd`` kernel distance, ``precision``, ``recall``, ``sw`` sliced Wasserstein,
            ``coverage`` (mean over classes) and ``coverage_worst``; ``accuracy`` with labels and class features;
            ``fd_low`` and ``fd_high``, two standard errors around ``fd``, with ``interval``.

        Raises:
            ConfigError: For NaN, another shape than the reference's, or labels that do not fit.
        """
        seen = self._look(samples, labels)
        numbers = self._real.compare(*seen)
        if interval:
            numbers["fd_low"], numbers["fd_high"] = _interval(self._real.fd, seen[0])
        return numbers

    def paired(self, own: Tensor, each: int = 1) -> Callable[[Tensor], tuple[float, float]]:
        """Of images [N, C, H, W] of the same noise: by which share their FD + floor is above that of ``own``.

        Args:
            each: Images of one sample, such as the frames of a video.

        Returns:
            A function of images: the share and its standard error (:func:`hasten.measure.quality.paired`).

        Raises:
            ConfigError: There and here, for NaN, fewer than 8 images, or another shape than the reference's.
        """
        above = paired(self._real.fd, self._look(own, None)[0], self.best_floor["fd"], each)
        return lambda other: above(self._look(other, None)[0])

    @cached_property
    def floor(self) -> dict[str, float]:
        """The same numbers for held-out real images: what a perfect model with as few samples would score.

        Raises:
            ConfigError: If the judge was given no held-out images.
        """
        if self._held_out is None:
            raise ConfigError("This judge has no held-out images; give held_out, or read floor_halves.")
        return self(*self._held_out, interval=True)

    @property
    def best_floor(self) -> dict[str, float]:
        """``floor`` where there are held-out images, else ``floor_halves``."""
        return self.__dict__.get("floor") or (self.floor if self._held_out else self.floor_halves)

    @cached_property
    def floor_halves(self) -> dict[str, float]:
        """The same numbers for one random half of the reference against the other, with equal shares of classes."""
        features, pixels, labels, logits = self._seen
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        if labels is not None:
            order = order[labels[order].argsort(stable=True)]
        one, two = order[::2], order[1::2]
        at = lambda x, i: None if x is None else x[i]  # noqa: E731
        half = Real.of(features[one], pixels[one], at(labels, one), self.classes)
        numbers = half.compare(features[two], pixels[two], at(labels, two), at(logits, two))
        numbers["fd_low"], numbers["fd_high"] = _interval(half.fd, features[two])
        return numbers

    def save(self, file: File | str) -> None:
        """Write all that judging needs into one safetensors file, without the images but for a few to look at.

        Features are kept in half precision and pixel projections as quantiles, so that a judge that was loaded
        differs from this one by their rounding alone.

        Raises:
            ConfigError: For features that were not trained here.
        """
        about, net = self.features.parts()
        real = self._real
        few = quantiles(real.projected, QUANTILES) if len(real.projected) > QUANTILES else real.projected
        tensors = {f"net/{k}": v for k, v in net.items()} | {
            "features": real.features.half(), "projected": few.half(), "mean": real.mean, "cov": real.cov,
            "shown": ((self.shown.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8),
        }  # fmt: skip
        if real.labels is not None:
            tensors["labels"] = real.labels.to(torch.int32)
        if self.shown_labels is not None:
            tensors["shown_labels"] = self.shown_labels.to(torch.int32)
        floors = {"floor": self.floor if self._held_out else None, "halves": self.floor_halves}
        meta = {"format": FORMAT, "net": about, "shape": self.shape, "classes": self.classes, **floors}
        write_tensors(file, tensors, meta)

    @classmethod
    def load(cls, file: File | str) -> Judge:
        """The judge that :meth:`save` wrote. Raises CheckpointError for a missing, truncated or foreign file."""
        tensors, meta = read_tensors(file, FORMAT, "judge")
        net = {k[4:]: v for k, v in tensors.items() if k.startswith("net/")}
        judge = cls.__new__(cls)
        judge.features = Features.of(meta["net"], net)
        judge.shape, judge.classes = tuple(meta["shape"]), int(meta["classes"])
        labels = tensors["labels"].long() if "labels" in tensors else None
        judge._real = Real(
            tensors["features"].float(), labels, judge.classes, tensors["projected"].float(),
            tensors["mean"], tensors["cov"],
        )  # fmt: skip
        judge._held_out, judge.shown = None, tensors["shown"].float() / 127.5 - 1
        judge.shown_labels = tensors["shown_labels"].long() if "shown_labels" in tensors else None
        judge.__dict__ |= {"floor": meta["floor"], "floor_halves": meta["halves"]}
        return judge

    def _look(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(features, pixels, labels, logits) on the CPU, after every check."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ConfigError(f"The judge compares images of shape {self.shape}, not {tuple(images.shape[1:])}.")
        if len(images) < 8:
            raise ConfigError(f"A quality number needs at least 8 samples; found {len(images)}.")
        finite(images)
        if labels is not None:
            labels = labels.detach().cpu().long()
            if labels.shape != (len(images),):
                raise ConfigError(f"Labels must be {len(images)} classes, one per image; found {tuple(labels.shape)}.")
            if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
                found = f"{int(labels.min())} to {int(labels.max())}"
                raise ConfigError(f"Labels must be classes in 0..{self.classes - 1}; found {found}.")
        features, logits = self.features.both(images.detach())
        return (
            features.cpu(),
            images.detach().cpu().float().flatten(1),
            labels,
            None if logits is None else logits.cpu(),
        )


_interval = interval  # the name is an argument's inside the judge
