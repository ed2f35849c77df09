# ruff: noqa: E501
"""Mutations of what is refused before anything runs, of undo beside other layers, and of what requests share."""

from __future__ import annotations

from mutant import core

FIELDS = "tests/test_transform_fields.py"
EARLY = "tests/test_cache_pipelines.py -k beforehand or before_the_first or does_not_say"
MUTANTS = [
    *core(
        "speed/transform",
        FIELDS,
        ("abs(value) <= sys.float_info.max", "True", "infinity is a number"),
        ("return isinstance(value, int) and not isinstance(value, bool) and value >= least", "return isinstance(value, int) and value >= least", "True is a whole number"),
        ("    if not isinstance(value, bool):\n", "    if False:\n", "any value is a switch"),
        ("    if not isinstance(value, str):\n", "    if False:\n", "a number among words"),
    ),
    *core(
        "speed/cache",
        FIELDS,
        ("if not isinstance(value, (str, list, tuple)):", "if False:", "a mask that YAML took for a number"),
        ("type(value) is not type(v) or value != v", "value != v", "True stands for a 1 that does nothing"),
        ("len(v) == 2 and whole_number(v[0], 0)", "len(v) == 2 and number(v[0])", "half a step has a weight"),
    ),
    *core("speed/guidance", FIELDS, ("if key == \"interval\" or value is not None:", "if value is not None:", "no interval at all")),
    *core("speed/memory", FIELDS, ("        switch(\"LayerCast\", \"keep\", self.keep)\n", "", "keep may be text"),
          ("object.__setattr__(self, \"disk\", os.fspath(self.disk))", "pass", "a path that YAML cannot write")),
    *core("speed/__init__", FIELDS, ("if f.name not in values and", "if False and", "a field that is needed and missing")),
    *core(
        "speed/transform",
        EARLY,
        ("            t.reaches(steps)\n", "            pass\n", "too few steps are found at the first call"),
        ("            return len(t.steps)\n", "            pass\n", "times say nothing of the steps"),
        ("made_for = None if plan is None else plan.fingerprint.get(\"steps\")", "made_for = None", "a plan says nothing of its steps"),
    ),
    *core("speed/cache", EARLY, ("if not self.ceiling(steps):", "if False:", "a mask without a skip is taken")),
    *core("speed/transform", "tests/test_accelerate.py", ("        if names.count(name) > 1:", "        if False:", "two layers of one name")),
    *core(
        "accelerate",
        "tests/test_accelerate.py",
        ("    once(layers)\n    work", "    work", "the ledger of two layers of one name"),
        ("if folder is None and (prompts is not None or call) and own(model):", "if False:", "the hub is asked for a model of hasten's own"),
    ),
    *core("commands", "tests/test_accelerate.py", ("        if key in found:\n", "        if False:\n", "the last of two keys wins")),
    *core(
        "speed/memory",
        "tests/test_speed_pipelines.py -k every_other and dit",
        ("            uncount()\n            before.back()\n", "            uncount()\n", "weights in 8 bits stay"),
    ),
    *core(
        "speed/tiles",
        "tests/test_speed_pipelines.py -k every_other and dit",
        ("                setattr(vae, key, value)\n", "                pass\n", "a VAE that goes on slicing"),
    ),
    *core(
        "speed/times",
        "tests/test_speed_pipelines.py -k every_other and wan",
        ("        undo = subclassed(at.pipe.scheduler, \"set_timesteps\", set_timesteps)\n        return Applied(undo,", "        subclassed(at.pipe.scheduler, \"set_timesteps\", set_timesteps)\n        return Applied(lambda: None,", "times that stay"),
    ),
    *core(
        "speed/guidance",
        "tests/test_cache_requests.py -k guidance_and_ranges or pipeline",
        ("state: Progress = mine.state.setdefault(self, Progress())", "state: Progress = vars(self).setdefault(\"kept\", Progress())", "what guidance remembers outlives its request"),
    ),
    *core(
        "speed/transform",
        "tests/test_quantize_memory.py",
        ("            trim()  #", "            pass  #", "the allocator keeps what was dropped"),
    ),
]  # fmt: skip
