# ruff: noqa: E501
"""Mutations of DPO, of its pairs, of learnt times, of the list of methods and of a row's training defaults."""

from __future__ import annotations

from mutant import Mutation

DPO = "test_methods_after"
TIMES = "test_schedule"
LIST = "test_catalogue"


def of(file: str, tests: str, words: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one file, and the words of the tests that must fail."""
    return [Mutation(f"hasten/{file}.py", *row, (f"tests/{tests}.py", "-k", words)) for row in rows]


MUTANTS = [
    *of(
        "methods/dpo",
        DPO, "dpo and not file and not moves",
        ("margin = -0.5 * self.beta", "margin = 0.5 * self.beta", "prefers the rejected"),
        ("margin = -0.5 * self.beta", "margin = -self.beta", "twice the paper's beta"),
        ("(mine - theirs).chunk(2)", "mine.chunk(2)", "no reference"),
        ("better - worse)", "better)", "the rejected image is not seen"),
        ("better, worse = (mine", "worse, better = (mine", "the pair's order"),
        (".repeat(2, *(1,) * (pairs.ndim - 2)), once.repeat(2)", ".repeat(2, *(1,) * (pairs.ndim - 2)), torch.cat([once, self.draw(student.path, len(pairs), pairs.device)])", "a time of its own for the rejected"),
        ("batch.noise().to(pairs).repeat(2, *(1,) * (pairs.ndim - 2))", "torch.cat([batch.noise(), batch.noise()]).to(pairs)", "a noise of its own for the rejected"),
        (".flatten(1).mean(1)\n        with", ".flatten(1).sum(1)\n        with", "the student's error summed"),
        ("target(x0, eps, t, student.kind)", "target(x0, eps, t, \"eps\")", "the target of another kind"),
        ("        with torch.no_grad():\n            theirs", "        if True:\n            theirs", "a graph through the reference"),
        ("torch.randint(1, self.steps + 1", "torch.randint(0, self.steps", "a student's times begin at data"),
        ("dropped(batch, self.drop)", "dropped(batch, 0.0)", "conditions are never dropped"),
        ("Sampling(even(steps), self.rule)", "Sampling(even(steps))", "the student's rule is forgotten"),
        ("if pairs is None or pairs.shape[1] != 2:", "if pairs is None:", "trajectories taken for preferences"),
    ),
    *of(
        "core/denoiser",
        DPO, "dropped",
        ("torch.rand(batch.shape[0], device=batch.device) < share", "torch.rand(batch.shape[0], device=batch.device) > share", "drops the others"),
    ),
    *of(
        "pairs",
        DPO, "pairs or preferences or ties or other",
        ("expand(of_a > of_b, a), of_a != of_b", "expand(of_a < of_b, a), of_a != of_b", "prefers the lower score"),
        ("worse.append(torch.where(first, b, a)", "worse.append(torch.where(first, a, b)", "both of a pair are the same"),
        ("of_a != of_b\n", "of_a == of_a\n", "ties are kept"),
        ("labels += [made.cond[\"label\"][told].cpu()] if", "labels += [made.cond[\"label\"].cpu()] if", "labels of the pairs that were left out"),
        ("not bool(torch.isfinite(value).all())", "False", "a NaN score decides"),
        ("sample(net, noise, cond, sampling, uncond=uncond, generator=fresh).clamp(-1, 1)", "sample(net, noise, uncond, sampling, uncond=uncond, generator=fresh).clamp(-1, 1)", "samples without their condition"),
        ("Preferences(both.x[:n], both.x[n:]", "Preferences(both.x[n:], both.x[:n]", "a file read the wrong way round"),
        ("torch.stack([self.preferred[index], self.rejected[index]], 1)", "torch.stack([self.rejected[index], self.preferred[index]], 1)", "a batch the wrong way round"),
    ),
    *of(
        "schedule",
        TIMES, "loop or gradient_in or keeps or best_times and ld3 or guided",
        ("1 - torch.softmax(theta, 0).cumsum(0)[:-1]", "1 - torch.softmax(theta, 0).cumsum(0).detach()[:-1]", "no gradient reaches the times"),
        ("1 - torch.softmax(theta, 0).cumsum(0)[:-1]", "torch.softmax(theta, 0).cumsum(0)[:-1]", "times that rise"),
        ("noise * marks[0][1].to(noise.dtype)", "noise * 1.0", "EDM starts from unit noise"),
        ("r = s if two_time else None", "r = t if two_time else None", "the second time is the first"),
        ("return guided(net, x, t, cond, uncond, cfg_scale, net.kind, r=r)", "return guided(net, x, t, cond, uncond, 1.0, net.kind, r=r)", "the few steps are not guided"),
        ("two_time, _scale(cfg_scale))\n    if source", "two_time)\n    if source", "the reference is not guided"),
        ("marks[i], marks[i + 1], past", "marks[i].__class__(c.detach() for c in marks[i]), marks[i + 1], past", "no gradient through where a step starts"),
        ("now < best", "now > best", "keeps the worst"),
        ("judged(torch.zeros_like(found), fresh)", "judged(found, fresh)", "even times are reported as the learnt ones"),
    ),
    *of(
        "schedule",
        TIMES, "noise",
        ("shift - 0.5 * radius", "shift + 0.5 * radius", "noises move up the gradient"),
        (".clamp_max(1)\n\n\ndef klub", "\n\n\ndef klub", "noises are pushed to the sphere"),
        ("if away:\n", "if False:\n", "noises never move"),
        ("if radius is None else radius", "if True else radius", "an explicit radius is ignored"),
    ),
    *of(
        "schedule",
        TIMES, "ays and not hasten and not bad",
        ("total = total + 0.5 * (", "total = total + (", "the bound's half"),
        ("keep, fresh = a / a_v, (s.pow(2) - (a / a_v * s_v).pow(2))", "keep, fresh = a / a_v, (s.pow(2) + (a / a_v * s_v).pow(2))", "too much noise between the two times"),
        ("snr = [(c[0] / c[1]).pow(2)", "snr = [(c[0] / c[1])", "a ratio that is not squared"),
        ("(look(x_v, v) - look(x_t, t)).pow(2).mean()", "(look(x_v, v) - x0).pow(2).mean()", "the data for the earlier prediction"),
        ("return guided(net, x, t, goal.cond, goal.uncond, cfg_scale, \"x0\")", "return guided(net, x, t, goal.cond, goal.uncond, None, \"x0\")", "the bound of the unguided model"),
    ),
    *of(
        "rows",
        "test_recipe", "proportion or suit or take_them or adapters_take",
        ("{k: v * (lr / usual) for k, v", "{k: v for k, v", "the ratio of two networks is lost"),
        ("else self.lora_lr if adapters else usual", "else usual", "adapters take the rate of full weights"),
    ),
    *of(
        "recipe",
        "test_recipe", "proportion",
        ("\"lora\", mine.get(\"lr\"))", "\"lora\")", "another learning rate is one network's"),
    ),
    *of(
        "names",
        "test_recipe", "package",
        ("    return row._replace(**said)", "    return row", "what another package's method says of itself is not read"),
        ("    if wrong := set(said) - set(Row._fields):", "    if wrong := set():", "a typo in what it says"),
        ("    except Exception:  # said", "    except KeyError:  # said", "one broken package breaks all"),
    ),
    *of(
        "names",
        "test_recipe", "proportion or suit or take_them or adapters_take",
        ("return row_of(method).defaults(adapters) if named else {}", "return {}", "Python has other settings than recipes"),
    ),
    *of(
        "run",
        "test_recipe", "take_them",
        ("    fit = fit or FitConfig(**defaults(method))\n    return _last(training.fit(method, source", "    fit = fit or FitConfig()\n    return _last(training.fit(method, source", "distill ignores what suits the method"),
    ),
    *of(
        "pipelines",
        "test_recipe", "take_them",
        ("FitConfig(**defaults(method, lora_rank is not None))", "FitConfig(**defaults(method))", "adapters learn too fast"),
    ),
    *of(
        "recipe",
        LIST, "training or person or rows",
        ("row.defaults(mine.get(\"clone\") == \"lora\", mine.get(\"lr\")) | mine", "mine | row.defaults(mine.get(\"clone\") == \"lora\", mine.get(\"lr\"))", "the row goes before the person"),
        ("raw[\"fit\"] = row.defaults(", "raw[\"fit\"] = {} and row.defaults(", "the row is not read"),
    ),
    *of(
        "distribute",
        TIMES, "added",
        ("meta[\"samplings\"] = {**meta[\"samplings\"], str(", "meta[\"samplings\"] = {str(", "the other samplings are lost"),
        ("str(len(sampling.times) - 1): asdict", "str(len(sampling.times)): asdict", "one step too many"),
    ),
    *of(
        "catalogue",
        LIST, "explained or settings or variation or list",
        ("if f.name in preset:", "if False:", "a variation shown as its class"),
        ("key=lambda p: bool(p[1].preset)", "key=lambda p: not p[1].preset", "variations before their class"),
        ("if not f.init:", "if f.init:", "settings that a recipe cannot set"),
    ),
]  # fmt: skip
