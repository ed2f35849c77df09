"""One trained network and all that follows its own count of updates; how long and how to train."""

from __future__ import annotations

import hashlib
import math
import random
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, unknown
from hasten.core.method import Clone, Method
from hasten.distribute import clone, digest_of, world
from hasten.lora import LoRA, is_view
from hasten.qat import round_linears

OPTIMIZERS = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam, "adam": torch.optim.Adam}
SCHEDULES = {  # share of the learning rate at update n of `total`
    "constant": lambda n, total: 1.0,
    "linear": lambda n, total: 1 - n / total,
    "cosine": lambda n, total: 0.5 * (1 + math.cos(math.pi * n / total)),
    "rsqrt": lambda n, total: 1 / math.sqrt(max(1.0, n / (0.2 * total))),
}


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train.

    Args:
        batch: Samples per update over all ranks and micro-steps; divisible by ranks times ``accumulate``.
        lr: Learning rate; ``lrs`` overrides it by network name.
        warmup: Updates of a network over which its learning rate rises from 0.
        clip: Gradient norm per network.
        ema: Decays of the student's averages; the first is the one that is kept. Early on (1 + n)/(10 + n).
        precision: ``float32``, ``bfloat16`` (autocast over float32 masters), or ``auto``: bfloat16 where the device
            computes in it natively.
        clone: ``full`` copies the teacher for every trained network; ``lora`` trains adapters on the teacher's own,
            frozen weights, which all networks share.
        lora_rank: Rank of the adapters.
        lora_alpha: W + (alpha / rank) B A; None is the rank.
        qat: ``int8`` trains the student as ``Quantize("int8", qat_min_side)`` will run it, with rounded weights and
            activations; its average is kept without rounding. None is off.
        qat_min_side: Both sides of a linear that is rounded have at least this many features.
        explode: |loss| beyond which training stops as diverged.
        save_every: Iterations between checkpoints, where an output folder is given.
    """

    iterations: int = 2000
    batch: int = 256
    accumulate: int = 1
    lr: float = 1e-3
    lrs: dict[str, float] = field(default_factory=dict)
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    ema: tuple[float, ...] = (0.999,)
    precision: str = "auto"
    clone: str = "full"
    lora_rank: int = 64
    lora_alpha: float | None = None
    qat: str | None = None
    qat_min_side: int = 512
    seed: int = 0
    explode: float = 1e6
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "accumulate", "lr", "clip", "save_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"fit.{name} must be positive, not {getattr(self, name)}.")
        if self.warmup < 0:
            raise ConfigError(f"fit.warmup must be 0 or more updates, not {self.warmup}.")
        for what, name, known in (("optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if name not in known:
                raise unknown(what, name, known)
        if not self.ema or not all(0 <= d < 1 for d in self.ema):
            raise ConfigError(f"fit.ema needs at least one decay in [0, 1), not {self.ema}.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise unknown("precision", self.precision, ("auto", "float32", "bfloat16"))
        if self.clone not in ("full", "lora"):
            raise unknown("clone", self.clone, ("full", "lora"))
        if self.clone == "full" and (self.lora_rank != 64 or self.lora_alpha is not None):
            raise ConfigError("fit.lora_rank and fit.lora_alpha shape adapters; set fit.clone to lora, or leave them.")
        if self.lora_rank < 1 or (self.lora_alpha is not None and not self.lora_alpha > 0):
            raise ConfigError(f"fit.lora_rank and fit.lora_alpha must be positive, not {self.lora_rank} and "
                              f"{self.lora_alpha}.")  # fmt: skip
        if self.qat not in (None, "int8"):
            raise unknown("qat", str(self.qat), ("int8",))
        if self.qat and self.clone == "lora":
            raise ConfigError("fit.qat rounds full weights, which adapters do not train; set fit.clone to full.")
        if not self.qat and self.qat_min_side != 512:
            raise ConfigError("fit.qat_min_side chooses what fit.qat rounds; set fit.qat to int8, or leave it out.")

    def suited(self, method: Any) -> Any:
        """``method`` as this trains it: with rounded numbers a finite difference says little of the derivative."""
        return replace(method, jvp_mode="exact") if self.qat and getattr(method, "jvp_mode", "") == "auto" else method

    def cloner(self, teacher: Any) -> Clone:
        """What ``networks`` gets as ``clone``. Raises ConfigError for a teacher that is a view itself."""
        if is_view(teacher):
            raise ConfigError("The teacher has adapters on weights of another network; give hasten.merge(teacher).")
        return clone if self.clone == "full" else partial(clone, lora=LoRA(self.lora_rank, self.lora_alpha))


class Role:
    """One trained network with all that follows its own count of updates: optimiser, schedule, averages."""

    def __init__(self, name: str, net: nn.Module, config: FitConfig, total: int, averaged: bool):
        self.name, self.net, self.config, self.total, self.count = name, net, config, total, 0
        if config.qat and averaged:
            round_linears(net, config.qat, config.qat_min_side)
        self.parameters = list(net.parameters())
        make = OPTIMIZERS[config.optimizer]
        self.opt = make(self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.emas = [clone(net).requires_grad_(False).eval() for _ in config.ema] if averaged else []

    def clip(self) -> float:
        """Clip the accumulated gradients to this network's own norm; returns the norm before clipping."""
        return float(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))

    def update(self) -> None:
        """One optimiser step on the accumulated gradients, then the averages."""
        c = self.config
        rise = min(1.0, (self.count + 1) / c.warmup) if c.warmup else 1.0
        for group in self.opt.param_groups:
            group["lr"] = c.lrs.get(self.name, c.lr) * rise * SCHEDULES[c.schedule](self.count, self.total)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.count += 1
        for decay, ema in zip(c.ema, self.emas, strict=False):
            w = 1 - min(decay, (1 + self.count) / (10 + self.count))
            for average, p in zip(ema.parameters(), self.parameters, strict=True):
                average.lerp_(p.detach(), w)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, flat."""
        flat = {f"{self.name}/net/{k}": v for k, v in self.net.state_dict().items()}
        for i, ema in enumerate(self.emas):
            flat |= {f"{self.name}/ema{i}/{k}": v for k, v in ema.state_dict().items()}
        for i, state in self.opt.state_dict()["state"].items():
            flat |= {f"{self.name}/opt/{i}/{k}": v for k, v in state.items()}
        return {k: v.clone() for k, v in flat.items()}

    def restore(self, flat: dict[str, Tensor], count: int) -> None:
        """The inverse of :meth:`tensors`."""
        mine = {k.split("/", 1)[1]: v for k, v in flat.items() if k.startswith(f"{self.name}/")}
        for part, net in (("net", self.net), *((f"ema{i}", e) for i, e in enumerate(self.emas))):
            net.load_state_dict({k.split("/", 1)[1]: v for k, v in mine.items() if k.startswith(f"{part}/")})
        state: dict[int, dict[str, Tensor]] = {}
        for k, v in mine.items():
            if k.startswith("opt/"):
                _, i, name = k.split("/")
                state.setdefault(int(i), {})[name] = v
        self.opt.load_state_dict({"state": state, "param_groups": self.opt.state_dict()["param_groups"]})
        self.count = count

    def learns(self, yes: bool) -> None:
        """Let gradients reach this role's own parameters, or not."""
        for p in self.parameters:
            p.requires_grad_(yes)


def seed_all(*key: int, rank: int) -> torch.Generator:
    """Seed Python's generator from ``key`` (control flow: the same on every rank) and torch's from key and rank."""

    def hashed(*parts: Any) -> int:  # hashed, not multiplied: products overflow and collide
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1

    random.seed(hashed(*key))
    torch.manual_seed(hashed(*key, rank))
    return torch.Generator().manual_seed(hashed("data", *key, rank))


def autocast(precision: str, device: torch.device) -> Any:
    """The autocast context of a precision; ``auto`` is bfloat16 where the device computes in it natively."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    low = precision == "bfloat16" or (precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def fingerprint(method: Method, source: Any, teacher: Any, config: FitConfig, start: Any = None) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to this run."""
    settings = {f"fit.{k}": repr(v) for k, v in asdict(config).items() if k != "save_every"}
    probe = source.batch(4, torch.Generator().manual_seed(0), "cpu")  # a name alone does not tell data apart
    few = digest_of(t for t in (probe.x0, probe.pairs, *probe.cond.values()) if t is not None)
    data = f"{getattr(source, 'name', '')} {tuple(source.shape)} {few}"
    about = {"method": repr(method), "data": data, "teacher": digest_of(teacher.parameters()), "ranks": world()[1]}
    return about | settings | ({} if start is None else {"start": digest_of(start.parameters())})
