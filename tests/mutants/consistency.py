# ruff: noqa: E501
"""Mutations of the consistency models' relatives and of what they share."""

from __future__ import annotations

from dataclasses import replace

from mutant import Mutation, core, method

OWN = "tests/test_methods_consistency.py"


def first(words: str, rows: list[Mutation]) -> list[Mutation]:
    """The same mutations, with the tests of this group among theirs."""
    return [replace(m, tests=(*m.tests[:2], OWN, "-k", words)) for m in rows]


MUTANTS = [
    *first(
        "ict or refused",
        method(
            "cm",
            ("self.intervals * 2**s + 1)", "self.intervals * 2**s)", "a point too few on iCT's grid"),
            ("self.intervals * 2**s + 1)", "self.intervals * (s + 1) + 1)", "iCT's grid grows by addition"),
            ("return path.time(torch.atan(grid[i])), grid[i], grid[i - 1]", "return t, grid[i], grid[i - 1]", "iCT's time is not discretised"),
            ("return path.time(torch.atan(grid[i])), grid[i], grid[i - 1]", "return path.time(torch.atan(grid[i])), ratio, grid[i - 1]", "iCT's weight with the drawn time"),
            ("torch.searchsorted(grid, ratio).clamp(1, len(grid) - 1)", "torch.searchsorted(grid, ratio)", "iCT's ends of the grid"),
            ("min(80.0, float(ratio_at(path, path.at(1.0))))", "80.0", "a grid beyond the path's end"),
            ("self.schedule not in get_args(Schedule)", "False", "an unknown schedule"),
        ),
    ),
    *first(
        "pcm or lcm",
        method(
            "pcm",
            ("torch.randint(1, n + 1", "torch.randint(1, n", "never trains the first step from noise"),
            ("path.at((i - 1) // self.hops / self.phases)", "path.at(i // self.hops / self.phases)", "the last hop of a phase ends at itself"),
            ("path.at((i - 1) // self.hops / self.phases)", "path.at(0 * i / n)", "one phase for all: LCM"),
            ("torch.where(expand(inside, x_r), target, x_r)", "target", "no boundary at data"),
            ("batch.cond, batch.uncond, self.cfg_scale, teacher.kind)", "batch.cond, batch.uncond, None, teacher.kind)", "the teacher is not guided"),
            ("batch.uncond, self.cfg_scale, teacher.kind)", "batch.uncond, 1 + (self.cfg_scale or 0), teacher.kind)", "w + 1 instead of w"),
            ("        with torch.no_grad():\n\n            def look", "        if True:\n\n            def look", "the target is not stopped"),
            ("batch.noise, x_t, t, r))", "batch.noise, x_t, t, s))", "the teacher steps to the start of the phase"),
            ("torch.where(inside, r, t), s, batch.cond)", "torch.where(inside, t, r), s, batch.cond)", "the target's time"),
            ("self.huber**2) - self.huber", "self.huber) - self.huber", "c instead of c^2"),
            ("\"renoise\" if self.phases == 1 else \"ode\"", "\"renoise\"", "phases sampled with noise"),
        ),
    ),
    *first(
        "ctm",
        method(
            "ctm",
            ("weights=counts)", "weights=None)", "every count of solver steps as often"),
            ("x + expand(s - t, x) * net", "x + expand(t - s, x) * net", "the direction of time"),
            ("batch.cond, r=s)", "batch.cond, r=t)", "the student does not see s"),
            ("import Hop, heun", "import Hop, ode as heun", "the solver is Euler"),
            ("batch.uncond, self.cfg_scale, \"velocity\")", "batch.uncond, None, \"velocity\")", "the teacher is not guided"),
            ("jump(jump(x_u, u, s), s, torch.zeros_like(s))", "jump(x_u, u, torch.zeros_like(s))", "hard consistency in the target"),
            ("jump(held, s, torch.zeros_like(s)) - target", "jump(held, s, torch.zeros_like(s)) + target", "the sign of the target"),
            ("error = (jump(held, s, torch.zeros_like(s)) - target).float().pow(2).mean()\n        (pull,) = torch.autograd.grad(error, held)\n        return error.detach() + ((x_s - held.detach()) * pull).sum()",
             "return (jump(x_s, s, torch.zeros_like(s)) - target).float().pow(2).mean()", "the outer student is trained too"),
            ("        with torch.no_grad():\n            x_u, u", "        if True:\n            x_u, u", "the target keeps its graph"),
            ("* (i - hops + 1)).long().clamp_max(i - hops)", "* (i + 1)).long()", "s after u"),
            ("soft + self.dsm_weight * dsm", "soft", "no denoising"),
            ("r=t), x0, t)", "r=0 * t), x0, t)", "denoises at s = 0"),
            ("if self.cfg_scale not in (None, 1):", "if False:", "denoises without guidance"),
            ("draws = (self.times.draw(path, half, x0.device)", "draws = (self.noisy.draw(path, half, x0.device)", "only noisy times are denoised"),
        ),
    ),
    *first(
        "tcm or boundary or collapsed or student_t",
        method(
            "tcm",
            ("double_every=every), count), (replace(self, stage=2), iterations - count)", "double_every=every), iterations - count), (replace(self, stage=2), count)", "the stages' lengths swapped"),
            ("self.doublings, count)", "self.doublings, iterations)", "TCM doubles over both stages"),
            ("nets if self.stage == 1 else", "nets if self.stage == 2 else", "stage 2 has no frozen network"),
            ("frozen = consistency_target(nets[\"teacher\"]", "frozen = consistency_target(net", "the boundary follows the student"),
            ("expand(r < path.at(self.transition).to(r), x_r), frozen, target)", "expand(r > path.at(self.transition).to(r), x_r), frozen, target)", "the frozen network above t'"),
            ("self.doublings if late else", "0 if late else", "stage 2 starts with a wide gap"),
            ("t[k:].maximum(start)", "t[k:]", "times below t'"),
            ("start.expand(k), t[k:]", "t[:k], t[k:]", "no sample at the boundary"),
            ("int(self.boundary * n + random.random())", "int(self.boundary * n)", "small batches never meet the boundary"),
            ("each[:k].sum() / max(k, 1)", "each[:k].mean()", "an empty boundary is not a number"),
            ("each[k:].sum() / max(len(each) - k, 1)", "each[k:].mean()", "an empty rest is not a number"),
            ("inner + self.boundary_weight * edge", "inner + edge", "the boundary has no weight"),
            ("each = distance / (ratio - below)", "each = distance", "the weight 1/(t - r)"),
            ("max(steps - 1, 1)", "steps", "sampled at even times"),
        ),
    ),
    *core(
        "core/losses",
        "tests/test_methods.py tests/test_methods_mean.py tests/test_methods_turns.py -k r_zero or ct or cd or tcm or ict",
        ("(1 + 8 * torch.sigmoid(-ratio))", "(1 + 8 * torch.sigmoid(ratio))", "the gap's dependence on t"),
        ("q ** -(doubled + 1)", "q**-doubled", "one doubling late"),
        ("torch.where(start, x_r, predict(net, x_r, per_sample(r, x_r), cond))", "predict(net, x_r, per_sample(r, x_r), cond)", "data at r = 0 goes through the network"),
        ("@torch.no_grad()\ndef consistency_target", "def consistency_target", "the target is not stopped"),
    ),
    *core(
        "core/times",
        f"{OWN} -k student_t",
        ("torch.cosh(y).pow(-self.df)", "torch.cosh(y).pow(-self.df - 1)", "the density of T, not of asinh T"),
        ("self.mean + self.std * math.sqrt(self.df) * torch.sinh(drawn)", "self.mean + self.std * torch.sinh(drawn)", "the width of T"),
        ("/ (self.std * math.sqrt(self.df))).tolist()", "/ self.std).tolist()", "where T is cut off"),
    ),
]  # fmt: skip
