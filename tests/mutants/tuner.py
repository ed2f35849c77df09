# ruff: noqa: E501
"""Mutations of the host that speed-ups see, of plans, the tuner and the ledger."""

from __future__ import annotations

from mutant import core

TUNER, LEDGER = "tests/test_tuner.py", "tests/test_ledger.py tests/test_ledger_commands.py"
PROGRAMME = f"{TUNER} -k programme or refined or moved or plan_is or warm"
FAMILIES = "tests/test_speed_pipelines.py -k (dit or z_image or qwenimage) or branches or probed or read"
MUTANTS = [
    *core(
        "costs",
        PROGRAMME,
        ("line = 0.0 if before is None else (t[k] - t[i]) / (t[i] - t[before])", "line = 0.0", "skipped steps are held in the plan"),
        ("if k > i or alone:", "if k > i:", "an unguided computed step costs nothing"),
        ("if i < warmup and letter == \"A\":", "if False:", "the warm-up may be unguided"),
        ("text = letter + letter.lower() * (j - i - 1) + text", "text = letter + letter * (j - i - 1) + text", "held steps are computed"),
        ("        if loss < least:\n", "        if True:\n", "plans that others beat stay"),
        ("if any(m in \"Aa\" for m in self.modes) else []", "if False else []", "unguided steps are guided"),
        ("if now < 0.999 * least:", "if False:", "no step is moved"),
        ("found.square(gaps.sum(0))", "found.square(gaps).sum()", "gaps never undo each other"),
        ("| {k: modes[j]}", "| {k: \"F\"}", "a moved step is guided"),
    ),
    *core(
        "costs",
        f"{TUNER} -k trace or products or watched or moves",
        ("return self.guided(self.cond[k], self.uncond[k]) if self.uncond else self.cond[k]", "return self.cond[k]", "what the sampler was given is the conditional prediction"),
        ("total = found if total is None else total + found", "total = found", "only the last request counts"),
        ("pred, other = (first, second) if cond_first else (second, first)", "pred, other = second, first", "the branches are swapped"),
        ("[abs(straight(path, kind, now, then)[0])", "[abs(straight(path, kind, now, then)[1])", "what a step moves is what it keeps"),
    ),
    *core(
        "measure/quality",
        "tests/test_measure.py -k paired or frames",
        ("mine = [metric(own[rows]) for rows in draws]", "mine = [whole for rows in draws]", "pairs are resampled apart"),
        ("n = torch.Generator().manual_seed(seed), len(own) // each", "n, each = torch.Generator().manual_seed(seed), len(own), 1", "frames are samples"),
        ("2 * whole - (metric(own[of(order[::2])]) + metric(own[of(order[1::2])])) / 2", "whole", "the bias of few samples divides"),
    ),
    *core(
        "fitted",
        "tests/test_fitted.py",
        ("drift = back if k == first + 1 else 0.0", "drift = 0.0", "a drift is not made up for"),
        ("b.x[k] - t.x[k]", "t.x[k] - b.x[k]", "a drift is doubled"),
        ("found = q / p if p else 0.0", "found = 1 / p if p else 0.0", "the pull is flow matching's on every path"),
        ("t.cond[i] if alone else t.whole(i)", "t.cond[i]", "guided steps are fitted to conditional predictions"),
        ("since < i <= first", "i <= first", "weights name steps that the cache forgot"),
        ("wanted = [b.whole(k) + drift", "wanted = [t.whole(k) + drift", "what was forecast is the goal"),
        ("traces[0].t[first + 2] if", "traces[0].t[first + 1] if", "the pull is over no distance"),
    ),
    *core(
        "tuner",
        TUNER,
        ("(work.subjects[::2], work.subjects[1::2])", "(work.subjects[::2], work.subjects[::2])", "held-out prompts were seen"),
        ("self.points[0].seconds / point.seconds >= GAIN", "True", "a slower plan is a plan"),
        ("skip=(*own, *worst[: -(-len(worst) // share)])", "skip=(*own, *worst[-(-len(worst) // share) :])", "the best linears stay"),
        ("if not wanted.holds(found):", "if False:", "a budget below the last bit"),
        ("fingerprint(work.host, work.steps, search.shape, work.guidance)", "fingerprint(work.host, work.steps, None, work.guidance)", "a tuned plan fits every size"),
        ("            if self.budget.holds(made.loss):\n                good.append(made)\n                low = mid + 1", "            if True:\n                good.append(made)\n                low = mid + 1", "bisection takes every plan"),
    ),
    *core(
        "budget",
        f"{TUNER} -k budget or front",
        ("-v if k in LEAST else v for k, v in counted", "v for k, v in counted", "a budget holds on the wrong side"),
        ("loss[\"fd_high\" if k == \"fd\" else k]", "loss[k]", "an estimate is a promise"),
        ("all(mine[k] <= theirs[k]", "any(mine[k] <= theirs[k]", "one loss is enough for the front"),
    ),
    *core(
        "speed/plan",
        TUNER,
        ("if want is not None and want != have:", "if False:", "a plan fits every model"),
        ("if steps is not None and found != steps:", "if False:", "a plan fits every step count"),
        ("            digest.update(head.numpy().tobytes())\n", "            pass\n", "the fingerprint does not see training"),
        ("if shape is not None and list(look.x_t.shape[1:]) != list(shape):", "if False:", "a plan fits every size"),
    ),
    *core(
        "ledger",
        LEDGER,
        ("return self.gain(line) / math.prod(self.gain(x) for x in alone if x is not None)", "return self.gain(line)", "an interaction is a gain"),
        ("'it costs quality' if low > 0", "'it costs quality' if high > 0", "noise costs quality"),
        ("given[latent] = up(given[latent])", "pass", "a nudge nudges nothing"),
    ),
    *core(
        "workload",
        LEDGER,
        ("given = of(dict(self.call), subject, [about[i % len(about)]])", "given = of(dict(self.call), subject, [about[0]])", "every sample has the first prompt"),
    ),
    *core(
        "speed/host",
        FAMILIES,
        ("return self.adapter.found.sign * as_sample(output, x_t)", "return as_sample(output, x_t)", "the sign of a pipeline's prediction"),
        ("self.seen.append([v.detach().clone() for v in cond])  # the caller may write into them\n        return len(self.seen) - 1", "return 0", "the branches are one"),
        ("        known.append((shown, scheduler, adapter))\n", "", "a pipeline is probed every time"),
    ),
]  # fmt: skip
