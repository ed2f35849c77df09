"""Less memory for weights, through diffusers: offloaded until they are needed, or stored in 8 bits layer by layer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel
from hasten.speed.foreign import assign, packed
from hasten.speed.host import Host, skeleton
from hasten.speed.products import by_torchao
from hasten.speed.transform import Applied, Transform, one_of, override, switch, whole_number

LEVELS = ("group", "model", "sequential")


class Before:
    """What hooks change of modules: forwards, hook registries, and which tensors are where; ``back`` restores it."""

    def __init__(self, modules: Iterable[nn.Module], *, data: bool):
        self.modules = [m for root in modules for m in root.modules()]
        self.own = [{k: vars(m)[k] for k in ("forward", "_diffusers_hook") if k in vars(m)} for m in self.modules]
        self.tensors = [(m, dict(m._parameters), dict(m._buffers)) for m in self.modules]
        every = {v: None for _, p, b in self.tensors for v in (*p.values(), *b.values()) if v is not None}
        self.data = [(v, v.data.cpu() if data else None, v.device) for v in every]

    def back(self) -> None:
        """Put everything back."""
        for m, own in zip(self.modules, self.own, strict=True):
            for key in ("forward", "_diffusers_hook", "_old_forward", "_hf_hook"):
                if key in own:
                    vars(m)[key] = own[key]
                else:
                    vars(m).pop(key, None)
        for m, parameters, buffers in self.tensors:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
        for tensor, data, device in self.data:
            assign(tensor, (tensor.data if data is None else data).to(device))


def unhooked(who: str, roots: Iterable[nn.Module]) -> None:
    """Raise ConfigError for modules that diffusers or accelerate hooked already."""
    for m in (m for root in roots for m in root.modules()):
        if hasattr(m, "_hf_hook") or getattr(getattr(m, "_diffusers_hook", None), "hooks", None):
            raise ConfigError(
                f"{who}: {type(m).__name__} has hooks of diffusers or accelerate already (offloading, casting, a "
                "cache); load the model without them."
            )


def no_compile(who: str, stack: Sequence[Transform]) -> None:
    """Raise ConfigError beside Compile."""
    if any(t.name == "compile" for t in stack):
        raise ConfigError(f"{who}: its hooks move weights in Python, which no compiled graph can; leave Compile out.")


def called(at: Host, count: dict[str, float]) -> Callable[[], None]:
    """Count the calls of the network under "calls"."""
    inner = at.net.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        count["calls"] += 1
        return inner(*args, **kwargs)

    return override(at.net, forward)


@dataclass(frozen=True)
class Offload:
    """Weights wait on the CPU, or on disk, and come to the device when they are needed.

    Args:
        level: ``group``: the denoiser's blocks, ``blocks`` at a time. ``model``: one of the pipeline's models at a
            time. ``sequential``: one layer at a time of every model, the least memory and the slowest.
        blocks: For ``group``.
        disk: For ``group``: a folder in which the weights wait instead, in a folder of their own that the undo removes.
        device: Where they are needed; left out, the accelerator of this machine.
    """

    level: str = "group"
    blocks: int = 1
    disk: str | None = None
    device: str | None = None
    name: ClassVar[str] = "offload"
    order: ClassVar[int] = 16

    def __post_init__(self) -> None:
        one_of("Offload", "level", self.level, LEVELS)
        if not whole_number(self.blocks, 1):
            raise ConfigError(f"Offload: blocks must be a whole number from 1, not {self.blocks!r}.")
        if isinstance(self.disk, os.PathLike):
            object.__setattr__(self, "disk", os.fspath(self.disk))  # a plan's YAML has plain text
        for field, example in (("disk", "'/tmp'"), ("device", "'cuda:1'")):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"Offload: {field} must be text such as {example}, or None, not {value!r}.")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ConfigError(f"Offload: torch knows no device {self.device!r}; try 'cuda:1'.") from error
        if self.disk is not None and self.level != "group":
            raise ConfigError(f"Offload: weights go to disk at level 'group' alone, not {self.level!r}.")

    @property
    def onload(self) -> torch.device:
        """Where the weights compute."""
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(self.device or found or "cpu")

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        no_compile("Offload", stack)
        unhooked("Offload", self._modules(at))
        if self.onload.type == "cpu" and self.disk is None:
            raise ConfigError(
                "Offload: there is no accelerator, so the weights would go from the CPU to the CPU; "
                "give disk=, a folder to keep them in (level 'group'), or leave Offload out."
            )
        if self.disk is not None and not os.path.isdir(self.disk):
            raise ConfigError(f"Offload: there is no folder {self.disk}; make it, or name another as disk.")
        torchaos = any(t.name == "quantize" and by_torchao(t) for t in stack)
        if self.disk is not None and (torchaos or any(packed(p) for p in at.net.parameters())):
            raise ConfigError("Offload: diffusers writes no weights of torchao's to disk; leave disk or torchao out.")
        if self.level != "group" and at.pipe is None:
            raise ConfigError(f"Offload: level {self.level!r} is for pipelines; use level='group' for one network.")

    def _modules(self, at: Host) -> list[nn.Module]:
        if self.level == "group":
            return [at.net]
        return [m for m in at.pipe.components.values() if isinstance(m, nn.Module)] if at.pipe is not None else []

    def apply(self, at: Host) -> Applied:
        """Hook the modules; the undo takes the hooks away and puts every tensor where it was."""
        count: dict[str, float] = {"groups": 0, "loads": 0, "calls": 0}
        # Sequential offloading replaces the Parameter objects by others without data.
        before = Before(self._modules(at), data=self.level == "sequential")
        undo = self._groups(at, count) if self.level == "group" else self._whole(at, count)
        uncount = called(at, count)

        def back() -> None:
            uncount()
            undo()
            before.back()

        def inert() -> str | None:
            if count["loads"]:
                return None
            return "Offload: no weights were moved; call the network inside, or leave Offload out."

        return Applied(back, lambda: dict(count), inert)

    def _groups(self, at: Host, count: dict[str, float]) -> Callable[[], None]:
        from diffusers.hooks.group_offloading import apply_group_offloading

        if not getattr(at.net, "_supports_group_offloading", True):
            raise UnsupportedModel(f"Offload: {type(at.net).__name__} cannot be offloaded in groups.")
        # A folder of its own: diffusers takes files that it finds in the folder for these weights.
        folder = None if self.disk is None else tempfile.mkdtemp(prefix="offload-", dir=self.disk)
        apply_group_offloading(
            at.net, onload_device=self.onload, offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=self.blocks, offload_to_disk_path=folder,
        )  # fmt: skip
        hooks = [getattr(m, "_diffusers_hook", None) for m in at.net.modules()]
        groups = {h.group: None for r in hooks if r and (h := r.get_hook("group_offloading"))}
        count["groups"] = len(groups)
        undos = []
        for group in groups:
            inner = group.onload_

            def onload(inner: Callable[[], None] = inner) -> None:
                count["loads"] += 1
                inner()

            undos.append(override(group, onload, "onload_"))

        def undo() -> None:
            for back in undos:
                back()
            for group in groups:
                if folder is not None:
                    group.onload_()  # the only place where its weights are
            for registry in hooks:
                if registry is not None:
                    registry.remove_hook("group_offloading", recurse=False)
            if folder is not None:
                shutil.rmtree(folder)

        return undo

    def _whole(self, at: Host, count: dict[str, float]) -> Callable[[], None]:
        pipe = at.pipe
        names = ("_offload_gpu_id", "_offload_device", "_all_hooks")
        own = {k: vars(pipe)[k] for k in names if k in vars(pipe)}
        enable = pipe.enable_model_cpu_offload if self.level == "model" else pipe.enable_sequential_cpu_offload
        enable(device=self.onload)
        every = [m for root in self._modules(at) for m in root.modules()]
        hooks: dict[Any, None] = {hook: None for m in every if (hook := getattr(m, "_hf_hook", None)) is not None}
        count["groups"] = len(hooks)
        undos = []
        for hook in hooks:
            inner = hook.pre_forward

            def load(module: Any, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                count["loads"] += 1
                return inner(module, *args, **kwargs)

            undos.append(override(hook, load, "pre_forward"))

        def undo() -> None:
            for back in undos:
                back()
            pipe.remove_all_hooks()
            for key in names:
                if key in own:
                    setattr(pipe, key, own[key])
                else:
                    vars(pipe).pop(key, None)

        return undo


@dataclass(frozen=True)
class LayerCast:
    """Weights stored in ``storage`` and cast layer by layer for each call: memory for time, through diffusers.

    Norms, embeddings of positions and projections at both ends keep their precision.

    Args:
        storage: ``float8_e4m3fn`` or ``float8_e5m2``: a byte a weight.
        keep: Keep the originals (on the CPU) for the undo; False drops them, and undo raises NotReversible.
    """

    storage: str = "float8_e4m3fn"
    keep: bool = True
    name: ClassVar[str] = "layercast"
    order: ClassVar[int] = 14

    def __post_init__(self) -> None:
        one_of("LayerCast", "storage", self.storage, ("float8_e4m3fn", "float8_e5m2"))
        switch("LayerCast", "keep", self.keep)

    def check(self, at: Host, stack: Sequence[Any]) -> None:
        no_compile("LayerCast", stack)
        unhooked("LayerCast", [at.net])
        sure = [t for t in stack if t.name == "quantize" and not (t.calibration or t._needs)]  # else some may stay
        rounded = {linear for t in sure for *_, linear in t._chosen(at)}
        if rounded and self._casts(at) <= {name for name, m in at.net.named_modules() if m in rounded}:
            raise ConfigError(
                f"LayerCast: Quantize replaces every layer of {type(at.net).__name__} that diffusers casts; keep one."
            )

    def _cast(self, net: Any, blocks: Iterable[nn.Module]) -> None:
        """Hook the layers that diffusers casts."""
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting

        storage = getattr(torch, self.storage)
        # What is kept in another precision than most are the layers that diffusers does not cast.
        dtype, _ = Counter(p.dtype for p in net.parameters() if p.is_floating_point()).most_common(1)[0]
        enable = getattr(net, "enable_layerwise_casting", None)
        if enable is not None:
            enable(storage_dtype=storage, compute_dtype=dtype)
        for block in blocks if enable is None else ():  # what is around them may read its weights' type
            apply_layerwise_casting(block, storage, dtype)

    def _casts(self, at: Host) -> set[str]:
        """The names of the modules whose weights it casts, tried on a copy without numbers."""
        twin = skeleton(at.net)
        self._cast(twin, [twin.get_submodule(name) for name in at.names])
        storage = getattr(torch, self.storage)
        return {n for n, m in twin.named_modules() if any(p.dtype == storage for p in m.parameters(recurse=False))}

    def apply(self, at: Host) -> Applied:
        """Hook the layers; Parameter objects stay the same."""
        net, storage = at.net, getattr(torch, self.storage)
        before, size = Before([net], data=self.keep), sum(p.nbytes for p in net.parameters())
        self._cast(net, at.blocks)
        count: dict[str, float] = {
            "tensors": sum(p.dtype == storage for p in net.parameters()),
            "bytes": sum(p.nbytes for p in net.parameters()),
            "of": size,
            "calls": 0,
        }
        uncount = called(at, count)

        def undo() -> None:
            if not self.keep:
                raise NotReversible("LayerCast dropped the original weights (keep=False); load the model again.")
            uncount()
            before.back()

        def inert() -> str | None:
            if not count["tensors"]:
                return f"LayerCast: {type(net).__name__} has no layer that diffusers casts; leave LayerCast out."
            return None if count["calls"] else "LayerCast: the network was not called; call it, or leave LayerCast out."

        return Applied(undo, lambda: dict(count), inert)
