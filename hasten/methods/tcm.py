"""Truncated consistency models: a consistency model of late times, held by one of all times. Lee et al. 2025."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.curriculum import check_doublings, doubled, doubling_of
from hasten.core.denoiser import Batch, predict
from hasten.core.errors import ConfigError
from hasten.core.losses import consistency_target, ect_earlier, logged, pseudo_huber
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn
from hasten.core.path import Path, expand
from hasten.core.times import LogNormal, LogStudentT, Times, ratio_at


@dataclass(frozen=True)
class TCM:
    """Stage 1 trains f at all times from data (CT with ECT's schedule); stage 2 goes on with it at t >= t' alone.

    In stage 2 the target at r < t' is that of the frozen stage 1, which is the teacher there. A share of the batch has
    t = t', where this is the boundary condition, without which f could collapse. The gap stays at its smallest.

    Args:
        times: Training times of stage 1.
        late: Those of stage 2; what falls below t' counts as t'.
        transition: t' as a unit time; on EDM 0.4 is sigma = 0.97, where the paper has 1.
        boundary: Share of the batch with t = t'.
        boundary_weight: Weight of its mean loss. The paper's 0.1 goes with a rate of 5e-5; at 1e-3 it lets f drift
            away from stage 1 at t', where every sampling of more than one step looks last.
        first: Share of the iterations that stage 1 gets.
        q, double_every, doublings: ECT's gap, made q-fold smaller every so many iterations of stage 1; 0 spreads that
            over stage 1.
        huber: c of the pseudo-Huber distance, per square root of a dimension.
        stage: 1 or 2; set by :meth:`stages`.
    """

    times: Times = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    late: Times = field(default_factory=lambda: LogStudentT(0.0, 0.2, 0.01, low=0.4))
    transition: float = 0.4
    boundary: float = 0.25
    boundary_weight: float = 0.3
    first: float = 0.5
    q: float = 2.0
    double_every: int = 0
    doublings: int = 7
    huber: float = 5.4e-4
    stage: int = 1
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not (0 < self.transition < 1 and 0 < self.boundary < 1 and 0 < self.first < 1):
            raise ConfigError("TCM: transition, boundary and first must lie between 0 and 1.")
        check_doublings("TCM", self.double_every, self.doublings)

    def networks(self, teacher, clone: Clone):
        """The student starts as what came before; stage 2 keeps that, frozen."""
        nets = {"student": clone(teacher)}
        return nets if self.stage == 1 else {**nets, "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """All times, then late times; the average of the first is the teacher of the second."""
        count = round(self.first * iterations)
        every = doubling_of("TCM", self.double_every, self.doublings, count)
        return (replace(self, stage=1, double_every=every), count), (replace(self, stage=2), iterations - count)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling at times from 1 to t', then data: stage 2 forgets what lies below."""
        gap = (1 - self.transition) / max(steps - 1, 1)
        return Sampling((*(1 - i * gap for i in range(steps)), 0.0), "renoise")

    def draw(self, path: Path, n: int, device: torch.device) -> tuple[Tensor, int]:
        """Times [n] and how many of them, the first ones, are at the boundary."""
        if self.stage == 1:
            return self.times.draw(path, n, device), 0
        k = int(self.boundary * n + random.random())  # right on average for small batches, too
        t = self.late.draw(path, n, device)
        start = path.at(self.transition).to(t)
        return torch.cat([start.expand(k), t[k:].maximum(start)]), k

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """mean |f(x_t) - sg f(x_r)| / (t - r), plus ``boundary_weight`` times that of the boundary."""
        net, x0, eps = nets["student"], batch.data, batch.noise()
        path, late = net.path, self.stage == 2
        t, k = self.draw(path, len(x0), x0.device)
        ratio = ratio_at(path, t)
        s = self.doublings if late else doubled(step, self.double_every, self.doublings)
        below = ect_earlier(ratio, s, self.q)
        r = path.time(torch.atan(below))
        x_t, x_r = path.mix(x0, eps, t), path.mix(x0, eps, r)
        target = consistency_target(net, x_r, r, batch.cond)
        if late:
            frozen = consistency_target(nets["teacher"], x_r, r, batch.cond)
            target = torch.where(expand(r < path.at(self.transition).to(r), x_r), frozen, target)
        distance = pseudo_huber(predict(net, x_t, t, batch.cond), target, self.huber * x0[0].numel() ** 0.5)
        each = distance / (ratio - below)
        edge, inner = each[:k].sum() / max(k, 1), each[k:].sum() / max(len(each) - k, 1)  # either may be empty
        return inner + self.boundary_weight * edge, logged(tcm=inner, boundary=edge)
