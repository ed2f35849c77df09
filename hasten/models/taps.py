"""A network's blocks, found without its name, and the tokens that leave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def streams(out: Any) -> list[Tensor]:
    """The streams of tokens among a block's inputs or outputs, each [B, L, D]; images [B, C, H, W] are H W tokens."""
    found = [out] if isinstance(out, Tensor) else [v for v in out if isinstance(v, Tensor)]
    return [v.flatten(2).transpose(1, 2) if v.ndim > 3 else v for v in found if v.ndim >= 3]


def repeated(net: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The members of a network's lists of modules, by name; of its parts' lists where it has none itself."""
    lists = {f"{prefix}{k}": m for k, m in net.named_children() if isinstance(m, nn.ModuleList)}
    if lists:
        return {f"{k}.{i}": m for k, members in lists.items() for i, m in enumerate(members)}
    parts = [repeated(m, f"{prefix}{k}.") for k, m in net.named_children()]
    return {k: m for part in parts for k, m in part.items()}


def blocks_of(net: nn.Module, runs: Sequence[Callable[[], Any]]) -> dict[str, int]:
    """The blocks that process the sample, by name, and which of the streams that leave each is the sample's own.

    A block of the text alone puts out the same in two ``runs`` that differ in the sample. Where text and sample leave
    a block as two streams, the sample's has the length of the one that came in and is nearest to it: blocks add.
    Blocks with less than 2 % of all blocks' parameters are left out.
    """
    modules = repeated(net)
    seen: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        return lambda m, args, kwargs, out: seen[name].append((streams([*args, *kwargs.values()]), streams(out)))

    hooks = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    with torch.no_grad():
        for run in runs:
            run()
    for h in hooks:
        h.remove()
    found: dict[str, int] = {}
    last: Tensor | None = None  # the sample's stream as it left the block before
    for name, calls in seen.items():
        if len(calls) < 2:
            continue
        (ins, outs), (ins2, outs2) = calls[0], calls[-1]
        if all(torch.equal(a, b) for a, b in zip(outs, outs2, strict=True)):
            continue
        moved = [a for a, b in zip(ins, ins2, strict=True) if not torch.equal(a, b)]
        own = next((a for a in moved if last is not None and torch.equal(a, last)), moved[0] if moved else outs[0])
        near = [torch.cosine_similarity(a.flatten(), own.flatten(), 0) if a.shape == own.shape else -2 for a in outs]
        found[name] = max(range(len(outs)), key=lambda i: near[i])
        last = outs[found[name]]
    sizes = {name: sum(p.numel() for p in modules[name].parameters()) for name in found}
    return {name: i for name, i in found.items() if sizes[name] >= 0.02 * sum(sizes.values())}


class Taps:
    """The tokens that leave some blocks during one forward.

    Args:
        blocks: Their names in ``net``, and which of the streams that leave each is wanted.
    """

    def __init__(self, net: nn.Module, blocks: Mapping[str, int]):
        self.net, self.blocks, self.seen = net, blocks, {}

    def twins(self, name: str) -> list[nn.Module]:
        """The block, in each of the experts where there are several."""
        twins: Any = getattr(self.net, "twins", None)
        return twins(name) if twins else [self.net.get_submodule(name)]

    def __enter__(self) -> Taps:
        blocks = [m for name in self.blocks for m in self.twins(name)]
        self.hooks = [m.register_forward_hook(lambda m, args, out: self.seen.update({m: out})) for m in blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def tokens(self, width: int = 0) -> list[Tensor]:
        """[B, L, D] of each block; padded with zeros up to ``width``, as the outer blocks of UNets are narrower."""
        found = []
        for name, i in self.blocks.items():
            parts = [streams(self.seen[m])[i] for m in self.twins(name) if m in self.seen]
            gather: Any = getattr(self.net, "gather", None)
            own = gather(parts) if gather else parts[0]
            found.append(F.pad(own, (0, max(0, width - own.shape[-1]))))
        return found
