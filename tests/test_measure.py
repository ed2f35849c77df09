"""The metrics against closed forms, the judge against what it must refuse, the clock against known work."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.path import EDM, RECTIFIED_FLOW, Kind, Path
from hasten.measure import clock
from hasten.measure import judge as judging
from hasten.measure import quality as q
from hasten.measure.diagnose import diagnose, texture
from hasten.measure.features import Features, classifier, inception, rotated, shifted
from hasten.measure.judge import Judge
from hasten.measure.validation import loss_per_time

# --- distances ----------------------------------------------------------------------------------------------------


def whitened(n: int, d: int, seed: int = 0) -> Tensor:
    """[n, d] whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_frechet_of_gaussians_is_the_closed_form():
    d = 6
    a = torch.randn(d, d, dtype=torch.float64)
    b = torch.randn(d, d, dtype=torch.float64)
    x, y = whitened(200, d) @ a.T, whitened(300, d, 1) @ b.T + 1.5
    s, t = a @ a.T, b @ b.T
    # tr (S T)^1/2 from the eigenvalues of the unsymmetric product, another way than the code's
    cross = torch.linalg.eigvals(s @ t).real.clamp_min(0).sqrt().sum()
    expected = 1.5**2 * d + float(s.trace() + t.trace() - 2 * cross)
    assert q.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert q.frechet(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_commuting_covariances_and_of_itself():
    x = whitened(500, 4)
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    assert q.frechet(x, x * scale) == pytest.approx(float((scale - 1).square().sum()), rel=1e-9)
    assert q.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_with_fewer_samples_than_dimensions():
    x = torch.randn(10, 40, dtype=torch.float64)
    assert q.frechet(x, x) == pytest.approx(0, abs=1e-5)
    assert q.frechet(x, x + 2) == pytest.approx(4 * 40, rel=1e-6)
    with pytest.raises(ConfigError, match="N >= 2"):
        q.frechet(x[:1], x)


def test_interval_holds_the_estimate_and_has_the_width_of_the_standard_error():
    x = torch.randn(400, 1, dtype=torch.float64)
    low, high = q.interval(lambda v: float(v.mean()), x, resamples=200)
    assert low < float(x.mean()) < high
    assert (high - low) / 2 == pytest.approx(1.96 * float(x.std()) / 20, rel=0.2)


def test_the_share_of_paired_samples_is_that_of_their_distributions():
    mean, cov = torch.zeros(40, dtype=torch.float64), torch.eye(40, dtype=torch.float64)
    fd = lambda x: q.frechet_moments(*q.moments(x), mean, cov, cov)  # noqa: E731
    along = torch.nn.functional.normalize(torch.ones(40, dtype=torch.float64), dim=0)
    found, errors, plain = [], [], []
    for _ in range(30):
        own = torch.randn(400, 40, dtype=torch.float64) + along  # distance 1
        other = own + 0.1 * along * (1 + torch.randn(400, 1, dtype=torch.float64))  # 1.1 off, and a variance of 1.01
        share, error = q.paired(fd, own, 0.5)(other)
        found.append(share)
        errors.append(error)
        plain.append((fd(other) + 0.5) / (fd(own) + 0.5) - 1)
    true = (1.1**2 + (1.01**0.5 - 1) ** 2 - 1) / 1.5
    mean_of = lambda v: sum(v) / len(v)  # noqa: E731
    spread = float(torch.tensor(found).std())
    assert mean_of(found) == pytest.approx(true, abs=3 * spread / 30**0.5 + 0.01 * true)
    assert mean_of(plain) < 0.75 * true, "divided by a distance that few rows make too large"
    assert mean_of(errors) == pytest.approx(spread, rel=0.4)
    own = torch.randn(400, 40, dtype=torch.float64) + along
    other = own + 0.1 * along
    above = q.paired(fd, own)
    assert above(other)[1] < above(other[torch.randperm(400)])[1] / 2, "pairs stay pairs"
    assert q.paired(fd, own, 0.5)(own)[0] == 0.0
    assert q.paired(lambda x: 0.0, own)(other) == (math.inf, math.inf)


def test_frames_of_one_sample_are_resampled_together():
    mean, cov = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    fd = lambda x: q.frechet_moments(*q.moments(x), mean, cov, cov)  # noqa: E731
    videos = torch.randn(100, 1, 4, dtype=torch.float64) + 1
    own = videos.expand(-1, 16, -1).reshape(-1, 4)  # frames that say nothing new
    other = own + 0.2 * torch.randn(100, 1, 4, dtype=torch.float64).expand(-1, 16, -1).reshape(-1, 4)
    alone, together = (q.paired(fd, own, each=each)(other) for each in (1, 16))
    assert 3 < together[1] / alone[1] < 5.5  # sqrt(16) = 4 times as unsure
    assert together[1] == pytest.approx(q.paired(fd, own[::16])(other[::16])[1], rel=0.5)


def test_kernel_distance_is_unbiased():
    found = torch.tensor([q.kernel_distance(torch.randn(60, 5), torch.randn(40, 5)) for _ in range(200)])
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean())) < 3 * error
    assert (found < 0).any()  # a biased estimate never is


def test_kernel_distance_is_its_definition_and_sees_a_shift():
    a, b = torch.randn(30, 4), torch.randn(20, 4) + 0.5
    k = lambda x, y: (float(x @ y) / 4 + 1) ** 3  # noqa: E731
    xx = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (30 * 29)
    yy = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (20 * 19)
    xy = sum(k(x, y) for x in a for y in b) / (30 * 20)
    assert q.kernel_distance(a, b) == pytest.approx(xx + yy - 2 * xy, rel=1e-4)
    # D = 1: E k is 1 + 3 E xy + 3 E (xy)^2 + E (xy)^3, by the moments of N(m, 1)
    big = q.kernel_distance(torch.randn(3000, 1), torch.randn(3000, 1) + 1)
    within = lambda m: 1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (m**3 + 3 * m) ** 2  # noqa: E731
    between = 1 + 3 * 0 + 3 * 1 * 2 + 0
    assert big == pytest.approx(within(0) + within(1) - 2 * between, rel=0.15)


def test_precision_and_recall_of_identical_disjoint_and_collapsed():
    real = torch.randn(200, 3)
    assert q.precision_recall(real, real) == (1, 1)
    assert q.precision_recall(real, real + 100) == (0, 0)
    modes = torch.cat([torch.randn(100, 3), torch.randn(100, 3) + 50])
    fake = torch.randn(200, 3)  # one mode of two, well made
    precision, recall = q.precision_recall(modes, fake)
    assert precision > 0.85 and recall == pytest.approx(0.5, abs=0.08)
    precision, recall = q.precision_recall(fake, modes)  # half of the samples are nowhere near the data
    assert precision == pytest.approx(0.5, abs=0.08) and recall > 0.8


def test_radii_reach_the_kth_other_sample():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert q.radii(x, 1).tolist() == [1, 1, 2, 4]
    assert q.radii(x, 2).tolist() == [3, 2, 3, 6]


def test_precision_and_recall_at_unequal_counts_do_not_drift():
    many = [q.precision_recall(torch.randn(200, 8), torch.randn(1000, 8)) for _ in range(3)]
    even = [q.precision_recall(torch.randn(200, 8), torch.randn(200, 8)) for _ in range(9)]
    for i in range(2):
        assert sum(m[i] for m in many) / 3 == pytest.approx(sum(e[i] for e in even) / 9, abs=0.05)
    with pytest.raises(ConfigError, match="more than 3"):
        q.precision_recall(torch.randn(3, 2), torch.randn(9, 2))


def test_sliced_wasserstein_of_a_shift_and_a_scale():
    x = torch.randn(300, 1, 4, 4)
    shift = torch.randn(16)
    along = q.directions(16)
    expected = float((shift @ along).square().mean().sqrt())
    assert q.sliced_wasserstein(x, x + shift.view(1, 1, 4, 4)) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(float(shift.norm()) / 4, rel=0.2)  # |shift| / sqrt(d) over random directions
    rms = float((x.flatten(1) @ along).square().mean().sqrt())
    assert q.sliced_wasserstein(x, 3 * x) == pytest.approx(2 * rms, rel=1e-4)


def test_sliced_wasserstein_at_unequal_counts():
    a, b = torch.randn(4000, 2), 2 * torch.randn(1000, 2)  # W2 of N(0,1) and N(0,4) is 1 in every direction
    assert q.sliced_wasserstein(a, b) == pytest.approx(1, abs=0.1)
    assert q.sliced_wasserstein(a, torch.cat([a, a])) < 0.01


def test_coverage_sees_a_missing_class_and_does_not_reward_more_samples():
    real, y = torch.randn(300, 4), torch.arange(300) % 3
    covered = q.coverage(real, y, torch.randn(300, 4), y, 3)
    assert float(covered.mean()) == pytest.approx(1 - 2**-5, abs=0.04)
    missing = q.coverage(real, y, torch.randn(200, 4), torch.arange(200) % 2, 3)
    assert float(missing[2]) == 0 and float(missing[:2].min()) > 0.8
    for count in (300, 3000):  # with k = 1, ten times the samples would cover 0.9 of it instead of 0.5
        found = q.coverage(real, y, torch.randn(count, 4), torch.arange(count) % 3, 3, k=1)
        assert float(found.mean()) == pytest.approx(0.5, abs=0.1)
    swapped = q.coverage(real + 9 * y[:, None], y, real + 9 * y[:, None], (y + 1) % 3, 3)
    assert float(swapped.max()) == 0  # the right images under the wrong labels cover nothing


def test_class_accuracy():
    assert q.class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


# --- trajectories -------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error_and_ssim():
    x = torch.rand(4, 1, 8, 8) - 0.5
    found = q.trajectory(x, x + 0.2)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / 0.04), rel=1e-5)
    assert q.trajectory(x, x) == {"psnr": math.inf, "ssim": pytest.approx(1)}
    assert abs(q.trajectory(x, torch.rand(4, 1, 8, 8) - 0.5)["ssim"]) < 0.2
    assert q.ssim(0.5 + 0.4 * x, 0.5 - 0.4 * x) < -0.5  # alike in light, opposite in structure
    with pytest.raises(ConfigError, match="equal shapes"):
        q.trajectory(x, x[:2])


@pytest.mark.parametrize("side", [4, 8, 21, 22, 40])
def test_ssim_is_finite_at_every_size(side: int):
    x = torch.rand(2, 3, side, side)
    assert 0 < q.ssim(x, x + 0.05 * torch.randn_like(x)) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flip_last_bit_moves_every_entry_by_one_ulp(dtype: torch.dtype):
    x = torch.randn(50, 3).to(dtype)
    y = q.flip_last_bit(x)
    up, down = (torch.nextafter(x, torch.full_like(x, s * math.inf)) for s in (1, -1))
    assert bool((y != x).all()) and bool(((y == up) | (y == down)).all())
    assert torch.equal(q.flip_last_bit(y), x)
    with pytest.raises(ConfigError, match="floating-point"):
        q.flip_last_bit(torch.zeros(2, dtype=torch.long))


# --- features -----------------------------------------------------------------------------------------------------


def stripes(n: int, side: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that a small network learns at once: a bright left half, a bright top half, or plain noise."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.full((n, 1, side, side), -0.5), torch.arange(n) % 3
    x[y == 0, :, :, : side // 2] = 0.5
    x[y == 1, :, : side // 2] = 0.5
    return x + 0.25 * torch.randn(x.shape, generator=g), y


@pytest.fixture(scope="module")
def features() -> Features:
    x, y = stripes(240)
    return classifier(x, y, 3, 0, 40, test=stripes(90, seed=1))


def test_classifier_learns_and_reports_its_accuracy(features: Features):
    x, y = stripes(120, seed=2)
    logits = features.logits(x)
    assert logits is not None and logits.shape == (120, 3)
    assert features.accuracy is not None and features.accuracy > 0.95
    assert q.class_accuracy(logits, y) > 0.95
    assert features(x).shape == (120, 64) and features(x).dtype == torch.float32


def test_classifier_is_deterministic_and_leaves_the_global_generator_alone():
    x, y = stripes(60)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = classifier(x, y, 3, 5, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    two, other = classifier(x, y, 3, 5, 4), classifier(x, y, 3, 6, 4)
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), other(x))


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 28, 28), (2, 5, 12), (3, 64, 64)])
def test_classifier_fits_other_sizes(channels: int, height: int, width: int):
    x = torch.randn(12, channels, height, width)
    found = classifier(x, None, 0, 0, 5, batch=8)  # 5: where torch's schedule would divide by zero
    assert found(x).shape == (12, 64) and bool(found(x).isfinite().all())


def test_unlabelled_features_tell_rotations_apart_and_offer_no_class_metrics():
    x, _ = stripes(200)
    x[..., :4, :4] += 2  # a corner, so that all four rotations differ
    found = classifier(x, None, 0, 0, 40, test=(x, None))
    assert "rotation" in found.name and found.logits(x) is None and found.classes == 0
    assert found.accuracy is not None and found.accuracy > 0.9


def test_augmentations_move_and_turn():
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    moved = shifted(x, torch.Generator().manual_seed(0))
    inner = moved[:, 0, 3, 3] - x[0, 0, 3, 3]
    assert set(inner.tolist()) == {dy * 8.0 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    turns, which = rotated(x[:2])
    assert torch.equal(turns[which == 2][0, 0], x[0, 0].flip(0, 1)) and len(turns) == 8


def test_features_are_saved_and_loaded(features: Features, tmp_path):
    file = tmp_path / "features.safetensors"
    features.save(file)
    again = Features.load(file)
    x, _ = stripes(20)
    assert torch.equal(again(x), features(x))
    assert (again.name, again.classes, again.accuracy) == (features.name, features.classes, features.accuracy)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete it"):
        Features.load(file)
    with pytest.raises(CheckpointError):
        Features.load(tmp_path / "none.safetensors")


def test_features_refuse_what_they_cannot_see(features: Features, tmp_path):
    with pytest.raises(ConfigError, match="channels"):
        features(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="Labels"):
        classifier(torch.zeros(9, 1, 8, 8), torch.full((9,), 3), 3, 0)
    with pytest.raises(ConfigError, match="finite"):
        classifier(torch.full((9, 1, 8, 8), math.nan), None, 0, 0)
    with pytest.raises(ConfigError, match="weights are not at"):
        inception(tmp_path / "missing.pth")


# --- the judge ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(features: Features) -> Judge:
    return Judge(features, *stripes(180, seed=3), *stripes(90, seed=4))


def test_judge_ranks_and_gives_every_number(judge: Judge):
    x, y = stripes(240, seed=5)
    good = judge(x, y, interval=True)
    keys = {"fd", "kd", "precision", "recall", "sw", "accuracy", "coverage", "coverage_worst", "fd_low", "fd_high"}
    assert set(good) == keys and good["fd_low"] < good["fd"] < good["fd_high"]
    collapsed = judge(x[y != 2], y[y != 2])
    assert collapsed["fd"] > 5 * good["fd"] and collapsed["recall"] < 0.8 * good["recall"]
    assert collapsed["coverage_worst"] == 0 and collapsed["accuracy"] > 0.95
    assert judge(x, (y + 1) % 3)["accuracy"] < 0.05
    assert judge(x + 0.5, y)["sw"] > 5 * good["sw"]


def test_judge_agrees_with_the_plain_functions(judge: Judge, features: Features):
    reference, _ = stripes(180, seed=3)
    x, _ = stripes(100, seed=6)
    found, a, b = judge(x), features(x), features(reference)
    assert found["fd"] == pytest.approx(q.frechet(a, b), rel=1e-9)
    assert found["kd"] == pytest.approx(q.kernel_distance(a, b), rel=1e-6)
    assert found["sw"] == pytest.approx(q.sliced_wasserstein(x, reference), rel=1e-6)
    assert (found["precision"], found["recall"]) == q.precision_recall(b, a)
    assert "accuracy" not in found  # samples without labels


def test_the_judge_says_what_paired_images_lost(judge: Judge):
    x, _ = stripes(240, seed=5)
    above = judge.paired(x)
    share, error = above(x + 0.002)
    _, strangers = above(stripes(240, seed=6)[0] + 0.002)
    assert 0 < error < strangers / 3
    much, _ = above(x + 0.3)
    assert much > 1 and much > 10 * abs(share)
    features = judge.features
    floor = judge.floor["fd"]
    a, b = features(x), features(x + 0.3)
    reference = features(stripes(180, seed=3)[0])
    assert much == pytest.approx(q.paired(lambda v: q.frechet(v, reference), a, floor)(b)[0], rel=1e-6)


def test_floors(judge: Judge):
    x, y = stripes(90, seed=4)
    assert judge.floor == judge(x, y, interval=True)
    assert 0 < judge.floor_halves["fd"] < 5 * judge.floor["fd"]
    assert judge.floor_halves["recall"] > 0.7
    with pytest.raises(ConfigError, match="held-out"):
        _ = Judge(judge.features, x, y).floor


def test_a_saved_judge_judges_the_same(judge: Judge, tmp_path):
    file = tmp_path / "judge.safetensors"
    judge.save(file)
    again = Judge.load(file)
    x, y = stripes(120, seed=7)
    mine, theirs = judge(x, y, interval=True), again(x, y, interval=True)
    assert mine.keys() == theirs.keys() and theirs != judge.floor
    for key in mine:
        assert theirs[key] == pytest.approx(mine[key], rel=0.01, abs=2e-3), key  # half precision
    assert again.floor == judge.floor and again.floor_halves == judge.floor_halves
    assert float((again.shown - judge.shown.clamp(-1, 1)).abs().max()) <= 1 / 127.5 and len(again.shown)
    assert file.stat().st_size < 1e6
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="no judge that hasten saved"):
        Judge.load(file)


def test_a_large_reference_is_thinned_for_neighbours_alone(features: Features, monkeypatch):
    x, y = stripes(240, seed=3)
    whole = Judge(features, x, y)
    monkeypatch.setattr(judging, "KEPT", 100)
    thin, (z, labels) = Judge(features, x, y), stripes(90, seed=8)
    a, b = whole(z, labels), thin(z, labels)
    assert a["fd"] == b["fd"] and a["sw"] == b["sw"] and a["recall"] != b["recall"]
    assert a["kd"] == pytest.approx(b["kd"], abs=0.5 * abs(a["kd"]) + 0.05)


def test_judge_refuses_bad_samples(judge: Judge):
    x, y = stripes(30)
    bad = x.clone()
    bad[3, 0, 0, 0] = math.nan
    with pytest.raises(ConfigError, match="1 of 30 samples hold NaN"):
        judge(bad, y)
    with pytest.raises(ConfigError, match="shape"):
        judge(torch.zeros(30, 1, 9, 8), y)
    with pytest.raises(ConfigError, match="0..2"):
        judge(x, y + 1)
    with pytest.raises(ConfigError, match="30 classes"):
        judge(x, y[:5])
    with pytest.raises(ConfigError, match="at least 8"):
        judge(x[:3], y[:3])


# --- validation loss ----------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """Predicts x0 = 0, so its x0 error is |x0|^2 and on rectified flow its eps error is known."""

    def __init__(self, path: Path = RECTIFIED_FLOW, kind: Kind = "x0"):
        super().__init__()
        self.path = path
        self.kind: Kind = kind
        self.blocks: list[nn.Module] = []

    def forward(self, x_t, t, cond, *, r=None, taps=()):
        assert len(cond["label"]) == len(x_t)
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, EDM])
def test_loss_per_time_is_the_closed_form(path):
    x, y = torch.randn(300, 1, 4, 4), torch.zeros(300, dtype=torch.long)
    found = loss_per_time(Zero(path), x, {"label": y}, bins=4, batch=128)
    assert [(a, b) for a, b, _ in found] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    for _, _, loss in found:
        assert loss == pytest.approx(float(x.square().mean()), rel=1e-5)


def test_loss_per_time_in_another_kind_and_repeats():
    # an x0 error of |x0|^2 = 1 is an eps error of (1 - t)^2 / t^2
    x, cond = torch.ones(400, 1, 2, 2), {"label": torch.zeros(400, dtype=torch.long)}
    (_, _, loss) = loss_per_time(Zero(), x, cond, bins=2, kind="eps")[1]
    exact = 2 * (1.5 - 2 * math.log(2))  # 2 * integral of (1/t - 1)^2 over (1/2, 1)
    assert loss == pytest.approx(exact, rel=1e-3)
    net = Zero(kind="velocity")
    assert loss_per_time(net, x, cond, seed=1) == loss_per_time(net, x, cond, seed=1)
    assert loss_per_time(net, x, cond, seed=1) != loss_per_time(net, x, cond, seed=2)


# --- clock --------------------------------------------------------------------------------------------------------


def test_latency_is_interleaved_and_drops_the_warm_up():
    order: list[str] = []

    def work(name: str, seconds: float):
        def run() -> None:
            first = order.count(name) == 0
            order.append(name)
            time.sleep(0.05 if first else seconds)

        return run

    found = clock.latency({"a": work("a", 0.002), "b": work("b", 0.01)}, repeats=5, warmup=1)
    assert order == ["a", "b"] * 6
    assert len(found["a"].times) == 5 and 0.002 <= found["a"].p50 < 0.01 <= found["b"].p50 <= found["b"].p95 < 0.05
    with pytest.raises(ConfigError):
        clock.latency({"a": lambda: None}, repeats=0)


def test_peak_memory_sees_what_was_held_and_let_go():
    def hold() -> None:
        for _ in range(3):
            x = torch.ones(32 << 20, dtype=torch.uint8)
            x += 1
            time.sleep(0.01)

    small = clock.peak_memory(lambda: time.sleep(0.01))
    for _ in range(2):  # a second time too, when an allocator could have kept the pages
        large = clock.peak_memory(hold)
        assert 30 << 20 < large.bytes < 80 << 20 and "resident" in large.how
    assert small.bytes < 8 << 20


def test_network_evaluations_are_counted_and_the_hook_is_removed():
    net = nn.Linear(3, 3)
    with clock.count_calls(net) as calls:
        for _ in range(4):
            net(torch.zeros(10, 3))
        net(torch.zeros(20, 3))
    net(torch.zeros(10, 3))
    assert (calls.calls, calls.rows, calls.nfe(10)) == (5, 60, 6.0)


def test_machine_says_what_is_needed_and_nothing_private():
    import platform

    found = clock.machine()
    assert {"cpu", "cores", "memory_gib", "torch", "device", "platform"} <= set(found)
    assert found["cores"] >= 1 and found["memory_gib"] > 0
    assert platform.node() not in " ".join(map(str, found.values())).split()


# --- diagnosis ----------------------------------------------------------------------------------------------------

GOOD = {"precision": 0.9, "recall": 0.85, "coverage_worst": 0.9}
TEACHER = {"precision": 0.9, "recall": 0.9, "coverage_worst": 0.9}


def steady(n: int = 200) -> list[dict[str, float]]:
    noise = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [{"grad/student": 1 + v, "grad/fake": 2 + v, "fake": 0.5 + 0.05 * v} for v in noise]


def test_a_healthy_student_is_left_alone():
    same = {"variance": 1.0, "high_frequency": 1.0}
    assert diagnose(steady(), GOOD, TEACHER, same, same) == []
    assert diagnose([], GOOD) == []


def test_collapse_and_a_missing_class_are_named():
    assert [s.split(":")[0] for s in diagnose(steady(), {**GOOD, "recall": 0.4}, TEACHER)] == ["Collapsed"]
    assert [s.split(":")[0] for s in diagnose([], {**GOOD, "coverage_worst": 0.1})] == ["A class is missing"]


def test_blur_is_named_only_where_the_samples_are_smooth():
    x = torch.randn(100, 1, 8, 8)
    smooth = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1)
    blurred = {**GOOD, "recall": 0.6}
    (sentence,) = diagnose(steady(), blurred, TEACHER, texture(smooth), texture(x))
    assert sentence.startswith("Blurred") and "more steps" in sentence
    assert diagnose(steady(), blurred, TEACHER, texture(x), texture(x)) == []


def test_texture_of_white_noise_and_of_a_constant():
    white = texture(torch.randn(400, 1, 8, 8))
    assert white["variance"] == pytest.approx(1, abs=0.05) and white["high_frequency"] == pytest.approx(1, abs=0.05)
    flat = texture(torch.randn(400, 1, 1, 1).expand(-1, -1, 8, 8))
    assert flat["variance"] == pytest.approx(1, abs=0.2) and flat["high_frequency"] < 1e-6


def test_oscillation_is_named_by_its_network():
    history = steady()
    for i in range(110, 200, 10):
        history[i]["grad/student"] = 40.0
    (sentence,) = diagnose(history, GOOD, TEACHER)
    assert sentence.startswith("Oscillates: the gradient norm of student")


def test_a_lagging_fake_is_named_while_the_student_moves():
    history = [{**step, "fake": 0.5 + max(0, i - 120) * 0.01} for i, step in enumerate(steady())]
    (sentence,) = diagnose(history, GOOD, TEACHER)
    assert sentence.startswith("The fake network lags")
    for i, step in enumerate(history):
        step["grad/student"] = 1.0 if i < 120 else 0.01  # the student stands still: a loss that rises is not lag
    assert diagnose(history, GOOD, TEACHER) == []


def test_lpips_counts_every_image_alike(monkeypatch):
    from torchmetrics.functional.image import lpips as theirs

    from hasten.measure import perceptual

    def distance(a: torch.Tensor, b: torch.Tensor, net: str, reduction: str = "mean") -> torch.Tensor:
        assert net == "alex" and a.shape[1] == 3
        each = (a - b).abs().mean((1, 2, 3))
        return each.sum() if reduction == "sum" else each.mean()

    monkeypatch.setattr(perceptual, "needs_weights", lambda: None)
    monkeypatch.setattr(theirs, "learned_perceptual_image_patch_similarity", distance)
    one, other = torch.zeros(20, 1, 8, 8), torch.zeros(20, 1, 8, 8)
    other[16:] = 1.0  # the last four, which are a part of their own
    assert perceptual.lpips(one, other) == pytest.approx(4 / 20)
