"""How good samples are: distances between distributions, coverage of the classes, and fidelity to a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.core.errors import ConfigError

# --- distances between two sets of features ---------------------------------------------------------------------


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64. Raises ConfigError below two rows."""
    if x.ndim != 2 or len(x) < 2:
        raise ConfigError(f"A Fréchet distance needs features [N >= 2, D], not {tuple(x.shape)}.")
    x = x.detach().cpu().double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance; rounding's negative eigenvalues (rank N - 1 < D) count as 0."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, root_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)."""
    inner = root_b @ cov_a @ root_b  # symmetric, unlike S_a S_b: real eigenvalues without a Schur decomposition
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance (squared 2-Wasserstein of the fitted Gaussians) of features [N, D] and [M, D]; any N, M >= 2.

    It is biased upwards by finite counts: compare only numbers of equal counts, or beside their floor.
    """
    mean_b, cov_b = moments(b)
    return frechet_moments(*moments(a), mean_b, cov_b, root(cov_b))


def interval(
    metric: Callable[[Tensor], float], a: Tensor, *, resamples: int = 20, level: float = 1.96, seed: int = 0
) -> tuple[float, float]:
    """``metric(a)`` minus and plus ``level`` bootstrap standard errors over a's rows.

    The spread of the resamples is used, not their quantiles: drawing with replacement biases a distance upwards,
    and a percentile interval would not hold the estimate. The reference is kept fixed, as it is for all stages.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [metric(a[torch.randint(len(a), (len(a),), generator=generator)]) for _ in range(resamples)]
    error = level * float(torch.tensor(draws, dtype=torch.float64).std())
    middle = metric(a)
    return middle - error, middle + error


def paired(
    metric: Callable[[Tensor], float],
    own: Tensor,
    floor: float = 0.0,
    each: int = 1,
    *,
    resamples: int = 40,
    seed: int = 0,
) -> Callable[[Tensor], tuple[float, float]]:
    """Of other rows: by which share their metric + floor is above that of ``own``, and the standard error of the share.

    Row by row the two belong together, as samples of one noise do, and are resampled together: what they share drops
    out of the difference. N rows make a Fréchet distance too large by about c/N (Chong & Forsyth 2020). The
    difference has next to none of that; what it is divided by would, and is 2 metric(N) - metric(N/2) + floor.

    Args:
        own: [N, ...], as the others will be.
        each: Rows of one sample, such as the frames of a video, which are drawn together.
    """
    generator, n = torch.Generator().manual_seed(seed), len(own) // each
    of = lambda picks: (picks[:, None] * each + torch.arange(each)).flatten()  # noqa: E731
    order, whole = torch.randperm(n, generator=generator), metric(own)
    size = max(2 * whole - (metric(own[of(order[::2])]) + metric(own[of(order[1::2])])) / 2, 0.0) + floor
    draws = [of(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    mine = [metric(own[rows]) for rows in draws]

    def above(other: Tensor) -> tuple[float, float]:
        if not size:
            return math.inf, math.inf
        theirs = [metric(other[rows]) for rows in draws]
        spread = torch.tensor([b - a for a, b in zip(mine, theirs, strict=True)], dtype=torch.float64).std()
        return (metric(other) - whole) / size, float(spread) / size

    return above


def kernel_mean(a: Tensor, b: Tensor, without_diagonal: bool = False, rows: int = 1000) -> float:
    """Mean of (x.y/D + 1)^3 over pairs, in blocks of rows so that N x M is never held at once."""
    total, scale = 0.0, 1 / a.shape[1]
    for part in a.split(rows):
        k = torch.addmm(torch.ones((), dtype=a.dtype), part, b.T, alpha=scale)
        total += float((k * k).mul_(k).sum(dtype=torch.float64))
    if without_diagonal:
        total -= float((a.double().square().sum(1) * scale + 1).pow(3).sum())
        return total / (len(a) * (len(a) - 1))
    return total / (len(a) * len(b))


def kernel_distance(a: Tensor, b: Tensor, within_b: float | None = None) -> float:
    """Unbiased MMD^2 with the kernel (x.y/D + 1)^3: KID (Binkowski et al. 2018), over all pairs, not over subsets.

    Args:
        within_b: The mean kernel inside b, if it is already known.
    """
    a, b = a.detach().cpu().float(), b.detach().cpu().float()
    within_b = kernel_mean(b, b, True) if within_b is None else within_b
    return kernel_mean(a, a, True) + within_b - 2 * kernel_mean(a, b)


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row of [N, D] to its k-th nearest other row: [N]. Raises ConfigError for N <= k."""
    if len(x) <= k:
        raise ConfigError(f"The distance to the {k}-th nearest neighbour needs more than {k} samples; found {len(x)}.")
    return torch.cdist(x, x).fill_diagonal_(0.0).topk(k + 1, largest=False).values[:, -1]  # the nearest is itself


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, *, seed: int = 0, parts: int = 5) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features [N, D] and [M, D], at equal counts.

    A ball around a sample reaches to its k-th neighbour, so it shrinks as samples are added: unequal counts favour
    one of the two. The larger set is cut into at most ``parts`` random disjoint sets of the smaller one's size and
    the results are averaged.
    """
    real, fake = real.detach().cpu().double(), fake.detach().cpu().double()
    n = min(len(real), len(fake))
    whole, larger = (real, fake) if len(real) == n else (fake, real)
    order = torch.randperm(len(larger), generator=torch.Generator().manual_seed(seed))
    whole_radii, found = radii(whole, k), []
    for pick in order[: min(parts, len(larger) // n) * n].split(n):
        part = larger[pick]
        apart = torch.cdist(whole, part)  # [n of whole, n of part]
        part_in_whole = (apart <= whole_radii[:, None]).any(0).double().mean()
        whole_in_part = (apart <= radii(part, k)[None]).any(1).double().mean()
        found.append((float(part_in_whole), float(whole_in_part)))
    first, second = (sum(v) / len(found) for v in zip(*found, strict=True))
    return (first, second) if whole is real else (second, first)  # precision: fakes inside the real balls


def directions(dim: int, count: int = 256, seed: int = 0) -> Tensor:
    """``count`` fixed unit vectors: [dim, count]."""
    return F.normalize(torch.randn(dim, count, generator=torch.Generator().manual_seed(seed)), dim=0)


def quantiles(projected: Tensor, n: int) -> Tensor:
    """The [n, P] quantiles at (i + 1/2)/n of sorted columns [N, P], interpolated between order statistics."""
    at = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * len(projected) - 0.5).clamp(0, len(projected) - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(len(projected) - 1)
    return torch.lerp(projected[low], projected[high], (at - low).to(projected)[:, None])


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of samples [N, ...] and [M, ...] in their own space (Rabin et al. 2011).

    The square root of the mean squared W2 over fixed directions; unequal counts meet at the smaller one's quantiles.
    """
    a, b = (x.detach().cpu().float().flatten(1) for x in (a, b))
    along = directions(a.shape[1], projections, seed)
    return sliced((a @ along).sort(dim=0).values, (b @ along).sort(dim=0).values)


def sliced(a: Tensor, b: Tensor) -> float:
    """The root mean squared W2 of sorted projections [N, P] and [M, P]."""
    n = min(len(a), len(b))
    return math.sqrt(float((quantiles(a, n) - quantiles(b, n)).square().mean(dtype=torch.float64)))


# --- classes ------------------------------------------------------------------------------------------------------


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that a classifier takes for the class that was asked for."""
    return float((logits.argmax(1).cpu() == labels.cpu()).double().mean())


def coverage(
    real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor, classes: int, k: int = 5, seed: int = 0
) -> Tensor:
    """Coverage (Naeem et al. 2020) per class: [classes], NaN for a class with at most k real samples.

    The share of a class's real features [N, D] whose ball, which reaches to the k-th real neighbour of that class,
    holds a generated sample that was asked for as this class. No more generated than real samples are used per
    class, drawn with a fixed seed, because more samples cover more. With equal distributions and counts it is
    about 1 - 2^-k.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((classes,), math.nan, dtype=torch.float64)
    for c in range(classes):
        own, made = (x[y.cpu() == c].double() for x, y in ((real.cpu(), real_labels), (fake.cpu(), fake_labels)))
        if len(own) <= k:
            continue
        made = made[torch.randperm(len(made), generator=generator)[: len(own)]]
        near = torch.cdist(own, made) <= radii(own, k)[:, None]
        found[c] = near.any(1).double().mean()
    return found


# --- one sample against another -----------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> float:
    """10 log10(4 / MSE) in dB for images in [-1, 1] (a range of 2); infinite for equal images."""
    mse = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(4 / mse) if mse else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of images [B, C, H, W] in [-1, 1].

    The usual Gaussian window of 11 pixels; images under 22 pixels get a uniform one of about a third of their side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    side = min(a.shape[-2:])
    window = max(side // 3 | 1, 3)
    kernel = {} if side >= 22 else {"gaussian_kernel": False, "kernel_size": window}
    return float(similarity(a.float(), b.float(), data_range=2.0, **kernel))  # pyright: ignore[reportArgumentType]


def trajectory(baseline: Tensor, other: Tensor) -> dict[str, float]:
    """``psnr`` and ``ssim`` of images made from the same noise; ``baseline`` against another run gives their floor.

    Raises:
        ConfigError: For different shapes or NaN.
    """
    if baseline.shape != other.shape:
        raise ConfigError(f"Trajectories need equal shapes, not {tuple(baseline.shape)} and {tuple(other.shape)}.")
    for x in (baseline, other):
        finite(x)
    baseline, other = baseline.detach().cpu(), other.detach().cpu()
    return {"psnr": psnr(baseline, other), "ssim": ssim(baseline, other)}


def flip_last_bit(noise: Tensor) -> Tensor:
    """Every float moved to its neighbour by flipping its last bit: the smallest change an input can have.

    A sampler that turns it into something visible is chaotic, and its trajectory metrics have this floor.
    """
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
    kinds[torch.bfloat16] = torch.int16
    if noise.dtype not in kinds:
        raise ConfigError(f"flip_last_bit takes floating-point noise, not {noise.dtype}.")
    return (noise.contiguous().view(kinds[noise.dtype]) ^ 1).view(noise.dtype)


def finite(x: Tensor) -> None:
    """Raise ConfigError where samples [N, ...] hold NaN or infinity."""
    bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if bad:
        raise ConfigError(f"{bad} of {len(x)} samples hold NaN or infinity; the sampler or the model is broken.")
