"""Every method on equal terms: one teacher, one budget of network forwards, judged at 1, 2 and 4 steps.

    python benchmarks/methods.py [--methods sid flowmap ...] [--seeds 0 1 2]
    python benchmarks/methods.py --data fashion-mnist --images runs/fashion/train.npz   # fashion_teacher.py prepare
    python benchmarks/methods.py --write

Each (method, seed) is one file under --out, with its students beside it, so an interrupted run goes on where it
stopped, and one method can be run alone. ``--write`` gathers what is there into results/methods-DATA.json and its page
under docs/.

The budget is counted in forwards of 256 samples: the floating-point operations of an iteration (counted by torch, both
passes, all networks) over those of one forward of the teacher. Every method gets the same treatment:

- A pilot of 15 % of the budget with the learning rate of its row and one with 1e-3, every network's in proportion;
  the better one has the whole budget, from the start. The pilots come on top, and the file holds both. ``--rates``
  takes what another comparison chose instead, as results/methods-digits.json.
- A method whose iteration is so dear that fewer than 100 fit gets a smaller batch.
- BOSS' search for its times comes on top: 100 trajectories of 100 steps, 39 forwards.
- A method that trains for one step count has the budget for 4 steps and again for 1, and its pilots are at 4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any, cast

import torch
from common import save
from gather import LEFT_OUT, SHOWN, write
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hasten import FitConfig, Judge, Sampling, even, keep_freed_memory, load_data, load_model, nfe, save_model
from hasten.core.errors import ConfigError, Diverged, HastenError
from hasten.core.method import Method
from hasten.demo import patch_for
from hasten.fit import Step, fit
from hasten.measure import clock
from hasten.measure.features import Features, classifier
from hasten.measure.pictures import pixels
from hasten.methods.flow import Flow
from hasten.models.dit import DiT
from hasten.names import METHODS, method_class, variations
from hasten.progress import draw
from hasten.progress import write as write_file
from hasten.recipe import dit_config, for_steps
from hasten.role import autocast
from hasten.run import find_model, network, settled
from hasten.stages import SPLIT, Plan

STEPS = (1, 2, 4)
EACH = (4, 1)  # of a method that trains for one step count
DEFAULT = {"lr": 1e-3, "ema": (0.99,), "batch": 256, "schedule": "linear"}
OTHER = 1e-3  # the learning rate that every method's own is tried against
PILOT = 0.15  # of the budget
FEWEST = 100  # iterations, below which the batch is halved, down to SMALLEST
SMALLEST = 32


def main() -> None:
    """Run what is missing, or write what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", help="digits, or a teacher with its judge: a folder or a name")
    parser.add_argument("--images", help="the training images of that teacher")
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m not in LEFT_OUT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forwards", type=int, default=1000, help="the budget, in forwards of 256 samples")
    parser.add_argument("--each", type=int, nargs="+", help="train any method for each of these step counts alone")
    parser.add_argument("--guided", type=float, help="the scale of the teacher's guidance; methods need a cfg_scale")
    parser.add_argument("--set", type=json.loads, default={}, help="other settings of the methods, as JSON")
    parser.add_argument("--start", help="a student that this benchmark left, from which these start")
    parser.add_argument("--rates", type=File, help="a result of this benchmark whose learning rates are taken")
    parser.add_argument("--scales", type=float, nargs="*", default=[1.25, 1.5, 2.0], help="of the teacher's guidance")
    parser.add_argument("--count", type=int, default=5000, help="samples judged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--longer", type=File, nargs="+", help="with --write: each --out of runs made otherwise")
    args = parser.parse_args()
    keep_freed_memory()
    out = File(args.out) / File(args.data).name
    if args.longer and not args.write:
        raise SystemExit("--longer says what --write adds; give both.")
    if args.write:
        name = File(args.data).name
        save(f"methods-{name}", write(out, name, [folder / name for folder in args.longer or ()]), 0, args.device)
        return
    start = args.start and File(args.start).name
    args.otherwise = {"guided": args.guided, "start": start, "alone": bool(args.each), "set": args.set}
    for file in out.glob("*-*.json"):
        there = json.loads(file.read_text())
        if any((there.get(k) or None) != (v or None) for k, v in args.otherwise.items()):
            raise SystemExit(f"{file} was made with other --guided, --start, --each or --set; choose another --out.")
    for name in args.methods:
        made(name, args)
    args.before = spent(File(args.start)) if args.start else 0
    args.start_net = network(args.start, args.device) if args.start else None
    teacher, source, judge = prepare(args.data, args.images, out, torch.device(args.device))
    if not (out / "teacher.png").exists():
        rows = [strip(teacher, Sampling(even(n))) for n in (*STEPS, 50)]
        Image.fromarray(torch.cat(rows).numpy()).save(out / "teacher.png")
    wrong = []
    for seed in args.seeds:
        for name in args.methods:
            if (out / f"{name}-{seed}.json").exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            try:
                found, shown = distil(name, seed, teacher, source, judge, args, out)
            except Exception:  # a defect: said at the end, and no reason to lose the rows that follow
                traceback.print_exc()
                wrong.append(f"{name}-{seed}")
                continue
            if shown:
                Image.fromarray(torch.cat(shown).numpy()).save(out / f"{name}-{seed}.png")
            write_file(out / f"{name}-{seed}.json", lambda f, found=found: f.write_text(json.dumps(found, indent=1)))
    baseline(teacher, judge, out / "teacher.json", args.count, args.scales)
    if wrong:
        raise SystemExit(f"Failed by a defect, see above: {', '.join(wrong)}")


def made(name: str, args: argparse.Namespace) -> Any:
    """A method with the defaults of its name, but for --guided and --set."""
    try:
        guided = {"cfg_scale": args.guided} if args.guided else {}
        return method_class(name)(**{**variations(name), **guided, **args.set})
    except (TypeError, ConfigError) as error:
        raise SystemExit(f"{name} takes no such --guided or --set: {error}") from error


def spent(start: File) -> int:
    """The forwards that an earlier student cost: METHOD-SEED-STEPS of this benchmark, METHOD-SEED.json beside it."""
    file = start.parent / f"{'-'.join(start.name.split('-')[:2])}.json"
    if not file.exists():
        raise SystemExit(f"--start is a student that this benchmark left, with {file.name} beside it; it is not there.")
    return json.loads(file.read_text())["forwards"]


def prepare(data: str, training: str | None, out: File, device: torch.device) -> tuple[Any, Any, Judge]:
    """(teacher, training data, judge): a pretrained one's, or made once and kept in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    if training:
        pretrained = find_model(data)
        return load_model(pretrained, device), load_data(training), Judge.load(pretrained / "judge.safetensors")
    images = load_data(data)
    train, held_out, rest = images.split(SPLIT, seed=0)
    file, folder = out / "features.safetensors", out / "teacher"
    if not file.exists():
        classifier(rest.x, rest.labels, images.classes, seed=0, iterations=Plan().features).save(file)
    judge = Judge(Features.load(file, device), train.x, train.labels, held_out.x, held_out.labels)
    if not (folder / "model.json").exists():
        plan = Plan()
        torch.manual_seed(0)
        shape = {"width": plan.width, "depth": plan.depth, "heads": plan.width // 32, "patch": patch_for(images.shape)}
        net = DiT(dit_config(shape, images.shape, images.classes))
        config = FitConfig(plan.teacher, lr=2e-3, schedule="linear", warmup=50, ema=(0.995,), precision="float32")
        *_, last = fit(Flow(), train, net, config, device=device)
        save_model(last.student, folder)
    return load_model(folder, device), train, judge


def look(net: Any, sampling: Sampling, judge: Judge, count: int, seed: int = 0) -> dict[str, Any]:
    """Quality, network evaluations and the median time of a batch of one way to sample."""
    device = next(net.parameters()).device
    with autocast("auto", device):  # bfloat16 where the device computes in it natively
        images, labels = draw(net, sampling, count, seed=seed)
    took = clock.latency({"it": lambda: draw(net, sampling, 125, seed=seed, batch=125)}, 5, 1, device)["it"].p50
    return {"nfe": nfe(sampling), "ms of 125": 1e3 * took, **judge(images, labels, interval=True)}


def baseline(teacher: Any, judge: Judge, file: File, count: int, scales: list[float]) -> None:
    """The teacher at 1, 2, 4, 8 and 50 steps, guided at 50, another seed of it, and the floor."""
    if file.exists():
        return
    plans = {f"teacher, {n} steps": Sampling(even(n)) for n in (50, 8, 4, 2, 1)}
    plans |= {f"teacher, 50 steps, guided {w:g}": Sampling(even(50), cfg_scale=w) for w in scales}
    rows = {name: look(teacher, sampling, judge, count) for name, sampling in plans.items()}
    rows["teacher, 50 steps, another seed"] = look(teacher, Sampling(even(50)), judge, count, seed=1)
    file.write_text(json.dumps({"floor": judge.floor, "halves": judge.floor_halves, "rows": rows}, indent=1) + "\n")


def strip(net: Any, sampling: Sampling) -> Tensor:
    """A few samples of fixed noise and classes, side by side: uint8 [H, SHOWN * W, 3]."""
    return torch.cat(list(pixels(draw(net, sampling, SHOWN, seed=3)[0])), dim=1)


def distil(
    name: str, seed: int, teacher: Any, source: Any, judge: Judge, args: argparse.Namespace, out: File
) -> tuple[dict[str, Any], list[Tensor]]:
    """One method with the whole budget, and strips of its samples at 1, 2 and 4 steps.

    Seeds after the first take the first one's learning rate.
    """
    row, rate = METHODS[name], chosen(name, args.rates, out / f"{name}-0.json")
    plain = made(name, args)
    found: dict[str, Any] = {"method": name, "seed": seed, "forwards": args.forwards, "steps": {}, "pilots": {},
                             "rates": args.rates.name if args.rates and rate else None, **args.otherwise,
                             "before": args.before}  # fmt: skip
    shown = []
    alone = args.each or (EACH if row.one_count else None)
    for steps in [(n,) for n in alone] if alone else [tuple(n for n in STEPS if samples(plain, n))]:
        try:
            method = settled(for_steps(plain, steps), teacher, source)
            config = FitConfig(**{**DEFAULT, **dict(row.fit), "seed": seed})
            cost = forwards(method, source, teacher, config)
            while args.forwards * 256 / config.batch / cost < FEWEST and config.batch > SMALLEST:
                config = replace(config, batch=config.batch // 2)
            if rate is None:
                rates = dict.fromkeys((config.lr, OTHER))
                tried = {r: pilot(method, source, teacher, at_rate(config, r), cost, judge, steps, args) for r in rates}
                rate, found["pilots"] = min(tried, key=tried.__getitem__), {f"{r:g}": v for r, v in tried.items()}
                print(f"  pilots {found['pilots']}", flush=True)
            started = time.perf_counter()
            last = train(method, source, teacher, at_rate(config, rate), cost, args.forwards, args)
        except HastenError as error:
            found["failed"] = str(error)
            return found, []
        run = {"iterations": last.total, "forwards an iteration": round(cost, 2), "batch": config.batch, "lr": rate}
        run["seconds"] = round(time.perf_counter() - started, 1)
        student = last.student.eval()
        save_model(student, out / "-".join(map(str, (name, seed, *steps))))
        for n in steps:
            found["steps"][str(n)] = {**look(student, method.sampling(n), judge, args.count), **run}
            shown.append(strip(student, method.sampling(n)))
            fd, recall = (found["steps"][str(n)][k] for k in ("fd", "recall"))
            print(f"  {n} steps: FD {fd:.3f}, recall {recall:.3f}, lr {rate:g}, {run['seconds']:.0f} s", flush=True)
    return found, shown


def chosen(name: str, rates: File | None, first: File) -> float | None:
    """The learning rate that ``first`` or the comparison in ``rates`` chose for a method, None where neither has it."""
    runs = [json.loads(first.read_text())] if first.exists() else []
    runs += [json.loads(rates.read_text())["methods"].get(name, {})] if rates else []
    return next((row["lr"] for run in runs for row in run.get("steps", {}).values()), None)


def samples(method: Any, steps: int) -> bool:
    """Whether a method's students can be sampled in so many steps; BOOT's make theirs in one."""
    try:
        method.sampling(steps)
    except ConfigError:
        return False
    return True


def at_rate(config: FitConfig, lr: float) -> FitConfig:
    """``config`` with this learning rate, those of single networks in proportion."""
    return replace(config, lr=lr, lrs={k: v * lr / config.lr for k, v in config.lrs.items()})


def train(
    method: Any, source: Any, teacher: Any, config: FitConfig, cost: float, budget: float, args: argparse.Namespace
) -> Step:
    """The last step of a run that costs ``budget`` forwards of 256 samples, where an iteration costs ``cost``."""
    iterations = round(budget * 256 / config.batch / cost)
    config = replace(config, iterations=iterations, warmup=min(20, iterations // 10))
    *_, last = fit(method, source, teacher, config, device=args.device, start=args.start_net)
    return last


def pilot(
    method: Any, source: Any, teacher: Any, config: FitConfig, cost: float, judge: Judge, steps: tuple[int, ...],
    args: argparse.Namespace,
) -> float:  # fmt: skip
    """The geometric mean of FD + floor over ``steps`` after a short run, on its own noise; infinite if it diverges."""
    try:
        last = train(method, source, teacher, config, cost, PILOT * args.forwards, args)
    except Diverged:
        return math.inf
    net = last.student.eval()
    with autocast("auto", torch.device(args.device)):
        fds = [judge(*draw(net, method.sampling(n), 1000, seed=7))["fd"] for n in steps]
    return round(statistics.geometric_mean(fd + judge.floor["fd"] for fd in fds), 4)


class Everything(nullcontext):
    """Stands for torch's tracker of modules, whose hooks refuse a gradient that a loss takes itself (CTM's does)."""

    parents = frozenset({"Global"})


class Flops(FlopCounterMode):
    """Counts over everything, without telling modules apart."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = Everything()  # type: ignore[assignment]


def forwards(method: Any, source: Any, teacher: Any, config: FitConfig) -> float:
    """Floating-point operations of an iteration, averaged over stages and turns, over those of one forward.

    Counted at a small batch, as both grow with it alike.
    """
    device, config = next(teacher.parameters()).device, replace(config, batch=SMALLEST)
    batch = source.batch(config.batch, torch.Generator().manual_seed(0), device)
    one = Flops()
    with torch.no_grad(), one:
        teacher(batch.data, torch.full((config.batch,), 0.5, device=device), batch.cond)
    flops = 0.0
    for stage, length in method.stages(1000):
        period = math.lcm(*(turn.every for turn in stage.turns))
        rounds = period * -(-6 // period)  # several, as roll-outs have random lengths
        if getattr(stage, "warmup", 0):  # as it costs most of the run; rCM's is cheaper until then
            stage = replace(cast(Any, stage), warmup=1)
        alone = SimpleNamespace(stages=lambda n, stage=stage: ((stage, n),))  # fit asks no more of a method
        steps = fit(cast(Method, alone), source, teacher, replace(config, iterations=100), device=device)
        many = Flops()
        with many:
            for _ in range(rounds):
                next(steps)
        flops += many.get_total_flops() / rounds * length / 1000
    return flops / one.get_total_flops()


if __name__ == "__main__":
    main()
