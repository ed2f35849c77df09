# ruff: noqa: E501
"""Mutations of settings that would do nothing, and of what is refused when a stack is built."""

from __future__ import annotations

from mutant import core

ACCELERATE = "tests/test_accelerate.py -k would_do_nothing or other_kind"
LEDGER = "tests/test_ledger.py -k cannot_be or leaves_the_rest"
COMMANDS = "tests/test_ledger_commands.py"
PLANNED = "tests/test_plan.py -k asked_for"
MUTANTS = [
    *core("speed/host", ACCELERATE,
          ("        if call:\n", "        if False:\n", "a network takes a call"),
          ("if call is not None and not isinstance(call, Mapping):", "if False:", "a call may be text")),
    *core("workload", ACCELERATE,
          ("if native and getattr(self, name):", "if False:", "a network takes prompts"),
          ("if not native and self.sampling is not None:", "if False:", "a pipeline takes a Sampling")),
    *core("tuner", ACCELERATE, ("if steps not in (None, many):", "if False:", "steps beside a Sampling are dropped")),
    *core("workload", LEDGER, ("return {\"num_inference_steps\": self.steps, **self.call, **first}", "return {**self.call, **first}", "a stack is built without the steps")),
    *core("ledger", LEDGER,
          ("            reaches(steps)\n", "            pass\n", "a network's steps are found at the first call"),
          ("        up.plan.suits(work.steps, work.guidance)\n", "        pass\n", "a plan of other steps samples first"),
          ("        if line.refused:\n            continue\n", "", "what was refused is measured")),
    *core("accelerate", LEDGER, ("    up = built(layers, work)  # what cannot work is said before the model's own samples are made\n", "", "the model's own samples before the refusal")),
    *core("speed/host", "tests/test_speed_pipelines.py -k probed_once", ("if k != \"num_inference_steps\"}  # the probe", "}  # the probe", "other steps are probed again")),
    *core("speed/memory", "tests/test_memory_layers.py -k takes_all_of",
          ("if rounded and self._casts(at) <=", "if False and self._casts(at) <=", "layers that another one takes all of"),
          ("and not (t.calibration or t._needs)]", "]", "linears that never run are taken")),
    *core("models/refuse", "tests/test_probe.py tests/test_bad_pipelines.py -k several", ("isinstance(v, int) and v > 1", "False", "two images of a prompt"),
          ("    if asked := [", "    if False and [", "two images of a prompt are one")),
    *core("workload", COMMANDS,
          ("        ours(self.call)\n", "", "a generator is found out by the pipeline"),
          ("    ours(call)\n    key", "    key", "a picture that is no tensor"),
          ("!= self.steps:\n", "!= self.steps and False:\n", "two numbers of steps")),
    *core("accelerate", COMMANDS,
          ("            about = classes(about)\n", "            pass\n", "class labels as text"),
          ("    if out.is_dir():\n", "    if False:\n", "a folder in the plan's place is found at the end"),
          (", suppress(NotReversible), up:", ", up:", "what was measured is lost with the originals"),
          ("    if idle := up.idle():\n", "    if False and (idle := up.idle()):\n", "a dropped original hides an idle layer"),
          ("        if not math.isfinite(cfg_scale):\n", "        if False:\n", "guidance by no number"),
          ("    if (whole := book.about[\"rounds\"]) < rounds:\n", "    if (whole := book.about[\"rounds\"]) < 0:\n", "an interrupt goes unsaid")),
    *core("ledger", COMMANDS,
          ("        if not done:\n            raise\n", "        raise\n", "an interrupt loses whole rounds"),
          ("        except torch.OutOfMemoryError:  #", "        except ZeroDivisionError:  #", "one combination without room ends the ledger")),
    *core("whole", COMMANDS, ("folder.parent / f\".{folder.name}.old\"  #", "folder.with_name(f\".{folder.name}.old\")  #", "the folder one stands in is no model")),
    *core("speed/plan", "tests/test_accelerate.py -k one_sentence",
          ("if value is not None and (type(value) is not kind or value == 0):", "if False:", "a changed plan"),
          ("(yaml.YAMLError, ValueError, RecursionError)", "(yaml.YAMLError, UnicodeDecodeError)", "a number of 5,000 digits")),
    *core("accelerate", "tests/test_accelerate.py -k one_sentence", ("(prompts is not None or call) and", "(prompts or call) and", "prompts without a name are dropped")),
    *core("speed/host", PLANNED, ("len(torch.unique_consecutive(torch.as_tensor(scheduler.timesteps)))", "len(scheduler.timesteps)", "Heun's second looks are steps")),
    *core("speed/plan", PLANNED, ("self.suits(at.asked(request), mine)", "self.suits(at.steps(request), mine)", "a plan of 8 steps is refused for 8")),
    *core("speed/transform", PLANNED, ("return visited(fresh(at, asked))", "return asked", "DPM2's visits are its steps")),
    *core("speed/plan", "tests/test_plan.py -k were_changed", ('if raw.pop("signature", None) != signature(raw):', 'if raw.pop("signature", None) is None:', "a changed plan runs as the one that was verified")),
    *core("measure/perceptual", "tests/test_measure.py -k lpips", ('reduction="sum") for p', 'reduction="mean") for p', "a short last part counts as a whole one")),
    *core("accelerate", "tests/test_accelerate.py -k hub_id", ("not File(model).parent.exists() and", "", "a mistyped folder is asked of the hub"),
          ("or of_hub(model):", "or False:", "a hub id is no folder")),
    *core("accelerate", "tests/test_plan.py -k front", ("if k in plan.measured[\"budget\"]", "", "losses that nobody asked for")),
]  # fmt: skip
