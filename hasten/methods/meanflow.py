"""MeanFlow and improved MeanFlow: the mean velocity from t to r. Geng et al. 2025a and 2025b."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode, derivative, sum_dims
from hasten.core.denoiser import Batch, dropped, guided, on_path
from hasten.core.errors import ConfigError
from hasten.core.flowmaps import part
from hasten.core.losses import logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even, needs_teacher
from hasten.core.path import RECTIFIED_FLOW, expand
from hasten.core.times import LogitNormal, Times


@dataclass(frozen=True)
class MeanFlow:
    """u(x_t, t, r) satisfies u = v - (t - r) du/dt (eq. 6); on other paths it runs through OnPath(RECTIFIED_FLOW).

    Improved MeanFlow (2025b) reads it as V = u + (t - r) sg(du/dt), a function of x_t alone, regressed on v: du/dt
    then follows the network's own velocity u(x_t, t, t), and half of the batch has r = t.

    One step is u(x_1, 1, 0), so that long gaps have to be met. Times and ``same`` are those of the authors' code for
    CIFAR-10; ImageNet's, two draws of LogitNormal(-0.4, 1) and same = 0.75, have t > 0.9 and r < 0.1 in one of ten
    thousand samples, which takes hundreds of epochs. So does a large ``power``, which favours short gaps.

    Args:
        times, earlier: The laws of two draws, the larger of which is t and the smaller r; no ``earlier`` draws twice
            from ``times``.
        from_teacher: v is the teacher's (guided) velocity; else the conditional eps - x0 of the data.
        same: Share of the batch with r = t, which is plain flow matching.
        own_tangent: Improved MeanFlow; else du/dt follows v.
        self_cfg_scale: Guidance w without a teacher, which needs ``own_tangent``: the target is the data's
            v + (1 - 1/w) (u_c - u_u) with the network's own velocities, whose fixed point is u_u + w (v - u_u).
        drop: Share of conditions replaced by the unconditional one; only with ``self_cfg_scale``.
        power, floor: The weight 1 / (error + floor)^power, with the error summed over pixels (eq. 22); the paper's
            power is 1 on ImageNet and 0.75 on CIFAR-10, from data.
        jvp_mode: ``exact`` (forward-mode AD), ``central`` (a difference), or ``auto``: see ``core.calculus.jvp``.
    """

    times: Times = field(default_factory=lambda: LogitNormal(-0.6, 1.6))
    from_teacher: bool = True
    cfg_scale: float | None = None
    same: float = 0.25
    own_tangent: bool = False
    self_cfg_scale: float | None = None
    drop: float = 0.1
    power: float = 0.5
    floor: float = 1e-2
    earlier: Times | None = field(default_factory=lambda: LogitNormal(-4.0, 1.6))
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        needs_teacher(self.cfg_scale, self.from_teacher)
        if self.self_cfg_scale is not None and (self.from_teacher or not self.own_tangent or self.self_cfg_scale < 1):
            raise ConfigError("self_cfg_scale must be at least 1, and goes with own_tangent and without a teacher.")

    def networks(self, teacher, clone: Clone):
        """The student is the teacher with a second time."""
        student = clone(teacher, second_time=True)
        return {"student": student, "teacher": teacher} if self.from_teacher else {"student": student}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Hops of the mean velocity."""
        return Sampling(even(steps), "ode", two_time=True)

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """|u - sg(v - (t - r)(v' d_x u + d_t u))|^2, adaptively weighted; dr/dt = 0; v' is v or the network's own."""
        net = on_path(nets["student"], RECTIFIED_FLOW, "velocity")
        x0, eps, path = batch.data, batch.noise(), net.path
        a, b = (law.draw(path, len(x0), x0.device) for law in (self.times, self.earlier or self.times))
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        k = round(self.same * len(x0))  # samples are independent, so the first k may be the ones with r = t
        r = torch.cat([t[:k], r[k:]])
        x_t = path.mix(x0, eps, t)
        if self.from_teacher:
            teacher = on_path(nets["teacher"], RECTIFIED_FLOW, "velocity")
            with torch.no_grad():
                v = guided(teacher, x_t, t, batch.cond, batch.uncond, self.cfg_scale, "velocity")
        else:
            v = path.target(x0, eps, t, "velocity")
        target = v
        if self.own_tangent:
            target, v, batch = self.own(net, x_t, t, v, batch, k)
        if k < len(x0):
            rest = part(batch.cond, slice(k, None))

            def u(x: Tensor, t: Tensor) -> Tensor:
                return net(x, t, rest, r=r[k:])

            du = derivative(u, (x_t[k:], t[k:]), (v[k:], torch.ones_like(t[k:])), self.jvp_mode)
            target = torch.cat([target[:k], target[k:] - expand(t[k:] - r[k:], du) * du])
        error = sum_dims((net(x_t, t, batch.cond, r=r) - target).float().pow(2))
        weight = (error.detach() + self.floor).pow(-self.power)
        return (weight * error).mean(), logged(meanflow=error.mean())

    @torch.no_grad()
    def own(self, net, x_t: Tensor, t: Tensor, v: Tensor, batch: Batch, k: int) -> tuple[Tensor, Tensor, Batch]:
        """What V should be, the network's own velocity (v where it is not needed), and the batch as it is used."""
        if self.self_cfg_scale is None:
            rest = part(batch.cond, slice(k, None))
            return v, torch.cat([v[:k], net(x_t[k:], t[k:], rest, r=t[k:])]), batch
        if not batch.cond:
            raise ConfigError("self_cfg_scale guides by conditions, and these data have none; leave it out.")
        batch = replace(batch, cond=dropped(batch, self.drop))
        own = net(x_t, t, batch.cond, r=t)
        return v + (1 - 1 / self.self_cfg_scale) * (own - net(x_t, t, batch.uncond, r=t)), own, batch
