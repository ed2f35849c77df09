"""LoRA without copies: views of one network share its frozen weights, and each owns its adapters. Hu et al. 2022."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel
from hasten.frozen import QuantizedLinear, dequantize, product


@dataclass(frozen=True)
class LoRA:
    """The shape of the adapters: W x + (alpha / rank) B A x on every linear; ``alpha`` None is ``rank``."""

    rank: int = 64
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class LoRALinear(nn.Linear):
    """y = W x + b + scale B A x. A [rank, in] and B [out, rank] are its parameters; W and b are shared and frozen.

    A and B are float32 (float64 for a float64 W), however small W is; B is zero at the start. A starts uniform
    within 1/sqrt(in), as in the paper's own code.
    """

    held = ("weight", "bias")  # what is shared of a linear

    def __init__(self, base: nn.Linear, lora: LoRA):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.lora = base.in_features, base.out_features, lora
        for name in self.held:
            if getattr(base, name) is None:
                self.register_parameter(name, None)
            else:
                share(self, name, getattr(base, name))
        like: Any = self.like(base)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, lora.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def like(self, base: Any) -> dict[str, Any]:
        """Device and dtype of the adapters."""
        return {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}

    def frozen(self, input: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(input, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        down = F.linear(input, self.lora_A.to(input.dtype))
        return self.frozen(input) + self.lora.scale * F.linear(down, self.lora_B.to(down.dtype))

    def merged(self) -> nn.Linear:
        """A linear of its own with W + scale B A, summed in the adapters' precision and stored in W's."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight.to(self.lora_A.dtype) + self.lora.scale * self.lora_B @ self.lora_A
        plain.weight = nn.Parameter(weight.detach().to(self.weight.dtype))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain.train(self.training)


class QuantizedLoRALinear(LoRALinear):
    """The same on a :class:`hasten.frozen.QuantizedLinear`, whose int8 or int4 weight the views share."""

    packed: nn.Parameter
    scale: nn.Parameter
    held = ("packed", "scale", "bias")

    def __init__(self, base: QuantizedLinear, lora: LoRA):
        super().__init__(base, lora)
        self.dtype = base.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], computed when it is read."""
        return dequantize(self.packed, self.scale, self.in_features, self.dtype)

    def like(self, base: Any) -> dict[str, Any]:
        return {"device": base.packed.device, "dtype": torch.promote_types(base.dtype, torch.float32)}

    def frozen(self, input: Tensor) -> Tensor:
        return product(input, self.packed, self.scale, self.in_features, self.bias)

    def merged(self) -> nn.Linear:
        raise UnsupportedModel(
            "Adapters are not merged into weights that are rounded: the loss of the rounding would stay in them. "
            "Restore the backbone's own weights first (Rounded.restore) and make a view of that."
        )


KINDS: dict[type, type[LoRALinear]] = {nn.Linear: LoRALinear, QuantizedLinear: QuantizedLoRALinear}


def share(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give ``module`` a tensor as a frozen plain attribute, which neither parameters() nor state_dict() sees.

    So the lists, toggles, averages and files of a view hold what it owns and nothing else, and no toggle of a view
    can unfreeze the shared weights.
    """
    module._parameters.pop(name, None)
    vars(module)[name] = nn.Parameter(tensor.detach(), requires_grad=False)


def shared(net: nn.Module) -> dict[str, nn.Parameter]:
    """The shared weights of a view by the names that they have in a plain network; empty for a plain one."""
    found = ((path, k, v) for path, m in net.named_modules(remove_duplicate=False) for k, v in vars(m).items())
    return {f"{path}.{k}" if path else k: v for path, k, v in found if isinstance(v, nn.Parameter)}


def in_place(net: nn.Module) -> str | None:
    """The first weight that is no plain tensor, as quantization in place leaves them; None where all are."""
    weights = {**dict(net.named_parameters()), **shared(net)}
    return next((name for name, p in weights.items() if type(p.data) is not Tensor), None)


def is_view(net: Any) -> bool:
    """Whether ``net`` has adapters on shared weights."""
    return isinstance(net, nn.Module) and any(isinstance(m, LoRALinear) for m in net.modules())


def adapters(net: nn.Module) -> LoRA:
    """The shape of a view's adapters."""
    return next(m.lora for m in net.modules() if isinstance(m, LoRALinear))


def view(net: Any, lora: LoRA | None = None, second_time: bool = False) -> Any:
    """A network of the same class on the very weights of ``net``, with adapters of its own; starts equal to ``net``.

    Its blocks are its own objects, so that whose adapter acts is no state that could be wrong: neither when views
    are nested, nor when a checkpointed block is computed again in another thread during backward. Of a view, it is
    another view on the same weights, with a copy of its adapters.

    Args:
        lora: The adapters of a plain ``net``; those of a view keep their shape.
        second_time: Add the r embedding of ``net.with_second_time()``, which the view owns and trains in full.

    Raises:
        UnsupportedModel: If ``net`` has no linear to adapt.
    """
    old = is_view(net)
    weights = shared(net) if old else dict(net.named_parameters(remove_duplicate=False))
    if second_time:  # a copy, of which only what is new stays
        twin = (merge(net) if old else net).with_second_time()
    else:
        twin = copy.deepcopy(net, {id(t): t for t in (*weights.values(), *net.buffers())})
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        share(twin.get_submodule(path), leaf, weight)
    made: dict[int, LoRALinear] = {}  # a linear at two places stays one
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            kind: Any = KINDS.get(type(child))
            if kind and vars(child).keys() & {"weight", "packed"}:
                made.setdefault(id(child), kind(child, lora or adapters(net)).train(child.training))
                parent._modules[name] = made[id(child)]
    if not is_view(twin):
        raise UnsupportedModel(f"{type(net).__name__} has no nn.Linear to adapt; train it with clone: full.")
    if old:
        twin.load_state_dict(net.state_dict(), strict=False)  # an r embedding that is new is not in it
    return twin


def merge(net: Any) -> Any:
    """The plain network that a view stands for, sharing nothing with it; a plain network is returned as it is."""
    if not is_view(net):
        return net
    twin = copy.deepcopy(net, {id(w): w for w in shared(net).values()})
    made: dict[int, nn.Linear] = {}
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LoRALinear):
                made.setdefault(id(child), child.merged())
                parent._modules[name] = made[id(child)]
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, nn.Parameter):
                del vars(module)[name]
                module.register_parameter(name, nn.Parameter(value.clone()))
    return twin.requires_grad_(True)
