"""Every method trains to the truth in the real loop: Gaussian data on three paths, a mixture, and guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.sample import sample
from hasten.core.times import Uniform
from hasten.fit import fit
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.flowmap import FlowMap
from hasten.methods.kd import KD
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.methods.scm import SCM
from hasten.methods.sid import SiD
from hasten.role import FitConfig
from tests.analytic import PATHS, Affine, LawSource, Small, Toy, shifted
from tests.oracle import Gaussian, Mixture

GAUSSIAN = Gaussian(0.6, 0.45)
MIXTURE = Mixture([-1.0, 0.8], [0.3, 0.25], [0.4, 0.6])


@dataclass(frozen=True)
class Run:
    """How a method is trained here: ``steps`` to sample with, and by what factor the error must fall."""

    method: Any
    steps: int = 1
    iterations: int = 200
    lr: float = 0.05
    factor: float = 5.0
    law: bool = False  # the error is that of the distribution, not of the trajectories
    wrong: bool = False  # starts from another law: the teacher itself is trained

MIDDLE = Uniform(0.05, 0.95)
RUNS = {
    "flow": Run(Flow(Uniform()), wrong=True, steps=20),
    "dmd2": Run(DMD2(gan_weight=0, student_every=2), iterations=400, law=True),
    "sid": Run(SiD(), iterations=400, law=True),
    "scm": Run(SCM(warmup=50)),
    "sct": Run(SCM(from_teacher=False, warmup=50)),
    "ct": Run(CM(double_every=40, doublings=5)),
    "cd": Run(CM(from_teacher=True, double_every=40, doublings=5)),
    "meanflow": Run(MeanFlow(same=0.25)),
    "meanflow_data": Run(MeanFlow(from_teacher=False, same=0.5)),
    "flowmap": Run(FlowMap()),
    "flowmap_data": Run(FlowMap(from_teacher=False)),
    "progressive": Run(Progressive(16, 1), iterations=400),
    "kd": Run(KD(1, 16)),
}


def error(net: Any, run: Run, law: Any) -> float:
    """Root mean square distance to the flow map from the same noise, or of sorted samples (Wasserstein 2)."""
    noise = torch.randn(256, 1, 1, 4, generator=torch.Generator().manual_seed(9))
    cond = {"label": torch.zeros(256, dtype=torch.long)} if len(net.laws) > 1 else {}
    gen = torch.Generator().manual_seed(7)
    got = sample(net, noise, cond, run.method.sampling(run.steps), generator=gen)
    want = law.flow_map(net.path, noise * net.path.coeffs(torch.tensor(net.path.t_max))[1], net.path.t_max, 0.0)
    if run.law:
        got, want = got.flatten().sort().values, want.flatten().sort().values
    return float((got - want).pow(2).mean().sqrt())


def trained(run: Run, where: str, law: Any, laws: Any, head: Any) -> tuple[float, float]:
    """(error before, error after)."""
    torch.manual_seed(0)
    start = Gaussian(0.0, 1.0) if run.wrong else laws
    teacher = Toy(start, *PATHS[where], "posterior", head())
    config = FitConfig(run.iterations, 64, lr=run.lr, schedule="cosine", ema=(0.9,), clip=10, precision="float32")
    before = error(teacher, run, law)
    source = LawSource(laws[0] if isinstance(laws, list) else laws, labelled=isinstance(laws, list))
    *_, last = fit(run.method, source, teacher, config)
    return before, error(last.student, run, law)
