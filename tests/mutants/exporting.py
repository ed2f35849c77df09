# ruff: noqa: E501
"""Mutations of what an exported student says of itself, and of what is refused."""

from __future__ import annotations

from mutant import core

EXPORT = "tests/test_export.py -k"
ADVICE = f"{EXPORT} advised or two_times or rules_that or weights_are_not"
CARD = f"{EXPORT} card_of_a_run or cards_say or named_before"
HAND = f"{EXPORT} without_peft"
MUTANTS = [
    *core(
        "models/candidates",
        ADVICE,
        ("RuntimeError, AssertionError, ArithmeticError,", "RuntimeError, AssertionError,", "a pipeline's division by zero comes through"),
        ("            if why is not None:", "            if False:", "nobody says why the pipeline cannot be called so"),
    ),
    *core(
        "models/schedulers",
        ADVICE,
        ("    if sampling.two_time and not net.second_time:", "    if False:", "the missing second time is buried under schedulers"),
        ("if n not in ways and isinstance(search(", "if n not in ways or isinstance(search(", "step counts are advised that do not work"),
        ("(sampling.rule, \"ode\", \"renoise\")", "(sampling.rule,)", "no other rule is advised"),
        ("return odd if timed else", "return odd if not timed else", "other weights are blamed on the steps"),
        ("\"dmd2\", \"sid\", \"cm\"", "\"meanflow\", \"sid\", \"cm\"", "a method of two times is advised where there is one"),
    ),
    *core(
        "card",
        CARD,
        ("method = method.get(\"name\")", "method = next(iter(method), None)", "the card says: distilled with name"),
        ("if base and on_hub(base) else {}", "if base else {}", "a local path is the base model"),
        ("yaml.safe_dump(unplaced(recipe), sort_keys=False)", "yaml.safe_dump(dict(recipe), sort_keys=False)", "places of this machine are in the recipe"),
        ("    base = unplaced(base)\n", "", "the base's place is in the text"),
        ("in values.items() if k in quiet}:", "in values.items()}:", "arguments that silence nothing are said to"),
        ("if k in quiet or k in call} if quiet else values", "} if quiet else values", "arguments that silence nothing are in the code"),
        ("if v not in (0, 1)}", "}", "an argument at 1 is called the network's guidance"),
        ("{**yaml.safe_load(front), \"license\": licence}", "yaml.safe_load(front)", "the licence is not in the metadata"),
    ),
    *core(
        "reload",
        HAND,
        ("weight.copy_((weight.to(added.dtype) + added)", "weight.copy_((weight.to(added.dtype) - added)", "adapters are taken off"),
        ("            if not job.get(\"optional\"):", "            if True:", "a base that is not whole is a failure"),
    ),
    *core(
        "export",
        HAND,
        ("UNRUN.format(\"its base is not whole on this machine\") if seen else w.checked", "w.checked", "the card says that adapters were run"),
        ("        there, peft = base_in(base),", "        there, peft = \"\",", "adapters are never run"),
        ("            compare(w, seen)\n            continue", "            continue", "what was seen is not compared"),
        ("    return str(File(index).parent) if", "    return \"\" if", "bases of the hub are never run"),
    ),
    *core(
        "export",
        f"{EXPORT} upload",
        ("\"ignore_patterns\": [\"recipe.yaml\"]", "\"ignore_patterns\": []", "a recipe with places of this machine is uploaded"),
        ("{\"name\": push_to_hub.split(\"/\")[-1], \"place\": push_to_hub}", "{\"name\": push_to_hub.split(\"/\")[-1]}", "the card loads the folder, not its repository"),
        ("folder.absolute().parent.name if folder.name in UNNAMED", "folder.name if folder.name in UNNAMED", "every student is called model"),
    ),
    *core(
        "cli",
        "tests/test_cli_pipelines.py -k licence or sample_calls",
        ("if key in made and value != made[key]:", "if False:", "a student is guided twice without a word"),
        ("if key in made and value != made[key]:", "if key in made:", "a note about the student's own guidance"),
        ("        if address := publish(out, licence, repo):", "        if address := publish(out, None, repo):", "a licence is not named"),
    ),
]  # fmt: skip
