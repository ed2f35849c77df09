"""Families that the adapter has never seen, those that a probe cannot learn, and names, which it must not know."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path as File
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.distribute import clone
from hasten.models import diffusers as adapter
from hasten.models import encode, encoders, exceptions, latents, probe, taps, template, verify
from hasten.models.diffusers import PipelineDenoiser, denoiser, of
from hasten.models.exceptions import Experts
from hasten.models.probe import record
from hasten.models.template import conditions, find_latent
from tests.pipeline_parts import Made, awake, diffusers, t5_tokenizer, umt5, wan_vae
from tests.pipelines import FAMILIES
from tests.pipelines_more import MORE, PLAIN, WAN, WORDS

REFUSED = {"ltx_i2v": "takes all of them as tokens", "ltx2": "a video and its sound together"}
TABLED = {"sana_sprint", "cosmos2", "wan22_a14b", "playground"}
RANDOM = {"allegro", "hunyuandit", "sana_sprint"}  # schedulers that add noise


def anyflow() -> Made:
    """AnyFlow: a second time for every frame, the one at which the step ends."""
    pipe = diffusers.AnyFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=wan_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        transformer=diffusers.AnyFlowTransformer3DModel(**WAN))  # fmt: skip
    sizes = dict(height=16, width=16, num_frames=9, max_sequence_length=32)
    return awake(pipe), WORDS | dict(guidance_scale=3.0) | sizes


def playground() -> Made:
    """Playground 2.5: SDXL's network under EDM's preconditioning."""
    pipe, call = FAMILIES["sdxl"]()
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    return pipe, call


ALL = FAMILIES | MORE | {"anyflow": anyflow, "playground": playground}
LEARNT = sorted(ALL.keys() - REFUSED.keys())


@cache
def probed(name: str) -> tuple[Any, dict[str, Any], PipelineDenoiser]:
    """The pipeline of a family, its call, and its denoiser."""
    pipe, call = ALL[name]()
    return pipe, call, denoiser(pipe, call)


def cond_of(name: str, values: list[Any] | None = None, **more: Any) -> dict[str, Tensor]:
    """What the pipeline hands its network for some prompts."""
    pipe, _, net = probed(name)
    found = net.found
    call = of({**found.call, **found.quiet, **more}, found.subject, values or found.call[found.subject])
    return conditions(net.templates[net.shape], record(pipe, call, 2, stop=0).looks[-1])


def inputs(net: PipelineDenoiser, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, ...] and n times, the last near the data."""
    x = torch.randn(n, *net.shape, generator=torch.Generator().manual_seed(seed))
    return x, net.path.at(torch.linspace(0.95, 0.05, n))


# --- the probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNT)
def test_a_replayed_run_is_reproduced_and_only_the_table_needs_names(name: str) -> None:
    _, _, net = probed(name)
    assert net.found.error <= (1e-4 if name == "cosmos2" else 1e-5)  # its pipeline divides a difference by sigma 0.002
    assert (exceptions.find(probed(name)[0]) is not None) == (name in TABLED)
    assert not PLAIN.keys() & TABLED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_learnt_is_refused_with_the_reason(name: str) -> None:
    pipe, call = ALL[name]()
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        denoiser(pipe, call)


@pytest.mark.parametrize("name", sorted(set(LEARNT) - RANDOM))
def test_a_step_along_the_learnt_path_is_the_schedulers_own(name: str) -> None:
    """A replay proves what the network returns, not what it means: only this shows path, kind, sign and direction."""
    pipe, call, net = probed(name)
    run = record(pipe, {**net.found.call, **net.found.quiet}, 4, stop=2)
    x, y = (find_latent(step.looks[-1], step.sample)[2].double() for step in run.steps)
    t, s = (net.found.clock(step.t.double()).expand(1) for step in run.steps)
    assert float(s) < float(t) <= net.path.t_max * (1 + 1e-6)
    r = s if net.second_time else None
    with torch.no_grad():
        pred = net(x, t, conditions(net.templates[net.shape], run.steps[0].looks[-1]), r=r).double()
    x0, eps = (net.path.convert(pred, x, t, net.kind, kind) for kind in ("x0", "eps"))
    error = (net.path.mix(x0, eps, s) - y).abs().max() / (x - y).abs().max()
    assert float(error) < 0.02, f"{float(error):.1e} of the step"  # some schedulers round their times to integers


@pytest.mark.parametrize("name", LEARNT)
def test_samples_of_a_batch_do_not_see_each_other(name: str) -> None:
    _, call, net = probed(name)
    first = net.found.call[net.found.subject][0]
    cond = cond_of(name, [first, first[::-1] if isinstance(first, str) else 7])
    cond = {k: torch.randn(v.shape) if v.ndim > 2 and v.is_floating_point() else v for k, v in cond.items()}
    x, t = inputs(net, 2)
    with torch.no_grad():
        both = net(x, t, cond)
        alone = [net(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()}) for i in range(2)]
        swapped = net(x, t, {k: v.flip(0) for k, v in cond.items()})
    error = (both - torch.cat(alone)).abs().max()
    assert float(error) < 1e-5 * max(1.0, float(both.abs().max()))
    assert float((swapped - both).abs().max()) > 10 * float(error)


# --- blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNT)
def test_taps_give_tokens_of_the_sample(name: str) -> None:
    """Every tapped stream has the batch of the sample and moves with it; blocks of the text alone are left out."""
    _, _, net = probed(name)
    cond, (x, t) = cond_of(name), inputs(net, 1)
    cond = {k: torch.cat([v] * 2) for k, v in cond.items()}
    with torch.no_grad():
        _, features = net(torch.cat([x, -x]), t.expand(2), cond, taps=range(len(net.blocks)))
    assert len(features) == len(net.blocks) >= 2
    for tokens in features:
        assert tokens.ndim == 3 and len(tokens) == 2
        assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize(
    ("name", "streams"),
    [("flux", {1}), ("flux_kontext", {1}), ("sd3", {0, 1}), ("cogvideox", {0}), ("cogview4", {0}), ("mochi", {0})],
)
def test_the_samples_stream_is_found_whatever_its_place_and_length(name: str, streams: set[int]) -> None:
    """Flux returns (text, image), CogVideoX (image, text); in the tiny Kontext both have 32 tokens."""
    assert set(probed(name)[2].found.blocks.values()) == streams


@pytest.mark.parametrize("name", ["z_image", "lumina2", "hidream"])
def test_blocks_of_the_text_alone_are_no_blocks(name: str) -> None:
    net = probed(name)[2]
    left_out = taps.repeated(net.net).keys() - net.found.blocks.keys()
    assert left_out and all("context" in k or "caption" in k for k in left_out)


def test_what_only_some_prompts_say_is_a_condition() -> None:
    """HunyuanVideo 1.5 encodes what stands in quotation marks apart; the probe's prompt has none."""
    assert {"encoder_hidden_states_2", "encoder_attention_mask_2"} <= cond_of("hunyuanvideo15").keys()


# --- joined conditions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd_inpaint", "flux_fill", "flux_kontext", "wan_i2v"])
def test_every_sample_has_a_picture_of_its_own(name: str) -> None:
    _, call, net = probed(name)
    one = cond_of(name)
    two = cond_of(name, image=call["image"].point(lambda p: 255 - p))
    differ = {k for k in one if not torch.equal(one[k], two[k])}
    assert f"{net.found.latent}.joined" in differ
    assert name != "wan_i2v" or "encoder_hidden_states_image" in differ
    x, t = inputs(net, 1)
    with torch.no_grad():
        a, b = net(x, t, one), net(x, t, two)
        both = net(torch.cat([x, x]), t.expand(2), {k: torch.cat([one[k], two[k]]) for k in one})
    assert not torch.allclose(a, b, rtol=1e-3, atol=1e-3)
    assert torch.allclose(both, torch.cat([a, b]), rtol=1e-4, atol=1e-5)
    if net.uncond is not None:
        joined = f"{net.found.latent}.joined"
        assert torch.equal(net.null(two)[joined], two[joined])


# --- two experts ----------------------------------------------------------------------------------------------


def test_each_sample_goes_to_the_expert_of_its_time() -> None:
    pipe, _, net = probed("wan22_a14b")
    x, cond = torch.randn(4, *net.shape), cond_of("wan22_a14b")
    cond = {k: v.expand(4, *v.shape[1:]) for k, v in cond.items()}
    t = torch.tensor([0.5, 0.9, 0.875, 0.1])  # the boundary 0.875 itself belongs to the first expert
    high = denoiser_of(net, pipe.transformer)
    low = denoiser_of(net, pipe.transformer_2)
    pred = net(x, t, cond)
    for i, own in enumerate([low, high, high, low]):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        assert torch.allclose(pred[i : i + 1], own(x[i : i + 1], t[i : i + 1], one), atol=1e-5)
        other = high if own is low else low
        assert not torch.allclose(pred[i : i + 1], other(x[i : i + 1], t[i : i + 1], one), atol=1e-2)


def denoiser_of(net: PipelineDenoiser, module: nn.Module) -> PipelineDenoiser:
    """``net`` with another network inside."""
    twin = PipelineDenoiser(module, net.path, net.kind, net.templates[net.shape], net.found, net.config)
    return twin.eval()


def test_both_experts_learn_and_are_tapped_in_the_samples_order() -> None:
    _, _, net = probed("wan22_a14b")
    net = copy.deepcopy(net)
    assert isinstance(net.net, Experts)
    assert [sum(m in net.net.high.modules() for m in net.blocks), len(net.blocks)] == [2, 4]
    cond = {k: v.expand(3, *v.shape[1:]) for k, v in cond_of("wan22_a14b").items()}
    x, t = torch.randn(3, *net.shape), torch.tensor([0.2, 0.95, 0.3])
    net.checkpointing = True
    pred, (tokens,) = net(x, t, cond, taps=[1])
    pred.square().mean().backward()
    for expert in (net.net.high, net.net.low):
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in expert.parameters()]
        assert all(grads)
    for i in range(3):
        _, (one,) = net(x[i : i + 1], t[i : i + 1], {k: v[:1] for k, v in cond.items()}, taps=[3])
        assert torch.allclose(one, tokens[i : i + 1], atol=1e-5)


def test_one_expert_without_the_other_is_refused() -> None:
    pipe, call = ALL["wan22_a14b"]()
    pipe.transformer_2 = None
    with pytest.raises(UnsupportedModel, match="one expert only"):
        denoiser(pipe, call)


def test_edms_data_keep_their_scale() -> None:
    """x_0 on the path is the scheduler's own, not x_0 over the data's standard deviation."""
    pipe, _, net = probed("playground")
    step = record(pipe, {**net.found.call, **net.found.quiet}, 3, stop=1).steps[0]
    _, _, x = find_latent(step.looks[-1], step.sample)
    t = net.found.clock(step.t.double()).expand(1)
    with torch.no_grad():
        pred = net(x, t, conditions(net.templates[net.shape], step.looks[-1]))
    own = pipe.scheduler.precondition_outputs(step.sample, step.output, torch.exp(4 * step.t))
    assert torch.allclose(net.path.convert(pred, x, t, net.kind, "x0").float(), own, rtol=1e-3, atol=1e-4)


# --- two times ------------------------------------------------------------------------------------------------


def test_a_second_time_of_its_own_is_used() -> None:
    _, _, net = probed("anyflow")
    student = clone(net, second_time=True)
    cond, (x, t) = cond_of("anyflow"), inputs(net, 1)
    with torch.no_grad():
        far, near, none = student(x, t, cond, r=0 * t), student(x, t, cond, r=t), student(x, t, cond)
    assert torch.equal(near, none) and not torch.allclose(far, near, rtol=1e-3, atol=1e-3)


def test_a_network_without_a_second_time_says_so() -> None:
    _, _, net = probed("wan")
    cond, (x, t) = cond_of("wan"), inputs(net, 1)
    with pytest.raises(ConfigError, match="no second time"):
        net(x, t, cond, r=t)
    with pytest.raises(UnsupportedModel, match="second time|r embedding"):
        clone(net, second_time=True)


# --- guidance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"), [("hunyuanvideo15", 6.0), ("cosmos2", 4.0), ("mochi", 4.5), ("anyflow", 3.0)]
)
def test_the_scale_is_found_where_it_is_hidden(name: str, scale: float) -> None:
    """In a guider of its own; as c + g (c - u) in x_0, which is 1 + g; under times that run upwards."""
    pipe, _, net = probed(name)
    assert net.found.cfg_scale == pytest.approx(scale, rel=1e-3)
    if hasattr(pipe, "guider"):
        assert pipe.guider._enabled  # and it is on again


# --- names ----------------------------------------------------------------------------------------------------


SHORT = {"flux", "wan", "sana", "sdxl", "sd3", "zimage", "qwen", "ltx", "mochi", "cosmos", "hunyuan", "lumina", "dit"}
COMMON = {
    "DiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
    "pipeline_utils",
    "auto",
    "dual",
    "shared",
    "prior",
    "ddpm",
}  # a path, too


def families() -> set[str]:
    """Every name that diffusers gives a model, a pipeline, a scheduler or a family: its classes and its modules."""
    root = File(diffusers.__file__).parent
    found = {p.name for p in (root / "pipelines").iterdir() if p.is_dir()}
    for file in (root / "models").rglob("*.py"):
        if file.parent.name in ("transformers", "unets") and file.stem[0] != "_":
            found.add(re.sub(r"(transformer|unet)s?", "", file.stem).strip("_"))
    found |= {name for names in diffusers._import_structure.values() for name in names if name[0].isupper()}
    return {name for name in found | SHORT if name not in COMMON and len(name) > 2 and name[0] != "_"}


MODULES = [adapter, encode, encoders, latents, probe, taps, template, verify]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_no_family_is_named_in_the_adapter(module: ModuleType) -> None:
    assert module.__file__
    text = File(module.__file__).read_text()
    text = re.sub(r"(hasten[./]models[./]|any )diffusers", "", text, flags=re.I)
    known = families()
    assert {"FluxTransformer2DModel", "WanPipeline", "flux", "kandinsky", "UNet2DConditionModel"} <= known
    for name in sorted(known):
        assert not re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![a-z])", text, re.I), f"{name} is named"


def test_every_entry_is_short_and_of_a_class_that_exists() -> None:
    text = File(exceptions.__file__).read_text()
    assert len(text.splitlines()) <= 250
    for name, entry in exceptions.TABLE.items():
        assert hasattr(diffusers, name), name
        assert entry.__code__.co_firstlineno
    for part in re.split(r"\n(?=def |class )", text)[1:]:
        if not part.startswith("class Experts"):
            assert len(part.split("\n# ---")[0].splitlines()) <= 32
