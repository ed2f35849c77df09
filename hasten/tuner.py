"""Budget first: the fastest stack whose measured loss stays within what a person allows, as a signed plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hasten.budget import NONE, Budget, said
from hasten.core.errors import ConfigError, HastenError
from hasten.costs import Gram, Steps, Trace, Watch, moves, plans, refined
from hasten.fitted import fitted
from hasten.ledger import GAIN, Nudge, clocked, with_layers
from hasten.measure.clock import machine, summary
from hasten.measure.judge import Judge
from hasten.measure.perceptual import lpips
from hasten.measure.quality import trajectory
from hasten.speed import TRANSFORMS, Cast, Compile, Quantize, speed_up
from hasten.speed.calibrate import calibrate
from hasten.speed.compile import cpp_compiler
from hasten.speed.plan import Plan, fingerprint
from hasten.workload import Workload, own_steps

WATCHED = 4  # requests whose predictions are kept
JUDGED = 500  # fewer samples say too little of a distribution
SURE = 1.645  # standard errors: a share that 95 of 100 repetitions stay below


@dataclass
class Set:
    """A set of requests with the model's own samples: for the search, or held out.

    Args:
        work: What runs, whose prompts the model was probed with.
        asked: What is asked of it: the same with the prompts of this set.
    """

    work: Workload
    asked: Workload
    count: int
    seed: int
    start: int
    base: Tensor = field(init=False)
    above: Callable[[Tensor], tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        self.base = self.samples()
        if self.work.judge is not None:
            self.above = self.work.judge.paired(self.base, len(self.base) // self.count)

    def samples(self) -> Tensor:
        """Images [N, C, H, W], the same noise every time."""
        return self.asked.samples(self.count, self.seed, self.start)[0]

    def loss(self, layers: Sequence[Any], wanted: Mapping[str, float]) -> dict[str, float]:
        """What the samples under the layers lose. Raises where the layers cannot work or do nothing."""
        images = with_layers(layers, self.work, self.samples)
        found = trajectory(self.base, images)
        if "lpips" in wanted:
            found["lpips"] = lpips(self.base, images)
        if self.above and "fd" in wanted:
            found["fd"], error = self.above(images)
            found["fd_high"] = found["fd"] + SURE * error
        return found


@dataclass
class Point:
    """A measured stack: a point of the front."""

    layers: list[Any]
    loss: dict[str, float]
    seconds: float
    modes: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        layers = [t.name for t in self.layers]
        return {"layers": layers, "steps": self.modes, "loss": plain(self.loss), "seconds": self.seconds}


def plain(loss: Mapping[str, float]) -> dict[str, Any]:
    """For a file."""
    return {k: (round(v, 5) if math.isfinite(v) else "inf") for k, v in loss.items()}


class Search:
    """One tuning run: what it measured so far, and how it tells."""

    def __init__(self, work: Workload, budget: Budget, calls: int, tell: Callable[[str], None]):
        self.work, self.budget, self.tell = work, budget, tell
        self.left_out: dict[str, str] = {}
        self.choices: list[Steps] = []
        self.watched: list[Trace] = []
        self.found: tuple[Gram, Tensor]
        self.made: dict[str, list[Any]] = {}  # layers by modes
        self.said: dict[str, float] = {}  # the last loss on held-out requests, and how often one was asked for
        self.verified_points = 0
        self.device = next(work.host.net.parameters()).device
        if budget.judged and work.judge is None:
            raise ConfigError("A budget in fd needs real images to judge by: give data or a judge.")
        if budget.judged and calls < JUDGED:
            raise ConfigError(
                f"A budget in fd needs calls of {JUDGED} or more, not {calls}: with few samples the distance's own "
                "bias hides what changed."
            )
        tell("the model's own samples")
        one, two = (work.subjects[::2], work.subjects[1::2]) if len(work.subjects) > 1 else (work.subjects,) * 2
        self.seen = Set(work, replace(work, subjects=one), calls, 0, 0)
        self.held_out = Set(work, replace(work, subjects=two), calls, 1, calls)
        self.floor = self.nudged()
        self.points = [Point([], NONE, self.clock([]))]

    def nudged(self) -> dict[str, float]:
        """What a flipped last bit loses, by the metrics of the budget that compare samples with samples."""
        wanted = Budget({k: v for k, v in self.budget.limits.items() if k != "fd"})
        if not wanted.limits:
            return {}
        found = self.seen.loss([Nudge()], wanted.limits)
        if not wanted.holds(found):
            raise ConfigError(
                f"max_loss asks for {said(wanted.limits)}, and a flipped last bit of the noise alone makes "
                f"{said({k: found[k] for k in wanted.limits})}: nothing can stay within that; allow more."
            )
        return {k: found[k] for k in wanted.limits}

    def clock(self, layers: Sequence[Any]) -> float:
        """Median seconds of a request under the layers."""
        return summary(with_layers(layers, self.work, lambda: clocked(self.work.request, 3, self.device))).p50

    def point(self, layers: list[Any], modes: str = "") -> Point:
        """Measure a stack, beside the baseline of the moment, so that a machine that slows down slows both."""
        loss = self.seen.loss(layers, self.budget.limits)
        slower = self.clock([]) / self.points[0].seconds
        made = Point(layers, loss, self.clock(layers) / slower, modes)
        self.points.append(made)
        return made

    # --- the layers that change no step -----------------------------------------------------------------------

    def whole_layers(self, candidates: Sequence[Any]) -> list[Any]:
        """Those candidates, one on top of the other, that gain and stay within the budget; the reasons for the rest."""
        kept: list[Any] = []
        before = self.points[0].seconds
        for layer in candidates:
            self.tell(f"trying {layer.name}")
            try:
                found = self.point([*kept, layer])
                if not self.budget.holds(found.loss) and isinstance(layer, Quantize):
                    layer, found = self.finer(kept, layer, found)
            except HastenError as error:
                self.left_out[layer.name] = str(error)
                continue
            if not self.budget.holds(found.loss):
                self.left_out[layer.name] = f"its loss is over the budget: {said(found.loss)}"
            elif before / found.seconds < GAIN:
                self.left_out[layer.name] = f"it gains nothing here ({before / found.seconds:.2f} times)"
            else:
                kept, before = [*kept, layer], found.seconds
        return kept

    def finer(self, kept: list[Any], layer: Quantize, rough: Point) -> tuple[Quantize, Point]:
        """The layer with an eighth, a quarter or half of the linears, the worst first, in full precision.

        The first that is within the budget, else the last that was tried.
        """
        few = [lambda model: self.few()]
        learnt = calibrate(self.work.model, few, call=self.call, calls=0, ranges=layer.ranges)
        worst, own = layer.worst_first(self.work.host, learnt), layer.skip
        for share in (8, 4, 2) if len(worst) > 1 else ():
            layer = replace(layer, skip=(*own, *worst[: -(-len(worst) // share)]))
            self.tell(f"trying quantize without {len(layer.skip)} of {len(worst)} linears")
            rough = self.point([*kept, layer])
            if self.budget.holds(rough.loss):
                break
        return layer, rough

    # --- the steps --------------------------------------------------------------------------------------------

    def costs(self, kept: list[Any]) -> tuple[Gram, Tensor]:
        """Products of what the model says as it will run, under the layers already kept, and what a step moves."""
        self.tell("watching requests")
        self.watched, at = self.watch(kept), self.work.host
        assert at.path is not None and at.kind is not None
        return Gram.of(self.watched), moves(self.watched[0], at.path, at.kind)

    def watch(self, layers: Sequence[Any]) -> list[Trace]:
        """What the network says in a few requests under the layers."""
        watch = Watch()
        with speed_up(self.work.model, *layers, watch, call=self.call):
            self.few()
        return watch.traces

    def few(self) -> None:
        """The first requests of the search, again."""
        self.seen.asked.samples(min(self.seen.count, WATCHED))

    @property
    def call(self) -> dict[str, Any] | None:
        """How a pipeline is shown to ``speed_up``."""
        return self.work.shown

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one sample as the network takes it; None where no request was watched."""
        return tuple(self.watched[0].x[0].shape[1:]) if self.watched else None

    def layers_of(self, plan: Steps, kept: list[Any]) -> list[Any]:
        """The layers of a plan, its forecasts fitted to the model as it runs under those already kept."""
        if plan.modes not in self.made:
            cache, guidance = plan.cache(), plan.guidance(self.watched[0].scale)
            if cache:
                self.tell(f"fitting {plan.modes}")
                run, at = (lambda layers: self.watch([*kept, *layers])), self.work.host
                assert at.path is not None and at.kind is not None
                cache = plan.cache(fitted(plan.modes, self.watched, run, at.path, at.kind, guidance))
            self.made[plan.modes] = [*cache, *guidance]
        return self.made[plan.modes]

    def steps(self, kept: list[Any]) -> list[Point]:
        """Points of the fewest branch evaluations whose loss is within the budget, found by bisection."""
        try:
            self.found = self.costs(kept)
        except HastenError as error:
            self.left_out["steps"] = str(error)
            return []
        choices, good = plans(*self.found), []
        low, high = 0, len(choices) - 1  # units fall, losses rise
        while low <= high:
            mid = (low + high) // 2
            plan = choices[mid] = refined(*self.found, choices[mid])
            try:
                layers = self.layers_of(plan, kept)
                if not layers:
                    low = mid + 1
                    continue
                self.tell(f"{plan.units} evaluations: {plan.modes}")
                made = self.point([*kept, *layers], plan.modes)
            except HastenError as error:
                self.left_out["steps"] = str(error)
                return good
            if self.budget.holds(made.loss):
                good.append(made)
                low = mid + 1
            else:
                high = mid - 1
        self.choices = choices
        return good

    # --- the choice -------------------------------------------------------------------------------------------

    def verified(self, kept: list[Any]) -> tuple[Point, dict[str, float]]:
        """The fastest point that also holds on held-out requests; gentler plans are tried until one does."""
        for made in sorted(filter(self.good, self.points[1:]), key=lambda p: p.seconds):
            if self.verifies(made):
                return made, self.said
            units = evaluations(made.modes, self.choices)
            gentler = [p for p in self.choices if made.modes and p.modes and p.units > units]
            for plan in (refined(*self.found, p) for p in gentler[::-1][:3]):
                try:
                    again = self.point([*kept, *self.layers_of(plan, kept)], plan.modes)
                    if self.good(again) and self.verifies(again):
                        return again, self.said
                except HastenError as error:
                    self.left_out[f"steps {plan.modes}"] = str(error)
        raise ConfigError(
            f"Nothing faster stays within {said(self.budget.limits)} on held-out requests; "
            + " ".join(f"{k}: {v}" for k, v in self.left_out.items())
        )

    def verifies(self, point: Point) -> bool:
        """Whether a point holds on the held-out requests, whose loss is then in ``said``."""
        self.tell(f"verifying on held-out requests: {said(point.loss)}")
        self.verified_points += 1
        self.said = self.held_out.loss(point.layers, self.budget.limits)
        return self.budget.holds(self.said)

    def good(self, point: Point) -> bool:
        """Whether a point is within the budget and faster than the model."""
        return self.budget.holds(point.loss) and self.points[0].seconds / point.seconds >= GAIN


def evaluations(modes: str, choices: Sequence[Steps]) -> int:
    """Branch evaluations of a plan among these, of a guided or an unguided model."""
    return next((p.units for p in choices if p.modes == modes), 0)


def usual(work: Workload) -> list[Any]:
    """The layers that are tried where nobody says which: those that can work here."""
    found: list[Any] = [Cast(), Quantize("int8"), *([TRANSFORMS["attention"]()] if "attention" in TRANSFORMS else [])]
    on_cpu = next(work.host.net.parameters()).device.type == "cpu"
    return [*found, Compile()] if not on_cpu or cpp_compiler() else found


def tune(
    model: Any,
    prompts: Sequence[Any] | None = None,
    *,
    max_loss: Mapping[str, Any],
    steps: int | None = None,
    calls: int = 20,
    layers: Sequence[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    sampling: Any = None,
    judge: Judge | None = None,
    batch: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The fastest stack for a model whose measured loss stays within ``max_loss``, verified on held-out requests.

    First the layers that change every call alike (casting, quantization, attention, compilation) are tried one on top
    of the other. On the model as it then runs, requests are watched, the cost of holding any step or leaving out its
    guidance is computed for all pairs, and an exact dynamic programme gives the best plan for every number of
    evaluations; bisection finds the fewest within the budget.

    Args:
        model: A diffusers pipeline, or a native denoiser with ``sampling``.
        prompts: For a pipeline, used in turn. Every second one is held out; of a single one other noise is.
        max_loss: {"psnr": 30}, {"ssim": 0.95}, {"lpips": 0.05} to the model's own samples, or {"fd": "5%"} of its
            FD + floor against real images, which needs a judge; the upper end of the measured share counts.
        steps: Sampling steps of a pipeline; default its own.
        calls: Requests on which each candidate is compared, and as many held out.
        layers: What to try in place of the usual ones, in order; cache and guidance are planned in any case.
        call: Arguments of the pipeline's call, such as guidance_scale and height.

    Raises:
        ConfigError: For a budget that is none, or where nothing faster stays within it.
    """
    for name, value in (("calls", calls), ("steps", 1 if steps is None else steps), ("batch", batch)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"tune: {name} must be a whole number from 1, not {value!r}.")
    many = steps or own_steps(model) if sampling is None else len(sampling.times) - 1
    if steps not in (None, many):
        raise ConfigError(f"tune: sampling has {many} steps, not {steps}; leave steps out, which is for pipelines.")
    about = [prompts] if isinstance(prompts, str) else list(prompts or ())
    work = Workload(model, many, dict(call or {}), about, sampling, batch, judge)
    return found_for(work, Budget.of(max_loss), calls, layers, tell)


def found_for(
    work: Workload, budget: Budget, calls: int, layers: Sequence[Any] | None, tell: Callable[[str], None]
) -> Plan:
    """As :func:`tune`, for a workload and a budget that were checked."""
    if planned := [t.name for t in layers or () if t.name in ("cache", "guidance")]:
        raise ConfigError(f"tune plans the steps itself: leave {' and '.join(planned)} out of its layers.")
    search = Search(work, budget, calls, tell)
    kept = search.whole_layers(usual(work) if layers is None else layers)
    search.steps(kept)
    best, held_out = search.verified(kept)
    measured = {
        "budget": dict(budget.limits), "loss": best.as_dict()["loss"],
        "held_out": replace(best, loss=held_out).as_dict()["loss"],
        "gain": round(search.points[0].seconds / best.seconds, 3),
        "front": [p.as_dict() | {"within": budget.holds(p.loss)} for p in front(search.points, budget)],
        "floor": plain(search.floor), "left_out": search.left_out, "calls": calls,
        "verifications": search.verified_points, "machine": machine(search.device),
        "held-out prompts": len(search.held_out.asked.subjects) if len(work.subjects) > 1 else 0,
    }  # fmt: skip
    return Plan(tuple(best.layers), fingerprint(work.host, work.steps, search.shape, work.guidance), measured)


def front(points: Sequence[Point], budget: Budget) -> list[Point]:
    """The points that no other one beats in both time and every loss of the budget, fastest first."""
    ordered, found = sorted(points, key=lambda p: p.seconds), []
    for p in ordered:
        if not any(budget.beats(q.loss, p.loss) for q in found):
            found.append(p)
    return found
