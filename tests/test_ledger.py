"""The ledger: every combination measured, floors, interactions by hand, verdicts in words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.ledger import Ledger, Line, Nudge, build, combinations_of, with_layers
from hasten.ledger_page import as_dict, page, save, table
from hasten.measure.features import classifier
from hasten.measure.judge import Judge
from hasten.speed import Applied, Cache, Cast, Guidance, Quantize, speed_up
from hasten.workload import Workload, picture
from tests.commandline import plain_consoles, refused, run  # noqa: F401
from tests.pipelines import FAMILIES
from tests.test_speed import tiny

SAMPLING = Sampling(even(8), cfg_scale=2.0)


def names(layers: Any) -> tuple[str, ...]:
    return tuple(t.name for t in layers)


def test_every_layer_every_pair_every_prefix_once():
    stack = [Cache(), Cast(), Guidance(reuse=1), Quantize()]
    got = [names(c) for c in combinations_of(stack)]
    assert got[0] == () and len(got) == len(set(got)) == 1 + 4 + 6 + 2
    assert got[-1] == ("quantize", "cast", "cache", "guidance") and got[-2] == ("quantize", "cast", "cache")
    assert ("quantize", "guidance") in got
    assert [names(c) for c in combinations_of(stack[:1])] == [(), ("cache",)]


def book(**lines: Line) -> Ledger:
    """A ledger of lines with known numbers."""
    base = Line((), 1.0, 1.1, trajectory={"psnr": math.inf, "ssim": 1.0})
    return Ledger([base, *lines.values()], {"psnr": 100.0, "ssim": 1.0}, about={"rounds": 1})


def line(*layers: str, seconds: float, psnr: float, **more: Any) -> Line:
    return Line(layers, seconds, seconds * 1.1, trajectory={"psnr": psnr, "ssim": 0.9}, **more)


def test_gain_interaction_and_extra_loss_by_hand():
    found = book(
        a=line("a", seconds=0.5, psnr=40), b=line("b", seconds=0.25, psnr=30), ab=line("a", "b", seconds=0.25, psnr=20)
    )
    a, _, ab = found.lines[1:]
    assert found.gain(a) == 2 and found.interaction(ab) == 4 / (2 * 4) and found.interaction(a) is None
    assert found.marginal(ab) == 0.5 / 0.25 and found.marginal(a) == 2
    assert found.extra_loss(ab) == pytest.approx(4 * (0.01 - 0.001 - 0.0001))
    assert "where 8.00 times was expected: these fight" in found.verdict(ab)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (line("a", seconds=1.01, psnr=30), "gains nothing measurable (0.99 times)"),
        (line("a", seconds=1.5, psnr=30), "makes it slower (0.67 times as fast)"),
        (line("a", seconds=0.5, psnr=99.5), "2.00 times as fast; it changes the samples no more than a flipped"),
        (line("a", seconds=0.5, psnr=30), "PSNR 30.0 dB to the baseline (a flipped last bit: 100.0)"),
        (Line(("a",), refused="Cache: 0 of 50 calls were reused."), "0 of 50 calls"),
    ],
)
def test_verdicts_are_words(one, words):
    assert words in book(a=one).verdict(one)


def test_a_verdict_on_quality_needs_more_than_the_noise():
    def with_share(low: float, high: float) -> str:
        one = line("a", seconds=0.5, psnr=30, quality={"fd": 1.05, "fd_more_low": low, "fd_more_high": high})
        found = book(a=one)
        found.lines[0].quality = {"fd": 1.0}
        return found.verdict(one)

    assert "FD 1.050 against 1.000 (-1.0% to +9.0% of FD + floor): nothing measurable" in with_share(-0.01, 0.09)
    assert "it costs quality" in with_share(0.01, 0.02)


SEEDS = {"fd": 1.1, "kd": 0.012, "recall": 0.66}  # the baseline's: FD 1, KD 0.01, recall 0.7


@pytest.mark.parametrize(
    ("kd", "recall", "low", "words"),
    [
        (0.013, 0.70, -0.1, "nothing in FD, but KD 0.0130 against 0.0100 (another seed changes it by 0.0020)"),
        (0.010, 0.65, -0.1, "nothing in FD, but recall 0.6500 against 0.7000 (another seed changes it by 0.0400)"),
        (0.013, 0.65, -0.1, "by 0.0020) and recall 0.6500"),
        (0.011, 0.67, -0.1, "nothing measurable in distribution"),
        (0.001, 0.90, -0.1, "nothing measurable in distribution"),  # better is no loss
        (0.013, 0.65, 0.01, "it costs quality"),
    ],
)
def test_a_loss_of_kd_or_recall_is_said_where_fd_shows_none(kd, recall, low, words):
    quality = {"fd": 1.05, "kd": kd, "recall": recall, "fd_more_low": low, "fd_more_high": 0.2}
    found = book(a=line("a", seconds=0.5, psnr=30, quality=quality))
    found.lines[0].quality, found.seed_floor = {"fd": 1.0, "kd": 0.01, "recall": 0.7}, SEEDS
    verdict = found.verdict(found.lines[1])
    assert words in verdict and (low < 0 or "recall" not in verdict)


def test_floors_and_both_interactions_are_on_the_page_and_in_the_terminal():
    found = book(**{n: line(*n, seconds=0.5, psnr=p) for n, p in (("a", 40), ("b", 30), ("ab", 20))})
    for one in found.lines:
        one.quality = {"fd": 1.0, "kd": 0.01, "recall": 0.7, "fd_more_low": -0.1, "fd_more_high": 0.1}
    found.quality_floor, found.seed_floor = {"fd": 0.4, "kd": 0.0031, "recall": 0.81}, SEEDS
    found.about |= {"repeats": 1, "count": 16, "steps": 8}
    html = " ".join(page(found, "").split())
    assert "Real held-out images: FD 0.400, KD 0.0031, recall 0.810; the baseline with another seed: " in html
    assert "another seed: FD 1.100, KD 0.0120, recall 0.660. 16 samples" in html
    figures = html.split('<tr class="figures">')[1:]
    assert all(row.split("</tr>")[0].count("<td") == html.count("<th") - html.count("<thead") == 14 for row in figures)
    assert (
        'colspan="14"' in html
        and "<th>extra MSE</th>" in html
        and "<td>+3.6e-02</td>" in figures[-1]
        and "e-02" not in figures[1]
    )
    shown = table(found, "A stack")
    extra = next(c for c in shown.columns if c.header == "extra MSE")
    assert list(extra.cells) == ["", "", "", "+3.6e-02"]


def test_helping_layers_are_named():
    found = book(a=line("a", seconds=0.5, psnr=40), b=line("b", seconds=0.5, psnr=40))
    found.lines.append(line("a", "b", seconds=0.1, psnr=40))
    assert "these help each other" in found.verdict(found.lines[-1])


# --- measured -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work() -> Workload:
    torch.manual_seed(0)
    return Workload(tiny(), 8, sampling=SAMPLING, batch=4)


def test_a_nudge_is_the_last_bit(work):
    base, _ = work.samples(6)
    nudged, _ = with_layers([Nudge()], work, lambda: work.samples(6))
    again, _ = work.samples(6)
    assert torch.equal(base, again) and not torch.equal(base, nudged)
    assert float((base - nudged).abs().max()) < 1e-4


@dataclass(frozen=True)
class Idle:
    """A layer that does nothing and says so."""

    name: ClassVar[str] = "idle"
    order: ClassVar[int] = 15

    def check(self, at: Any, stack: Any) -> None:
        pass

    def apply(self, at: Any) -> Applied:
        return Applied(lambda: None, dict, lambda: "Idle: it did nothing.")


def test_the_ledger_of_a_network(work, tmp_path):
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    images = torch.rand(64, 1, 4, 4) * 2 - 1
    features = classifier(images, torch.arange(64) % 3, 3, seed=0, iterations=5)
    judged = Workload(work.model, 8, sampling=SAMPLING, batch=4, judge=Judge(features, images, torch.arange(64) % 3))
    told: list[str] = []
    got = build(
        judged,
        [Cast(), Cache(threshold=1e-9), Idle(), Guidance(reuse=2)],
        count=16,
        repeats=1,
        rounds=1,
        tell=told.append,
    )
    assert [x.name for x in got.lines[:5]] == ["baseline", "cast", "idle", "cache", "guidance"]
    cast, cache, idle = (got.line(n) for n in ("cast", "cache", "idle"))
    assert cast and cache and idle
    assert (
        cast.p50 > 0 and cast.memory >= 0 and cast.counts["cast"]["tensors"] > 0 and 30 < cast.trajectory["psnr"] < 120
    )
    assert "raise threshold" in cache.refused and idle.refused == "Idle: it did nothing." and math.isnan(cache.p50)
    pair = got.line("guidance", "cast")
    assert pair and got.interaction(pair) is not None and {"fd", "recall"} <= pair.quality.keys()
    assert pair.quality["fd_more_low"] < pair.quality["fd_more"] < pair.quality["fd_more_high"]
    assert "fd_more" not in got.lines[0].quality
    assert got.floor["psnr"] > 60 and got.quality_floor["fd"] > 0 and got.seed_floor["fd"] > 0
    assert "samples: cast" in told and "round 1 of 1: cast" in told
    assert all(torch.equal(v, before[k]) for k, v in work.model.state_dict().items())
    save(got, tmp_path / "out", "A stack")
    text = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert text["machine"]["cores"] and text["lines"][0]["name"] == "baseline"
    assert text["lines"][3]["verdict"] == cache.refused and "gain" not in text["lines"][3]
    html = (tmp_path / "out" / "ledger.html").read_text()
    assert html.count("<tr") == 2 * len(got.lines) + 1 and "data:image/png;base64," in html
    assert (tmp_path / "out" / "ledger.png").read_bytes()[:4] == b"\x89PNG"


def test_lpips_is_in_the_ledger_where_its_weights_are(work, tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert "LPIPS" not in page(build(work, [Cast()], count=2, repeats=1, rounds=1), "")
    monkeypatch.setattr("hasten.measure.perceptual.at_hand", lambda: True)
    monkeypatch.setattr("hasten.measure.perceptual.lpips", lambda a, b: float((a - b).abs().mean()) + 0.25)
    got = build(work, [Cast()], count=2, repeats=1, rounds=1)
    cast = got.line("cast")
    assert cast and cast.trajectory["lpips"] > got.floor["lpips"] > got.lines[0].trajectory["lpips"] == 0.25
    html = page(got, "A stack")
    assert "<th>LPIPS</th>" in html and f"<td>{cast.trajectory['lpips']:.4f}</td>" in html and 'colspan="12"' in html


def test_a_layers_refusal_is_not_the_pipelines():
    pipe, call = FAMILIES["dit"]()
    with pytest.raises(ConfigError, match="4 steps") as told, speed_up(pipe, Cache("schedule", mask="0010"), call=call):
        picture(pipe, call, 6, 0, 0)
    assert "refuses this call" not in str(told.value)


def test_layers_that_cannot_come_off_are_refused(work):
    with pytest.raises(ConfigError, match="cast is there 2 times"):
        build(work, [Cast(), Cast()])
    with pytest.raises(ConfigError, match="set keep: true for cast"):
        build(work, [Cast(keep=False)])


def test_a_stack_of_which_nothing_works_is_refused(work):
    with pytest.raises(ConfigError, match=r"No layer of this stack could be measured: Idle"):
        build(work, [Idle()], count=2)


def test_the_ledger_of_a_pipeline():
    pipe, call = FAMILIES["sd3"]()
    steps = {k: v for k, v in call.items() if k not in ("num_inference_steps", "prompt")}
    made = build(
        Workload(pipe, 6, steps, ["a cup", "two dogs"]), [Quantize(min_side=8), Cast()], count=2, repeats=1, rounds=1
    )
    assert [x.refused for x in made.lines] == [""] * 4 and made.lines[3].trajectory["psnr"] > 10
    assert as_dict(made)["lines"][3]["interaction"] > 0


def test_samples_of_a_workload_are_a_function_of_seed_and_place():
    pipe, call = FAMILIES["sd3"]()
    steps = {k: v for k, v in call.items() if k not in ("num_inference_steps", "prompt")}
    work = Workload(pipe, 2, steps, ["a cup", "two dogs", "rain"])
    all_of_them, _ = work.samples(3, seed=4)
    assert torch.equal(work.samples(2, seed=4, start=1)[0], all_of_them[1:])
    assert not torch.equal(work.samples(1, seed=5)[0], all_of_them[:1])
    assert torch.equal(picture(pipe, {**steps, "prompt": ["two dogs"]}, 2, 4, 1), all_of_them[1:2])


NEVER: dict[str, tuple[Any, str]] = {
    "few steps": (Cache(), "at most 1 of 4 could be skipped"),
    "another plan": (Cache("schedule", mask="00101"), "for requests of 5 steps, not 4"),
}


@pytest.mark.parametrize("case", NEVER)
@pytest.mark.parametrize("kind", ["pipeline", "native"])
def test_what_cannot_be_in_these_steps_is_known_before_anything_is_measured(case, kind, monkeypatch):
    layer, words = NEVER[case]
    made: Any = Workload(tiny(), 4, sampling=Sampling(even(4)))
    if kind == "pipeline":
        pipe, call = FAMILIES["dit"]()
        made = Workload(pipe, 4, {k: v for k, v in call.items() if k != "num_inference_steps"})
    monkeypatch.setattr(Workload, "samples", lambda *_: pytest.fail("samples were made"))
    with pytest.raises(ConfigError, match=f"No layer of this stack could be measured: Cache.*{words}"):
        build(made, [layer])


def test_a_refused_layer_leaves_the_rest_to_be_measured(work):
    told: list[str] = []
    short = Workload(work.model, 4, sampling=Sampling(even(4)))
    got = build(short, [Cast(), Cache()], count=1, repeats=1, rounds=1, tell=told.append)
    assert [bool(x.refused) for x in got.lines] == [False, False, True, True] and got.lines[1].p50 > 0
    assert not any("cache" in text for text in told)
