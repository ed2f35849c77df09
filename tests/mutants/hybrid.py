# ruff: noqa: E501
"""Mutations of the hybrids and of the tangent that they share with sCM."""

from __future__ import annotations

from mutant import Mutation

HYBRID = ("tests/test_methods_turns.py", "tests/test_methods.py", "tests/test_methods_hybrid.py", "-k")


def mutants(name: str, *rows: tuple[str, str, str], also: str) -> list[Mutation]:
    """Mutations of one file, tested by the equations and then by the hybrids' own tests that ``also`` names."""
    return [Mutation(f"hasten/{name}.py", *row, (*HYBRID, also)) for row in rows]


MUTANTS = [
    *mutants(
        "methods/rcm",
        ("(out.detach() - dx) - rho", "(out.detach() + dx) - rho", "the sign of dx"),
        ("x_t) * x_t - along", "x_t) * x_t + along", "the sign of the JVP"),
        ("x_t) * x_t - along", "x_t) * x_t - rho * along", "the warm-up scales the JVP"),
        ("torch.sqrt(1 - (rho * s).pow(2))", "c", "the pull does not follow the warm-up"),
        ("target = out.detach() + unit_tangent", "target = out + unit_tangent", "the target is not stopped"),
        ("unit_tangent(g, self.tangent_c)", "g", "the tangent is not normalised"),
        ("target = x - dmd_gradient(real, fake, x)", "target = x + dmd_gradient(real, fake, x)", "away from the teacher"),
        ("batch.cond, batch.uncond, self.cfg_scale)\n            fake", "batch.cond, batch.uncond, None)\n            fake", "DMD's teacher is not guided"),
        ("self.dmd_weight * dmd, logged", "dmd, logged", "DMD has no weight"),
        ("(x - target).float().pow(2)).mean()", "(x - target).float().pow(2)).mean() / x[0].numel()", "a mean instead of a sum"),
        ("        if step < self.warmup:", "        if False:", "DMD from the first step"),
        ("lambda: FewStep((1, 2, 3, 4), \"last\")", "lambda: FewStep((1, 2, 3, 4), \"any\")", "roll-outs train any of their steps"),
        ("self.student, self.student_every)", "self.student)", "the student moves at every step"),
        ("        with torch.no_grad():\n            x = self.generate", "        if True:\n            x = self.generate", "the critic trains the student"),
        also="rcm or books or hybrid_learns",
    ),
    *mutants(
        "methods/sprint",
        ("(out.detach() - dx) - rho", "(out.detach() + dx) - rho", "the sign of dx"),
        ("rho * (expand(c * s, x_t) * x_t + along)", "expand(c * s, x_t) * x_t + along", "no warm-up"),
        ("* error * c / s + w", "* error + w", "the weight 1/tan t"),
        ("sum_dims((out - target).float().pow(2))", "(out - target).float().pow(2).flatten(1).mean(1)", "the GAN outweighs consistency D-fold"),
        ("torch.exp(-w) * error", "torch.exp(w) * error", "the sign of the log variance"),
        ("self.gan_weight * gan, logged", "gan, logged", "the GAN has no weight"),
        ("torch.rand_like(t) < self.largest", "torch.rand_like(t) > self.largest", "the wrong share at the largest time"),
        ("path.at(torch.ones_like(t)), t)", "path.at(torch.zeros_like(t)), t)", "the smallest time instead of the largest"),
        ("x_t = teacher.path.mix(x0, batch.noise(), t)", "x_t = x0", "the discriminator sees clean samples"),
        ("t = self.disc_times.draw(", "t = self.times.draw(", "the student's times for the discriminator"),
        ("hinge_critic(real, fake)", "hinge_critic(fake, real)", "the discriminator's labels"),
        ("        with torch.no_grad():\n            x = self.generated", "        if True:\n            x = self.generated", "the critic trains the student"),
        ("range(1, 5)} - {-1}", "range(0, 4)} - {-1}", "the last block is not tapped"),
        also="sprint or books",
    ),
    *mutants(
        "methods/hyper",
        ("(i - 1) // (n // k) * (n // k)", "i // (n // k) * (n // k)", "a segment's end belongs to the one below"),
        ("n, k = student.path, self.solver_steps, self.segments or self.start", "n, k = student.path, self.solver_steps, self.start", "the segments do not merge"),
        ("step_once(student, x_s, safe, e, batch.cond), x_s)", "step_once(student, x_s, safe, e, batch.cond), step_once(student, x_t, t, e, batch.cond))", "the teacher's last step in a segment is lost"),
        ("step_once(student, x_s, safe, e, batch.cond)", "step_once(student, x_t, t, e, batch.cond)", "the target is the prediction itself"),
        ("step_once(student, x_t, t, e, batch.cond) - target", "step_once(student, x_t, t, s, batch.cond) - target", "the prediction stops at s"),
        ("batch.uncond, self.cfg_scale, teacher.kind)", "batch.uncond, None, teacher.kind)", "the solver is not guided"),
        ("        with torch.no_grad():\n\n            def look", "        if True:\n\n            def look", "the target is not stopped"),
        ("dmd_gradient(real, fake, x.detach())", "dmd_gradient(fake, real, x.detach())", "away from the teacher"),
        ("batch.cond, batch.uncond, self.cfg_scale)\n            fake", "batch.cond, batch.uncond, None)\n            fake", "DMD's teacher is not guided"),
        ("keeps_teacher: bool = field(default=True", "keeps_teacher: bool = field(default=False", "students teach the later stages"),
        ("counts.append(counts[-1] // 2)", "counts.append(counts[-1] - 1)", "segments do not halve"),
        ("0.25 * (self.end == 1)", "0.25", "several steps end with DMD of one"),
        ("        if self.dmd_share and self.end > 1:", "        if False:", "a dmd_share that does nothing"),
        ("        with torch.no_grad():\n            x = FewStep()", "        if True:\n            x = FewStep()", "the critic trains the student"),
        also="(hyper or books or segment or original or hybrid_learns) and not removes",
    ),
    *mutants(
        "methods/twinflow",
        ("return ((expand(span, x) * u - total) / expand(h, x) - v)", "return ((expand(span, x) * u - total) / expand(h, x) + v)", "the sign of v"),
        ("* u - total) /", "* u + total) /", "the sign of the integral"),
        ("x, total = x - hop, total + hop", "x, total = x, total + hop", "the hops start at the same place"),
        ("x_t - expand(h, x_t) * v", "x_t + expand(h, x_t) * v", "a step away from the data"),
        (".clamp(-self.limit, self.limit)\n\n    @torch.no_grad()\n    def difference", "\n\n    @torch.no_grad()\n    def difference", "the residual is not cut"),
        ("return (fake - real)", "return (real - fake)", "rectifies towards its own samples"),
        ("r=torch.cat([end, t])).chunk(2)", "r=torch.cat([t, t])).chunk(2)", "no twin in the rectification"),
        ("1 - self.near * share[a:b]", "1 - share[a:b]", "the near part is not near"),
        ("t[b:c] * (1 - share[b:c]), end[c:]]", "t[b:c] * (1 - share[b:c]), t[c:]]", "the twin has no mark"),
        ("data = torch.cat([x0[:c], self.own(net, batch, slice(c, n))])", "data = x0", "the twin learns the data"),
        ("(1 - t[:c] + r[:c])", "(1 + t[:c] - r[:c])", "the weight's direction"),
        ("(error.detach() + self.floor**2)", "(error + self.floor**2)", "the root is not stopped"),
        ("(u - (u - pull).detach())", "(u - (u + pull).detach())", "the pull's sign"),
        ("base + self.match_weight * match", "base + match", "the rectification has no weight"),
        ("(1 - 1 / self.cfg_scale) * lead", "(self.cfg_scale - 1) * lead", "w - 1 for the network's own guidance"),
        ("clone(teacher, second_time=True)", "clone(teacher)", "no second time to mark the twin"),
        also="(twinflow and not any_number) or books",
    ),
    *mutants(
        "core/tangent",
        ("(expand(cs, x_t) * dx, cs)", "(expand(cs, x_t) * dx, torch.ones_like(cs))", "the tangent in t is not rescaled"),
        ("(expand(cs, x_t) * dx, cs)", "(dx, cs)", "the tangent in x is not rescaled"),
        ("batch.uncond, cfg_scale, \"v\")", "batch.uncond, None, \"v\")", "the teacher is not guided"),
        ("if teacher is None:", "if True:", "the conditional tangent instead of the teacher's"),
        ("g / expand(norm + c, g)", "g / expand(norm, g)", "c of the normalisation"),
        ("sum_dims(g.float().pow(2)).sqrt()", "g.float().pow(2).flatten(1).mean(1).sqrt()", "a root mean square instead of the norm"),
        also="scm or sct or rcm or sprint",
    ),
    *mutants(
        "fit",
        ("stage.networks(origin if kept else teacher, clone)", "stage.networks(teacher, clone)", "keeps_teacher is not kept"),
        ("            nets[\"student\"].load_state_dict(teacher.state_dict())", "            pass", "a later stage starts from the teacher"),
        ("config.lrs.keys() - trained", "config.lrs.keys() - {\"student\"}", "a network of a later stage has no learning rate"),
        also="original or resumes",
    ),
]  # fmt: skip
