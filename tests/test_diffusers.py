"""Any diffusers pipeline as a denoiser: what the probe learns is what the pipeline does, and it trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from hasten import (
    CM,
    DMD2,
    ConfigError,
    FitConfig,
    MeanFlow,
    Sampling,
    SiD,
    UnsupportedModel,
    denoiser,
    even,
    guided,
    sample,
)
from hasten.core.denoiser import Batch, predict
from hasten.core.sample import Hop, ode
from hasten.distribute import clone
from hasten.encoded import Encoded, Shards
from hasten.fit import fit
from hasten.lora import LoRA
from hasten.models.diffusers import PipelineDenoiser, of
from hasten.models.encode import encode, one
from hasten.models.probe import as_sample, record
from hasten.models.template import SIZE, Time, conditions, find_latent, fitted
from hasten.models.verify import error_of, replay
from hasten.role import seed_all
from tests.pipelines import FAMILIES

PROMPTS = ("a red bicycle", "an old lighthouse on a cliff above a stormy sea", "tea")
NAMES = sorted(FAMILIES)


@cache
def probed(name: str) -> tuple[Any, dict[str, Any], PipelineDenoiser]:
    pipe, call = FAMILIES[name]()
    return pipe, call, denoiser(pipe, call)


def subjects(net: PipelineDenoiser) -> list[Any]:
    return [3, 1, 7] if net.found.subject == "class_labels" else list(PROMPTS)


def known(name: str, tmp_path: Any) -> tuple[Any, PipelineDenoiser, Encoded]:
    """A family's own pipeline and denoiser, with its prompts encoded."""
    pipe, call = FAMILIES[name]()
    net = denoiser(pipe, call)
    return pipe, net, Encoded(encode(pipe, net, subjects(net), tmp_path), net.shape)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_run_of_another_length_and_shift_is_the_pipelines(name: str) -> None:
    _, _, net = probed(name)
    assert net.found.error <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_time_sign_or_chunk_does_not_pass_the_replay(name: str) -> None:
    pipe, _, net = probed(name)
    right, nodes = net.found, dict(net.templates[net.shape])
    try:
        net.found = replace(right, sign=-right.sign)
        with pytest.raises(UnsupportedModel, match="replayed run"):
            replay(pipe, net)
        net.found = right
        for key in right.times:
            time = nodes[key]
            assert isinstance(time, Time)
            net.templates[net.shape] = {**nodes, key: replace(time, offset=time.offset + 0.2 * time.slope.abs() * 1000)}
        with pytest.raises(UnsupportedModel, match="replayed run"):
            replay(pipe, net)
    finally:
        net.found, net.templates[net.shape] = right, nodes


@pytest.mark.parametrize("name", NAMES)
def test_its_path_and_kind_take_the_schedulers_first_step(name: str) -> None:
    """A first step of order 1: the next input is that of ``ode`` on the path and with the kind that were found."""
    pipe, _, net = probed(name)
    run = record(pipe, {**net.found.call, **net.found.quiet}, 4, stop=2)
    (first, second), found = run.steps, net.found
    x, then = (find_latent(step.looks[-1], step.sample)[2] for step in run.steps)
    t, s = (found.clock(step.t.double()) for step in (first, second))
    cond = conditions(net.templates[net.shape], first.looks[-1])
    look = lambda x, t: net(x.float(), t.expand(len(x)), cond).double()  # noqa: E731
    with torch.no_grad():
        mine = ode(Hop.between(net.path, net.kind, look, lambda: x, x.double(), t, s))
    limit = 3e-3 if pipe.scheduler.timesteps.dtype == torch.int64 and net.path.name == "rectified_flow" else 1e-4
    assert gap(mine.float(), then) < limit  # schedulers with whole times round them: 1/1000 of the path


@pytest.mark.parametrize("name", NAMES)
def test_the_guided_call_is_u_plus_w_times_c_minus_u(name: str) -> None:
    pipe, _, net = probed(name)
    if net.uncond is None:
        assert net.found.quiet == {} and net.found.cfg_scale == 1
        with pytest.raises(ConfigError, match="no unconditional condition"):
            net.null({})
        return
    alone = record(pipe, {**net.found.call, **net.found.quiet}, 2, stop=1).steps[0]
    both = record(pipe, net.found.call, 2, stop=1).steps[0]
    cond = conditions(net.templates[net.shape], alone.looks[-1])
    _, _, x = find_latent(alone.looks[-1], alone.sample)
    t = net.found.clock(alone.t.double()).expand(1)
    with torch.no_grad():
        u, c = net(x, t, net.uncond), net(x, t, cond)
    out = as_sample(both.output[:1], x)
    mixed = u + net.found.cfg_scale * (c - u)
    if name == "qwenimage":  # its pipeline keeps the norm of c
        mixed = mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
    assert gap(mixed, out) < 1e-4
    assert net.found.cfg_scale > 1


@pytest.mark.parametrize("name", NAMES)
def test_encoded_prompts_give_what_the_pipeline_gives_them_one_by_one(name: str, tmp_path: Any) -> None:
    """Also where prompts of several lengths are padded and masked: predictions are those without padding."""
    pipe, call = FAMILIES[name]()
    net, plain = denoiser(pipe, call), denoiser(pipe, call)
    source = Encoded(encode(pipe, net, subjects(net), tmp_path), net.shape)
    batch = source.rows([0, 1, 2])
    x, t = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.3])
    with torch.no_grad():
        together = net(x, t, batch.cond)
        for i, prompt in enumerate(subjects(net)):
            call = of({**net.found.call, **net.found.quiet}, net.found.subject, [prompt])
            look = record(pipe, call, 2, stop=0).looks[-1]
            shown = replace(plain.found)
            fixed = PipelineDenoiser(net.net, net.path, net.kind, dict(plain.templates[net.shape]), shown, net.config)
            nodes = fixed.templates[net.shape]
            for key, value in look.arguments.items():  # what is fixed follows this prompt's own length
                if type(nodes[key]).__name__ == "Fixed":
                    nodes[key] = replace(nodes[key], value=value)
                elif type(nodes[key]).__name__ == "Each" and isinstance(value, torch.Tensor):
                    nodes[key] = replace(nodes[key], value=value)
            assert gap(together[i : i + 1], fixed(x[i : i + 1], t[i : i + 1], conditions(nodes, look))) < 2e-5
    assert gap(together[:1], together[1:2]) > 1e-4
    for k in (k for k in batch.cond if k + SIZE in batch.cond):  # read no longer than the longest of these rows
        few, own = Shards(source.folder, "conditions").rows([2])[k], int(batch.cond[k + SIZE][2])
        assert few.shape[1] == own < batch.cond[k].shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_encoded_once_and_an_interrupted_encoding_goes_on(name: str, tmp_path: Any) -> None:
    if name not in ("sd3", "qwenimage", "z_image"):
        pytest.skip("one fixed, one masked and one listed condition")
    pipe, call = FAMILIES[name]()
    net, seen = denoiser(pipe, call), []
    prompts = [*PROMPTS, "a quiet street"]

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(pipe, net, prompts, tmp_path, shard=2, tell=interrupt)
    folder = encode(pipe, denoiser(pipe, call), prompts, tmp_path, shard=2, tell=lambda d, n: seen.append(d))
    assert seen == [2, 3, 4, 4]  # the first shard was whole
    again = encode(pipe, denoiser(pipe, call), prompts, tmp_path, shard=2, tell=lambda d, n: seen.append(d))
    assert again == folder and seen == [2, 3, 4, 4, 2, 4]
    fresh = Encoded(encode(pipe, net, prompts, tmp_path / "fresh"), net.shape).rows([3, 0])
    for k, v in Encoded(folder, net.shape).rows([3, 0]).cond.items():
        assert torch.equal(v, fresh.cond[k]), k
    other = encode(pipe, net, prompts[::-1], tmp_path)
    assert other != folder


UNREACHED = {  # weights without a gradient, and there are no others
    "qwenimage": r"transformer_blocks\.1\.(txt_mlp|attn\.(add_q_proj|to_add_out|norm_added_q))\.",  # dropped text
    "sd3": r"transformer_blocks\.1\.attn\.add_q_proj\.",  # its last block asks nothing of the text's tokens
    "z_image": r"(x|cap)_pad_token",  # for lengths that are no multiple of 32
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_parameters(name: str, tmp_path: Any) -> None:
    pipe, net, source = known(name, tmp_path)
    batch = source.rows([0, 1])
    net.requires_grad_(True).train()
    net(torch.randn(batch.shape), torch.tensor([0.7, 0.4]), batch.cond).square().mean().backward()
    missing = {n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)}
    assert missing == {n for n, _ in net.named_parameters() if re.match(f"net.{UNREACHED.get(name, '$')}", n)}


class WithData:
    """Encoded prompts beside random latents."""

    has_data, classes, name = True, 0, "prompts and noise"

    def __init__(self, source: Encoded):
        self.source, self.shape = source, source.shape

    def batch(self, n: int, generator: Any, device: Any = "cpu") -> Batch:
        batch = self.source.batch(n, generator, device)
        return replace(batch, x0=torch.randn(batch.shape, generator=generator))


def fixed_loss(turn: Any, nets: Any, batch: Batch) -> float:
    """The loss under the same noise, before and after."""
    total = 0.0
    for seed in range(4):
        seed_all(seed, rank=0)
        with torch.no_grad():
            total += float(turn.loss(nets, batch, 0)[0])
    return total / 4


METHODS: dict[str, Callable[[], Any]] = {
    "dmd2": lambda: DMD2(gan_weight=0.0, student_every=2),
    "sid": SiD,
    "cm": CM,
}


@pytest.mark.parametrize("clone_", ("full", "lora"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_of_training_lower_the_loss(name: str, method: str, clone_: str, tmp_path: Any) -> None:
    pipe, net, source = known(name, tmp_path)
    batch = source.rows([0, 1, 2])
    if method == "cm":
        batch = replace(batch, x0=0.5 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(1)))

    class Same:
        shape, has_data, classes, name = net.shape, method == "cm", 0, "one batch"

        def batch(self, n: int, generator: Any, device: Any = "cpu") -> Batch:
            return batch

    before = {k: v.clone() for k, v in net.state_dict().items()}
    lora = {"clone": "lora", "lora_rank": 4} if clone_ == "lora" else {}
    still = {} if method == "cm" else {"lrs": {"student": 1e-9}}  # else fake follows samples that move away
    rate = 3e-3 if clone_ == "lora" else 3e-4
    config = FitConfig(iterations=16, batch=3, lr=rate, precision="float32", ema=(0.0,), **lora, **still)
    first = last = None
    for step in fit(METHODS[method](), Same(), net, config):
        if 1 < step.index < step.total:
            continue
        nets = {**{k: role.net for k, role in step.roles.items()}, "teacher": net}
        trained = "student" if method == "cm" else "fake"
        turn = next(t for t in METHODS[method]().turns if trained in t.trains)
        value = fixed_loss(turn, {**nets, "target": nets["student"]}, batch)
        first, last = (value if first is None else first), value
    assert first is not None and last is not None and last < first
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the teacher's own weights stay


def one_step(nets: Any, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """x0 of the student from pure noise."""
    net, t = nets["student"], nets["student"].path.at(torch.ones(()))
    with torch.no_grad():
        return predict(net, noise * net.path.coeffs(t)[1], t.expand(len(noise)), batch.cond, "x0")


def pushed(nets: Any, batch: Batch, x: torch.Tensor, scale: float) -> torch.Tensor:
    """fake - real at x with noise, on average over noise and times: what DMD takes off x, written out again."""
    total, path = torch.zeros_like(x), nets["teacher"].path
    with torch.no_grad():
        for seed in range(16):
            generator = torch.Generator().manual_seed(seed)
            t = path.at(torch.rand(len(x), generator=generator) * 0.96 + 0.02)
            x_t = path.mix(x, torch.randn(x.shape, generator=generator), t)
            u, c = (predict(nets["teacher"], x_t, t, cond, "x0") for cond in (batch.uncond, batch.cond))
            d = predict(nets["fake"], x_t, t, batch.cond, "x0") - (u + scale * (c - u))
            total += d / d.flatten(1).norm(dim=1).view(-1, *[1] * (d.ndim - 1))
    return total


@pytest.mark.parametrize("clone_", ("full", "lora"))
@pytest.mark.parametrize("method", ("dmd2", "sid"))
@pytest.mark.parametrize("name", ("dit", "sd3", "wan", "cogvideox"))
def test_the_student_goes_where_a_fixed_critic_sends_it(name: str, method: str, clone_: str, tmp_path: Any) -> None:
    """The samples of both move against fake - real, and SiD's loss falls; the value of DMD2's says nothing."""
    pipe, net, source = known(name, tmp_path)
    batch = source.rows([0, 1, 2])

    class Same:
        shape, has_data, classes, name = net.shape, False, 0, "one batch"

        def batch(self, n: int, generator: Any, device: Any = "cpu") -> Batch:
            return batch

    scale = 3.0
    how = DMD2(gan_weight=0.0, student_every=1, cfg_scale=scale) if method == "dmd2" else SiD(cfg_scale=scale)
    lora = {"clone": "lora", "lora_rank": 4} if clone_ == "lora" else {}
    config = FitConfig(
        iterations=24, batch=3, lr=3e-3 if clone_ == "lora" else 3e-4, precision="float32", ema=(0.0,),
        lrs={"fake": 1e-12}, **lora,
    )  # fmt: skip
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    nets: dict[str, Any] = {"student": net, "fake": net, "teacher": net}  # as training begins
    turn = next(t for t in how.turns if "student" in t.trains)
    x, loss = one_step(nets, batch, noise), fixed_loss(turn, nets, batch)
    push = pushed(nets, batch, x, scale)
    for step in fit(how, Same(), net, config):
        nets = {**{k: role.net for k, role in step.roles.items()}, "teacher": net}
    moved = one_step(nets, batch, noise) - x
    along = torch.cosine_similarity(moved.flatten(1), push.flatten(1))
    assert float(along.max()) < -0.15 if method == "dmd2" else float(along.mean()) < -0.2, along
    assert method == "dmd2" or fixed_loss(turn, nets, batch) < loss


@pytest.mark.parametrize("name", NAMES)
def test_adapters_share_the_pipelines_own_weights(name: str) -> None:
    _, _, net = probed(name)
    twin = clone(net, lora=LoRA(2))
    own = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() not in own for p in twin.parameters())
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_taps_give_tokens_and_gradient_checkpointing_changes_nothing(name: str, tmp_path: Any) -> None:
    pipe, net, source = known(name, tmp_path)
    batch = source.rows([0, 1])
    x, t = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7, 0.4])
    pred, tokens = net(x, t, batch.cond, taps=range(len(net.blocks)))
    assert torch.equal(pred, net(x, t, batch.cond))
    assert all(v.ndim == 3 and len(v) == 2 and v.shape[-1] == net.config.width > 0 for v in tokens)
    for found in fit(DMD2(gan_weight=3e-3, student_every=1), WithData(source), net, FitConfig(iterations=1, batch=2)):
        assert found.log["grad/disc"] > 0  # a discriminator reads them
    grads = []
    for on in (False, True):
        twin = clone(net)
        try:
            twin.checkpointing = on
        except UnsupportedModel:
            pytest.skip("diffusers has no checkpointing for this network")
        twin(x, t, batch.cond).square().mean().backward()
        grads.append([p.grad for p in twin.parameters() if p.grad is not None])
        assert twin.checkpointing == on
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_two_time_method_runs_or_is_refused_with_the_reason(name: str, tmp_path: Any) -> None:
    pipe, net, source = known(name, tmp_path)
    with pytest.raises(UnsupportedModel, match="second time"):
        clone(net, second_time=True)


def test_guidance_and_sampling_are_the_cores(tmp_path: Any) -> None:
    pipe, net, source = known("sd3", tmp_path)
    batch = source.rows([0, 1])
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    x = sample(net, noise, batch.cond, Sampling(even(3), cfg_scale=4.0), uncond=batch.uncond)
    assert x.shape == noise.shape and bool(torch.isfinite(x).all())
    t = torch.full((2,), 0.8)
    one_call = guided(net, noise, t, batch.cond, batch.uncond, 4.0)
    assert gap(one_call, guided(net, noise, t, batch.cond, net.null(batch.cond), 4.0, two_calls=True)) < 1e-5


def test_half_precision_pipelines_are_learnt_within_their_rounding_and_trained_in_float32(tmp_path: Any) -> None:
    for name in ("flux", "sd3"):
        pipe, call = FAMILIES[name]()
        pipe.to(dtype=torch.bfloat16)
        net = denoiser(pipe, call)
        time = net.templates[net.shape]["timestep"]
        assert float(time.slope) == (0.001 if name == "flux" else 1.0) and float(time.offset) == 0.0
        twin = clone(net)
        assert all(p.dtype == torch.float32 for p in twin.parameters())
        source = Encoded(encode(pipe, net, PROMPTS, tmp_path / name), net.shape)
        batch = source.rows([0, 1])
        x, t = torch.randn(batch.shape), torch.tensor([0.7, 0.4])
        with torch.no_grad():
            alike = torch.cosine_similarity(
                twin(x, t, batch.cond).flatten(), net(x, t, batch.cond).float().flatten(), 0
            )
            assert float(alike) > 0.95  # random networks blow the rounding up
            assert gap(clone(net, lora=LoRA(2))(x, t, batch.cond).float(), net(x, t, batch.cond).float()) < 1e-6


def test_a_sample_of_another_size_is_refused_until_it_was_shown() -> None:
    pipe, call, net = probed("sd3")
    cond = conditions(net.templates[net.shape], record(pipe, net.found.call | net.found.quiet, 2, stop=0).looks[-1])
    with pytest.raises(ConfigError, match="was shown samples of"):
        net(torch.randn(1, 4, 16, 8), torch.tensor([0.5]), cond)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda pipe: pipe.register_modules(transformer=None), "has no denoiser"),
        (lambda pipe: pipe.register_modules(scheduler=None), "has no scheduler"),
    ],
)
def test_a_pipeline_without_its_parts_is_refused(change: Any, sentence: str) -> None:
    pipe, call = FAMILIES["sd3"]()
    change(pipe)
    with pytest.raises(UnsupportedModel, match=sentence):
        denoiser(pipe, call)


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    pipe, call = FAMILIES["sd3"]()
    with pytest.raises(ConfigError, match="heigth.*did you mean 'height'"):
        denoiser(pipe, heigth=8)


@pytest.mark.parametrize(
    ("slope", "offset", "dtype"),
    [
        (0.0123457, 0.25, torch.float32), (0.001, 0.0, torch.float32), (1.0, 0.0, torch.float32),
        (0.001, 0.0, torch.bfloat16), (-0.001, 1.0, torch.bfloat16), (1.0, 0.0, torch.bfloat16),
    ],
)  # fmt: skip
def test_a_time_map_is_found_through_the_rounding_of_its_values(slope: float, offset: float, dtype: Any) -> None:
    t = torch.linspace(999, 40, 8, dtype=torch.float64)
    for early in (False, True):
        shown = Time(torch.tensor([slope]).double(), torch.tensor([offset]).double(), dtype, early=early)
        found = fitted(shown(t).double()[:, None], t, dtype)
        other = torch.linspace(987, 3, 57, dtype=torch.float64)
        assert float((found(other).double() - shown(other).double()).abs().max()) <= 2e-6 * max(1, 1000 * abs(slope))
        if slope != 0.0123457:
            assert float(found.slope) == slope and float(found.offset) == offset
            assert dtype == torch.float32 or slope == 1 or found.early == early


def test_a_stopped_probe_leaves_the_pipeline_as_it_was() -> None:
    pipe, call, net = probed("flux")
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    first = pipe(**call, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
    denoiser(pipe, call)
    again = pipe(**call, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(first, again)
    assert one(pipe, net, "a cat").keys() and error_of(net, record(pipe, net.found.call, 2)) < 1e-5


def test_two_time_methods_say_so() -> None:
    with pytest.raises(UnsupportedModel, match="second time"):
        next(fit(MeanFlow(), None, probed("flux")[2]))
