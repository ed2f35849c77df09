# ruff: noqa: E501
"""Mutations of SiDA, LADD, ADD and moment matching, and of the losses and heads that they share."""

from __future__ import annotations

from dataclasses import replace

from mutant import Mutation, core, method

MINE = "tests/test_methods_adversarial.py"


def quick(name: str, *rows: tuple[str, str, str], cases: str, own: str) -> list[Mutation]:
    """Mutations whose tests are this group's: its own module and the equations on rectified flow and EDM."""
    tests = (MINE, "tests/test_methods_turns.py", "tests/test_methods.py", "-k", f"({cases}) and not vp or {own}")
    return [replace(m, tests=tests) for m in method(name, *rows)]


def shared(name: str, words: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of what the methods share, tested by this group's own module."""
    return [replace(m, tests=(MINE, "-k", words)) for m in core(name, "", *rows)]


MUTANTS = [
    *quick(
        "sid",
        ("features[0].mean(-1)", "features[0].mean(1)", "the logits are means over tokens instead of channels"),
        ("(len(fake.blocks) - 1) // 2", "len(fake.blocks) - 1", "the discriminator is the whole of fake"),
        ("critic_gan(real, generated)", "critic_gan(generated, real)", "the discriminator's labels"),
        ("(batch.data - x)\n", "batch.data\n", "data and sample in one noisy input"),
        ("logits.clamp(-10, 10)", "logits", "no limit to a logit's pull"),
        ("* (1 / norm).mean()", "", "the adversarial term without the norm"),
        ("loss + self.gan_weight * adversarial", "loss - self.gan_weight * adversarial", "the student helps the discriminator"),
        ("fake_weight(path, t).mean() * critic_gan", "critic_gan", "the discriminator without the weight over t"),
        ("return bool(self.gan_weight)", "return False", "trains without the data that it compares with"),
        ("denoising_x0(path, pred[: len(x)], x, t)", "denoising_x0(path, pred[len(x) :], x, t)", "fake denoises data instead of samples"),
        cases="sida",
        own="asked or weights_of or beyond",
    ),
    *quick(
        "ladd",
        ("return predict(teacher, x_t, t, cond, taps", "return predict(teacher, x_t.detach(), t, cond, taps", "no gradient through the teacher's features"),
        ("hinge_critic(real, generated)", "hinge_critic(generated, real)", "the discriminator's labels"),
        ("teacher.path.mix(batch.data, batch.noise(), t)\n", "batch.data\n", "clean data against noised samples"),
        ("seen.append(real_t + self.r1_noise", "seen.append(x_t + self.r1_noise", "R1 on the student's samples"),
        ("self.r1_noise * batch.noise()", "self.r1_noise**2 * batch.noise()", "the size of R1's noise"),
        ("approximate_r1(real, moved[0])", "approximate_r1(real.detach(), moved[0])", "R1 through one of its two ends"),
        ("LogitNormal(1.0, 1.0)", "LogitNormal(-1.0, 1.0)", "clean discriminator times"),
        (", apart=\"tokens\")", ", apart=\"heads\")", "one hinge for the mean of a head's tokens"),
        ("tuple(range(len(teacher.blocks)))", "(len(teacher.blocks) - 1,)", "the last block alone"),
        ("        with torch.no_grad():\n            x = noised", "        if True:\n            x = noised", "the critic keeps the student's graph"),
        ("self.student, self.student_every)", "self.student)", "the student moves at every step"),
        cases="ladd",
        own="ladd or blocks",
    ),
    *quick(
        "add",
        ("self.distill_weight * distilled,", "distilled,", "lambda is left out"),
        ("distill_weight: float = 2.5", "distill_weight: float = 1.0", "the paper's lambda"),
        ("torch.cos(teacher.path.angle(t))", "torch.sin(teacher.path.angle(t))", "noisier times count more"),
        ("batch.cond, batch.uncond, self.cfg_scale)", "batch.cond, batch.uncond, None)", "the teacher is not guided"),
        ("batch.uncond, self.cfg_scale)", "batch.uncond, 1 + (self.cfg_scale or 0))", "w + 1 instead of w"),
        ("        with torch.no_grad():\n            x_t = teacher", "        if True:\n            x_t = teacher", "the gradient passes through the teacher"),
        ("hinge_critic(disc(real), disc(read(x)))", "hinge_critic(disc(read(x)), disc(real))", "the discriminator's labels"),
        ("adversarial + self.r1_weight * r1", "adversarial - self.r1_weight * r1", "the sign of R1"),
        ("(\"disc\", \"features\") if self.features is None", "(\"disc\", \"features\") if self.features is not None", "given features are trained, own ones are not"),
        ("return adversarial + self", "return -adversarial + self", "the student helps the discriminator"),
        cases="add and books",
        own="add or given or score",
    ),
    *quick(
        "moment",
        ("gap = predict(nets[\"fake\"], z_s, s, batch.cond) - real", "gap = real - predict(nets[\"fake\"], z_s, s, batch.cond)", "the sign of the gap"),
        ("(real - pred).float().pow(2)", "2 * (real - pred).float().pow(2)", "the pull to the teacher twice as strong"),
        (" + (real - pred).float().pow(2))", ")", "no pull to the teacher"),
        ("Hop.between(path, \"x0\", lambda z, t: x, batch.noise, z_t, t, s)", "Hop.between(path, \"x0\", lambda z, t: x, batch.noise, z_t, t, t)", "compares at t instead of s"),
        ("z_s = ancestral(", "z_s = __import__(\"hasten.core.sample\", fromlist=[\"ode\"]).ode(", "a deterministic step instead of the posterior"),
        ("return x, z_s, s\n", "return x, z_s, t\n", "the moments' time is t"),
        ("/ self.steps).clamp_max(1.0)", ").clamp_max(1.0)", "hops longer than 1/k"),
        ("expand(self.weight(nets[\"fake\"].path, s), x) * gap", "gap", "the student without w(s)"),
        ("clamp(max=self.snr_max + 1)", "clamp(max=1e9)", "the weight is not truncated"),
        ("        with torch.no_grad():\n            x, z_s, s = self.hop", "        if True:\n            x, z_s, s = self.hop", "the critic keeps the student's graph"),
        ("batch.uncond, self.cfg_scale)\n            gap", "batch.uncond, None)\n            gap", "the teacher is not guided"),
        ("\"ancestral\")", "\"renoise\")", "sampled by another rule"),
        cases="moment",
        own="moment or impossible",
    ),
    *shared(
        "core/losses",
        "hinge or r1",
        ("F.relu(1 - real.float()).mean() + F", "F.relu(1 + real.float()).mean() + F", "the hinge's sign on data"),
        ("F.relu(1 + fake.float())", "F.softplus(1 + fake.float())", "not a hinge"),
        ("return -logits.float().mean()", "return logits.float().mean()", "the generator's sign"),
        ("create_graph=True)", "retain_graph=True)", "R1 trains nothing"),
        ("sum_dims(g.float().pow(2)).mean()", "g.float().pow(2).mean()", "R1 is a sum over dimensions"),
    ),
    *shared(
        "core/heads",
        "apart or pixel or blocks",
        ("return means if self.apart == \"heads\"", "return means.mean(1, keepdim=True) if self.apart == \"heads\"", "the heads are averaged"),
        ("return torch.cat(logits, dim=1)", "return torch.stack([row.mean(1) for row in logits], dim=1)", "the tokens are averaged"),
        ("nn.GroupNorm(8, width, affine=False)", "nn.Identity()", "features that can grow"),
        ("3, 2 if i else 1, 1)", "3, 1, 1)", "one resolution for all scales"),
        ("min(taps) < 0", "False", "negative blocks"),
    ),
    *shared(
        "core/generate",
        "noised or impossible",
        ("(torch.rand(n, device=device) * counts).long()", "(torch.rand(n, device=device) * counts).round().long()", "times that sampling never uses"),
        ("1 - hop / counts", "1 - hop / max(steps)", "the times of another step count"),
        ("if not steps or min(steps) < 1:", "if not steps:", "a step count of 0"),
    ),
]  # fmt: skip
