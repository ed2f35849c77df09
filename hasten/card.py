"""The model card of an exported student: how it was made, what was measured, and the call it expects."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import jinja2
import yaml
from torch import nn

from hasten.models.probe import guidance_arguments

INLINE = 100  # characters of a call that stay on one line
HERE = "."  # what the code loads that stands in the folder itself


def guidance_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, float]:
    """The call's guidance arguments with the values that hold, the pipeline's defaults written out."""
    known = inspect.signature(pipe.__call__).parameters
    found = {name: call.get(name, known[name].default) for name in guidance_arguments(pipe)}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def on_hub(base: str) -> bool:
    """Whether ``base`` is the name of a repository of the hub and no folder of this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base)) and not os.path.isdir(base)


def unplaced(thing: Any) -> Any:
    """``thing`` with the paths in it shortened to their last parts: where they lay on this machine says nothing."""
    if isinstance(thing, Mapping):
        return {k: unplaced(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [unplaced(v) for v in thing]
    if not isinstance(thing, (str, File)) or len(str(thing)) > 1024 or "\n" in str(thing):
        return thing
    place = os.path.expanduser(thing)
    is_path = os.path.isabs(place) or place.startswith(("./", "../")) or ("/" in place and os.path.exists(place))
    return File(place).name if is_path else thing


def silent(pipe: Any, call: Mapping[str, Any], quiet: Mapping[str, Any]) -> dict[str, float]:
    """The guidance arguments that are to be said: where some of them silence guidance, these alone and the call's."""
    values = guidance_of(pipe, call)
    return {k: v for k, v in values.items() if k in quiet or k in call} if quiet else values


def arguments(pipe: Any, call: Mapping[str, Any], steps: int, guided: bool, quiet: Mapping[str, Any]) -> dict[str, Any]:
    """What to hand the pipeline: the subject first, then steps, guidance, sizes; negative prompts only if guided."""
    texts = {k: v[0] if isinstance(v, list) and len(v) == 1 and "class" not in k else v for k, v in call.items()}
    texts = {k: v for k, v in texts.items() if guided or not k.startswith("negative_")}
    first = {k: texts.pop(k) for k in ("prompt", "class_labels") if k in texts}
    guidance = guidance_of(pipe, call) if guided else silent(pipe, call, quiet)
    return {**first, "num_inference_steps": steps, **guidance, **{k: v for k, v in texts.items() if k not in guidance}}


def dtypes(pipe: Any) -> dict[str, str]:
    """The dtypes of the pipeline's networks by component, ``default`` for that of most."""
    found = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and any(True for _ in m.parameters())}
    each = {k: str(next(p.dtype for p in m.parameters())).removeprefix("torch.") for k, m in found.items()}
    most = max(each.values(), key=list(each.values()).count)
    return {"default": most} | {k: v for k, v in each.items() if v != most}


def tiled(pipe: Any) -> list[str]:
    """The components that decode in tiles, a switch that no config holds."""
    return [k for k, m in pipe.components.items() if getattr(m, "use_tiling", False) is True]


def code(pipe: Any, place: str, given: Mapping[str, Any], result: str, lora: str | None) -> str:
    """Python that loads the folder and calls it.

    Args:
        pipe: The pipeline as it is in the folder.
        place: The folder's repository on the hub, or ``HERE``.
        given: The call's arguments; pictures among them become names that the reader has to fill.
        result: The attribute of the output: ``images`` or ``frames``.
        lora: The base model, where the folder holds adapters alone.
    """
    scheduler, dtype = type(pipe.scheduler).__name__, dtypes(pipe)
    each = ", ".join(f'"{k}": torch.{v}' for k, v in dtype.items())
    kind = f"torch.{dtype['default']}" if len(dtype) == 1 else f"{{{each}}}"
    kind = "" if dtype == {"default": "float32"} else f", torch_dtype={kind}"
    imports = f"DiffusionPipeline, {scheduler}" if lora else "DiffusionPipeline"
    lines = ["import torch"] if kind else []
    lines += [
        f"from diffusers import {imports}",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{unplaced(lora or place)}"{kind})',
    ]
    if lora:
        lines[-1] += "" if on_hub(lora) else "  # the folder of the base model"
        lines += [
            f'pipe.load_lora_weights("{place}")',
            f'pipe.scheduler = {scheduler}.from_pretrained("{place}", subfolder="scheduler")',
        ]
    if place == HERE:
        at = -2 if lora else -1
        lines[at] += "  # this folder, or its name on the hub"
    lines += [f"pipe.{k}.enable_tiling()" for k in tiled(pipe)]
    parts = [f"{k}={k if hasattr(v, 'getpixel') else repr(v)}" for k, v in given.items()]
    one = f"{'images' if result == 'images' else 'video'} = pipe({', '.join(parts)}).{result}[0]"
    if result == "images":
        one = one.replace("images", "image", 1)
    if len(one) > INLINE:
        one = one.split("(")[0] + "(\n" + "".join(f"    {p},\n" for p in parts) + f").{result}[0]"
    return "\n".join([*lines, one])


def guidance_text(pipe: Any, call: Mapping[str, Any], quiet: Mapping[str, Any], guided: bool, ignored: bool) -> str:
    """What to know about the guidance arguments, in a sentence or two."""
    values = guidance_of(pipe, call)
    said = lambda some: " and ".join(f"`{k}={v:g}`" for k, v in some.items())  # noqa: E731
    if guided:
        return f"The student is guided from outside, at the strength it was trained for: {said(values)}."
    if ignored:
        return "Guidance is inside the weights, and the configuration keeps the pipeline from adding its own."
    if off := {k: v for k, v in values.items() if k in quiet}:
        keep, default = ("keep", "Their defaults") if len(off) > 1 else ("keeps", "Its default")
        return (
            f"Guidance is inside the weights: {said(off)} {keep} the pipeline from adding its own. {default} would "
            "guide a second time, at twice the cost."
        )
    if quiet:
        how = "; ".join(f"pipe.{k} = {v!r}" for k, v in quiet.items())
        return f"Guidance is inside the weights: switch the pipeline's own off before the call (`{how}`)."
    scales = {k: v for k, v in values.items() if v not in (0, 1)}  # 1, and to some 0, is none
    if not scales:
        return f"The student was trained without guidance, which is {said(values)}; keep it so." if values else ""
    it = "them" if len(scales) > 1 else "it"
    return f"The network takes its guidance as an input and was trained at {said(scales)}; keep {it}."


def table(measured: Any) -> str:
    """Rows (a list of mappings), or numbers by name, as a Markdown table; empty for nothing."""
    if not measured:
        return ""
    rows: Sequence[Mapping[str, Any]] = measured if isinstance(measured, Sequence) else [measured]
    heads = list(dict.fromkeys(k for row in rows for k in row))
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)  # noqa: E731
    lines = [heads, ["---"] * len(heads), *([cell(row.get(k, "")) for k in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card(values: Mapping[str, Any], about: Mapping[str, Any], lora: bool) -> str:
    """The card's text.

    Args:
        values: What the template needs beyond ``about``.
        about: ``method`` (its name, or as a recipe has it), ``recipe`` (text or a mapping), ``base``, ``license``,
            ``measured``, ``rounded`` (the dtype of the backbone in training); all may be missing.
    """
    recipe, base, licence = about.get("recipe"), about.get("base"), about.get("license")
    method = about.get("method") or (recipe.get("method") if isinstance(recipe, Mapping) else None)
    method = method.get("name") if isinstance(method, Mapping) else method
    front: dict[str, Any] = {"library_name": "diffusers", "tags": ["hasten", "few-step"]}
    relation = "adapter" if lora else "finetune"
    front |= {"base_model": base, "base_model_relation": relation} if base and on_hub(base) else {}
    base = unplaced(base)
    text = yaml.safe_dump(unplaced(recipe), sort_keys=False) if isinstance(recipe, Mapping) else recipe or ""
    note = f"These weights are derived from {f'`{base}`' if base else 'the teacher'}; its licence holds for them."
    source = (File(__file__).parent / "card.md.j2").read_text()
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(source)
    text = template.render(
        **values, front=yaml.safe_dump(front, sort_keys=False), method=method, base=base, licence=note,
        recipe=text.strip(), measured=table(about.get("measured")), rounded=about.get("rounded"),
    )  # fmt: skip
    return licensed(text, licence) if licence else text


def licensed(text: str, licence: str) -> str:
    """A card's text with its licence, in the metadata and in words."""
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_dump({**yaml.safe_load(front), "license": licence}, sort_keys=False)
    body, note = body.rsplit("## Licence\n", 1)
    said = re.compile(r"(; its licence holds for them| and are under .*)\.$", re.M)
    note = said.sub(lambda _: f" and are under {licence}.", note)
    return f"---\n{front}---\n{body}## Licence\n{note}"
