# ruff: noqa: E501
"""Mutations of what learns the times of pipelines, in a call and by the command."""

from __future__ import annotations

from mutant import core

TIMES = "tests/test_times_learnt.py"
MUTANTS = [
    *core(
        "schedule",
        f"{TIMES} -k longer_prompts or layer_takes and dit",
        ("net = copy.copy(at.adapter)", "net = at.adapter", "encoding changes what the layers read"),
        ("    net.templates = dict(net.templates)\n", "", "a learnt template stays"),
        ("\"dpmpp_2m\" if pipe.scheduler.config.get(\"solver_order\", 1) > 1 else \"ode\"", "\"ode\"", "a solver of order 2 learns the times of order 1"),
        ("scale = net.found.cfg_scale if cfg_scale is None else cfg_scale", "scale = cfg_scale", "a guided pipeline learns unguided times"),
    ),
    *core(
        "schedule",
        f"{TIMES} -k encoders or refused_before or at_a_time or parts or from_a_source",
        ("            restore(pipe, freed)\n", "            pass\n", "an interrupt leaves the encoders out"),
        ("texts = subjects(prompts, net)[: 3 * count]", "texts = subjects(prompts, net)", "all prompts of a long file are encoded"),
        ("Times(tuple(u**1.5 for u in even(steps)))", "Times(even(steps))", "a scheduler of even steps passes"),
        ("    guidable(net, scale)\n", "", "a guidance that the call has not"),
        ("    several(call or {})\n", "", "several pictures of a prompt"),
        ("    if prompts is None:\n        raise", "    if False:\n        raise", "no prompts"),
        ("        if isinstance(net, PipelineDenoiser):\n", "        if False:\n", "a denoiser without conditions"),
        ("    if prompts is not None or call:\n", "    if prompts is not None:\n", "a call of a denoiser is ignored"),
        ("* len(part.noise) for part", "* 1 for part", "parts are added up unweighted"),
        ("for part in goal.parts(batch)) / count", "for part in goal.parts(batch)[:1]) / count", "only the first part is judged"),
        ("return [self.rows(index) for index in torch.arange(len(self.noise)).split(size)]", "return [self.rows(index) for index in torch.arange(len(self.noise)).split(len(self.noise))]", "all at once"),
    ),
    *core(
        "timetable",
        f"{TIMES} -k hasten_times",
        ("Times(found.sampling.times)", "Times((1.0, 0.5, 0.25, 0.0))", "other times are written"),
        ("    file = out or File(\"times.yaml\")\n", "    file = File(\"times.yaml\")\n", "a fixed file"),
        ("    if cfg_scale is not None:\n", "    if False:\n", "a guidance that does nothing"),
        ("    if prompts is None:\n        raise", "    if False:\n        raise", "no prompts"),
        ("    if len(counts) != 1:\n", "    if False:\n", "the first of two counts"),
        ("    at_least_one(count=count, batch=batch)\n", "", "no noises at a time"),
    ),
    *core(
        "timetable",
        "tests/test_schedule.py -k hasten_times",
        ("\"cfg_scale\": sampling.cfg_scale,", "\"cfg_scale\": None,", "the model's own guidance is lost"),
        ("\"two_time\": sampling.two_time, **options}", "**options, \"rule\": sampling.rule}", "a rule that is asked for"),
        ("        if file is None:\n", "        if file is not None:\n", "the file and the model are exchanged"),
        ("    if found.learnt >= found.even:\n", "    if True:\n", "nothing is ever written"),
    ),
]  # fmt: skip
