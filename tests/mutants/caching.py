# ruff: noqa: E501
"""Mutations of the step caches: branches, requests, warm-up and caps, residuals, forecasts."""

from __future__ import annotations

from mutant import core

FILES = "tests/test_cache_state.py tests/test_cache_blocks.py tests/test_cache.py"
STEPS = f"{FILES} -k not compile"
MUTANTS = [
    *core(
        "speed/caching/engine",
        STEPS,
        ("(self, self.at.branch(look, request)), Branch()", "(self, None), Branch()", "both CFG branches share one past"),
        ("mine.begin((look.x_t.shape, look.x_t.dtype, look.x_t.device))", "pass", "another shape goes on with the old past"),
        ("mine.step >= self.config.warmup and", "mine.step >= self.config.warmup - 1 and", "the warm-up is a step short"),
        ("and not self.at.last(look, mine.step, request)", "", "the last step may be skipped"),
        ("free = mine.skips < self.config.max_skips", "free = mine.skips <= self.config.max_skips", "a run is one skip too long"),
        ("free = mine.total < self.config.total_skips", "free = mine.total <= self.config.total_skips", "one skip beyond the total"),
        ("            call.mine.total += 1\n", "", "the total is never reached"),
        ("mine.error, mine.skips = 0.0, 0", "mine.error = 0.0", "a run never ends"),
        ("mine.error, mine.skips = 0.0, 0", "mine.skips = 0", "the error goes on after a computed call"),
        ("kept = [s for s in mine.past if s.time != call.time]", "kept = [*mine.past]", "heun's second look at a time is a step of its own"),
        ("return out + (x_now - x_t)", "return out - (x_now - x_t)", "the sign of what is held"),
        ("if now != clock[1]:", "if True:", "a step for every branch"),
        ("snapshot.x_t, snapshot.t, snapshot.out = (v.detach().clone() for v in (call.x_t, call.t, out))", "snapshot.x_t, snapshot.t, snapshot.out = call.x_t, call.t, out", "what the caller writes into changes the past"),
        ("            self.calls += 1\n", "            self.calls += not call.skip\n", "a skip is no call"),
    ),
    *core(
        "speed/caching/engine",
        "tests/test_cache_requests.py -k easycache or firstblock",
        ("mine = request.state.setdefault((self, self.at.branch", "mine = vars(self).setdefault(\"kept\", {}).setdefault((self, self.at.branch", "what is remembered outlives its request"),
    ),
    *core(
        "speed/caching/policies",
        STEPS,
        ("math.prod(c.ratios[m.past[-1].step + 1 : call.step + 1])", "math.prod(c.ratios[m.past[-1].step : call.step])", "MagCache's ratios are a step late"),
        ("    m.latest = signal\n", "    m.latest = m.latest if m.latest is not None else signal\n", "TeaCache compares with the last computed step"),
        ("enumerate(reversed(c.coefficients))", "enumerate(c.coefficients)", "the polynomial backwards"),
        ("for s in reversed(call.mine.past)], call.time, c.degree)", "for s in call.mine.past], call.time, c.degree)", "the forecast starts from the oldest"),
        ("total = [w + scale * d for w, d", "total = [w - scale * d for w, d", "the forecast looks back"),
        ("reversed(past[:-1])", "past[:-1]", "the older weights are swapped"),
        ("scale *= (now - times[0]) / i", "scale *= (now - times[0])", "Taylor without its factorials"),
        ("return error if len(call.mine.past) > c.degree else NEVER", "return error", "a forecast from too short a past"),
        ("return [gain, 1 - gain]", "return [1 - gain, gain]", "DiCache's weights are swapped"),
        ("< c.interval else NEVER", "<= c.interval else NEVER", "an interval is a step too long"),
        ("m.rate = d_out / d_in / size", "m.rate = d_in / d_out / size", "EasyCache's rate upside down"),
    ),
    *core(
        "speed/caching/state",
        STEPS,
        ("self.past, self.blocks, self.form = [], {}, form", "self.past, self.form = [], form", "blocks of another shape"),
        ("            self.error, self.rate, self.latest, self.skips = 0.0, math.nan, None, 0\n", "", "the error of another shape"),
        ("stride | 1]", "stride & ~1]", "the same channels of every token"),
    ),
    *core(
        "speed/caching/stack",
        f"{FILES} tests/test_modulated.py -k not compile and not fused and not metered",
        ("middle = self.first <= k < self.until", "middle = self.first < k < self.until", "one block too few is skipped"),
        ("call.residuals[k, j] = end.read(who) - start.read(who)", "call.residuals[k, j] = start.read(who) - end.read(who)", "the residual's sign"),
        ("del twin.__dict__[\"forward\"]", "pass", "a forward that was left behind runs the original"),
        ("known is None or known[0] != form", "known is None", "how streams continue is that of another shape"),
        ("[s.residuals[k, j] for s in call.mine.past]", "[s.residuals[k, j] for s in reversed(call.mine.past)]", "residuals from the oldest"),
    ),
    *core(
        "speed/caching/blocks",
        STEPS,
        ("            del request.state[self.key]\n", "            pass\n", "blocks outside a call think that they are inside"),
        ("self.value._version != self.version", "False", "what was written into is read"),
        ("if k != call.scratch.get(\"next\", 0):", "if False:", "blocks out of order"),
    ),
    *core(
        "speed/caching/deep",
        "tests/test_cache_state.py tests/test_cache_pipelines.py -k deepcache and not (flux or z_image or dit)",
        ("self.config.first < at <= self.until if block", "self.config.first <= at <= self.until if block", "an outer block is skipped"),
        ("            call.mine.blocks = {k: v", "            call.mine.blocks = call.mine.blocks or {k: v", "the inner blocks stay those of the first step"),
    ),
    *core(
        "speed/caching/tokens",
        STEPS,
        ("moved.topk(count, dim=1)", "(-moved).topk(count, dim=1)", "the tokens that moved least"),
        ("out = before.flatten(0, 1).index_copy(0, chosen, part).view_as(before)", "out = before", "nothing is recomputed"),
        ("call.mine.blocks[key] = Held(out)", "pass", "a linear forgets what was recomputed"),
    ),
    *core(
        "speed/caching/calibrate",
        STEPS,
        ("call.mine.blocks[\"calibrate\"] = call.signal, now", "call.mine.blocks.setdefault(\"calibrate\", (call.signal, now))", "changes are measured from the first step"),
        ("np.polyfit(found[:, 1], found[:, 2], 4)", "np.polyfit(found[:, 2], found[:, 1], 4)", "the polynomial of the inverse"),
        ("ratio = float(now.abs().mean()) / max(float(last.abs().mean()), 1e-30)", "ratio = float(last.abs().mean()) / max(float(now.abs().mean()), 1e-30)", "MagCache's ratios upside down"),
        ("[1.0, *(float(v.mean()) for v in each[1:])]", "[*(float(v.mean()) for v in each[1:]), 1.0]", "MagCache's ratios a step early"),
    ),
    *core(
        "speed/cache",
        STEPS,
        ("range(self.warmup, steps - 1)", "range(self.warmup, steps)", "the ceiling counts the last step"),
        ("run = run + 1 if run < longest else 0", "run = run + 1 if run <= longest else 0", "the ceiling's runs are too long"),
        ("if known != steps:", "if known > steps:", "a plan for fewer steps is taken"),
        ("return None if engine.reused else", "return None if engine.calls else", "an inert cache passes"),
    ),
    *core(
        "speed/plan",
        "tests/test_plan.py",
        ("guidance_of(at, request.state[\"call\"])", "guidance_of(at, at.adapter.found.call)", "the probe's guidance is checked, not the request's"),
        ("call.get(name, p.default)", "call.get(name)", "a default scale is none"),
    ),
]  # fmt: skip
