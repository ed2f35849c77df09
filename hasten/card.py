"""The model card of an exported student: how it was made, what was measured, and the call it expects."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import jinja2
import yaml
from torch import nn

from hasten.models.probe import guidance_arguments

INLINE = 100  # characters of a call that stay on one line


def guidance_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, float]:
    """The call's guidance arguments with the values that hold, the pipeline's defaults written out."""
    known = inspect.signature(pipe.__call__).parameters
    found = {name: call.get(name, known[name].default) for name in guidance_arguments(pipe)}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def arguments(pipe: Any, call: Mapping[str, Any], steps: int, guided: bool) -> dict[str, Any]:
    """What to hand the pipeline: the subject first, then steps, guidance, sizes; negative prompts only if guided."""
    texts = {k: v[0] if isinstance(v, list) and len(v) == 1 and "class" not in k else v for k, v in call.items()}
    texts = {k: v for k, v in texts.items() if guided or not k.startswith("negative_")}
    first = {k: texts.pop(k) for k in ("prompt", "class_labels") if k in texts}
    guidance = guidance_of(pipe, call)
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


def code(pipe: Any, name: str, given: Mapping[str, Any], result: str, lora: str | None) -> str:
    """Python that loads the folder ``name`` and calls it.

    Args:
        pipe: The pipeline as it is in the folder.
        given: The call's arguments; pictures among them become names that the reader has to fill.
        result: The attribute of the output: ``images`` or ``frames``.
        lora: The base model, where ``name`` holds adapters alone.
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
        f'pipe = DiffusionPipeline.from_pretrained("{lora or name}"{kind})',
    ]
    if lora:
        lines += [
            f'pipe.load_lora_weights("{name}")',
            f'pipe.scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")',
        ]
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
    values = ", ".join(f"`{k}={v:g}`" for k, v in guidance_of(pipe, call).items())
    if guided:
        return f"The student is guided from outside, at the strength it was trained for: {values}."
    if ignored:
        return "Guidance is inside the weights, and the configuration keeps the pipeline from adding its own."
    if quiet:
        return (
            f"Guidance is inside the weights: {values} keeps the pipeline from adding its own. Its default would guide "
            "a second time, at twice the cost."
        )
    return f"The network takes its guidance as an input and was trained at {values}; keep it." if values else ""


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
        about: ``method``, ``recipe`` (text or a mapping), ``base``, ``license``, ``measured``, ``rounded`` (the dtype
            of the backbone in training); all may be missing.
    """
    recipe, base, licence = about.get("recipe"), about.get("base"), about.get("license")
    method = about.get("method") or (recipe.get("method") if isinstance(recipe, Mapping) else None)
    method = next(iter(method), None) if isinstance(method, Mapping) else method
    front: dict[str, Any] = {"library_name": "diffusers", "tags": ["hasten", "few-step"]}
    front |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if base else {}
    front |= {"license": licence} if licence else {}
    text = yaml.safe_dump(dict(recipe), sort_keys=False) if isinstance(recipe, Mapping) else recipe or ""
    derived = f"These weights are derived from {f'`{base}`' if base else 'the teacher'}"
    note = f"{derived} and are under {licence}." if licence else f"{derived}; its licence holds for them."
    source = (File(__file__).parent / "card.md.j2").read_text()
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(source)
    return template.render(
        **values, front=yaml.safe_dump(front, sort_keys=False), method=method, base=base, licence=note,
        recipe=text.strip(), measured=table(about.get("measured")), rounded=about.get("rounded"),
    )  # fmt: skip
