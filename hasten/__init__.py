"""hasten makes diffusion and flow models fast, and measures what every layer gained and what it cost."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that holds it; imported when it is first used, so that `import hasten` costs nothing.
_PUBLIC: dict[str, tuple[str, ...]] = {
    "hasten.core.errors": (
        "CheckpointError", "ConfigError", "Diverged", "HastenError", "NotReversible", "UnsupportedModel",
    ),
    "hasten.core.path": ("EDM", "RECTIFIED_FLOW", "TRIG", "VP", "VP_COSINE", "Path", "ddpm", "edm", "vp"),
    "hasten.core.denoiser": ("Batch", "Denoiser", "OnPath", "guided", "predict"),
    "hasten.core.generate": ("FewStep",),
    "hasten.core.method": ("Method", "Sampling", "Turn", "even"),
    "hasten.core.sample": ("nfe", "sample"),
    "hasten.core.times": ("LogitNormal", "LogNormal", "LogStudentT", "Uniform"),
    "hasten.allocator": ("keep_freed_memory",),
    "hasten.data": ("Conditions", "Images", "Source", "digits", "from_arrays", "load_data"),
    "hasten.distribute": ("load_adapter", "load_model", "read_samplings", "save_adapter", "save_model"),
    "hasten.fit": ("Step",),
    "hasten.fitted": ("fit_weights",),
    "hasten.lora": ("LoRA", "merge"),
    "hasten.measure.clock": ("latency",),
    "hasten.measure.diagnose": ("diagnose",),
    "hasten.measure.features": ("Features", "classifier", "inception"),
    "hasten.measure.judge": ("Judge",),
    "hasten.measure.report": ("Report", "Stage"),
    "hasten.methods.add": ("ADD",),
    "hasten.methods.alphaflow": ("AlphaFlow",),
    "hasten.methods.ayf": ("AYF",),
    "hasten.methods.boot": ("BOOT",),
    "hasten.methods.boss": ("BOSS",),
    "hasten.methods.cm": ("CM",),
    "hasten.methods.ctm": ("CTM",),
    "hasten.methods.decoupled": ("Decoupled",),
    "hasten.methods.dmd2": ("DMD2",),
    "hasten.methods.dpo": ("DPO",),
    "hasten.methods.flow": ("Flow",),
    "hasten.methods.flowmap": ("FlowMap",),
    "hasten.methods.hyper": ("HyperSD",),
    "hasten.methods.guidance": ("GuidanceDistillation",),
    "hasten.methods.imm": ("IMM",),
    "hasten.methods.kd": ("KD",),
    "hasten.methods.ladd": ("LADD",),
    "hasten.methods.meanflow": ("MeanFlow",),
    "hasten.methods.moment": ("MomentMatching",),
    "hasten.methods.pcm": ("PCM",),
    "hasten.methods.phased": ("Phased",),
    "hasten.methods.progressive": ("Progressive",),
    "hasten.methods.rcm": ("RCM",),
    "hasten.methods.reflow": ("Reflow",),
    "hasten.methods.scm": ("SCM",),
    "hasten.methods.shortcut": ("Shortcut",),
    "hasten.methods.sid": ("SiD",),
    "hasten.methods.tcm": ("TCM",),
    "hasten.methods.sprint": ("Sprint",),
    "hasten.methods.tdm": ("TDM",),
    "hasten.methods.twinflow": ("TwinFlow",),
    "hasten.models.diffusers": ("PipelineDenoiser", "denoiser"),
    "hasten.models.dit": ("DiT", "DiTConfig"),
    "hasten.models.wrap": ("wrap",),
    "hasten.pipelines": ("Student", "distill"),
    "hasten.pairs": ("Pairs", "Preferences", "make_pairs", "scored_pairs"),
    "hasten.recipe": ("Recipe", "load_recipe", "save_recipe"),
    "hasten.role": ("FitConfig",),
    "hasten.run": ("load", "settled", "train"),
    "hasten.schedule": ("learn_times",),
    "hasten.speed.calibrate": ("Calibration", "calibrate"),
    "hasten.speed.plan": ("Plan",),
    "hasten.tuner": ("tune",),
    "hasten.speed": (
        "Attention", "Cache", "Cast", "Compile", "Guidance", "LayerCast", "Offload", "Quantize", "TileVAE", "Times",
        "Transform", "speed_up",
    ),
}  # fmt: skip
_RENAMED = {
    "load": "network",
    "load_data": "load",
    "load_recipe": "load",
    "save_recipe": "save",
}  # clear without their module's name
_MODULE = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
