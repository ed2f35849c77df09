# ruff: noqa: E501
"""Mutations of the ledger's words and page, of a plan on its way from prompts to use, and of undoing on more families."""

from __future__ import annotations

from mutant import Mutation, core

LEDGER = "tests/test_ledger.py -k both_interactions or shows_none or by_hand"
IN_USE = "tests/test_tuner_pipelines.py"
PAGE = [
    Mutation("hasten/ledger.html.j2", *row, ("tests/test_ledger.py", "-k", "both_interactions"))
    for row in (
        (
            "with another seed: {{ judged(book.seed_floor) }}",
            "with another seed: {{ judged(book.quality_floor) }}",
            "another seed's numbers are real images'",
        ),
        (', KD {{ "%.4f"|format(q.kd) }}, recall', ", recall", "KD's floor is not printed"),
        ("|format(extra) if extra is not none", "|format(extra) if false", "the page has no interaction of losses"),
        (
            "(14 if book.quality_floor else 11)",
            "(13 if book.quality_floor else 11)",
            "a verdict is narrower than its table",
        ),
    )
]
MUTANTS = [
    *PAGE,
    *core(
        "ledger",
        LEDGER,
        ("if low > 0 else self.beside_fd(line)}\"", "if low > 0 else 'nothing measurable in distribution'}\"", "the verdict reads FD alone"),
        ("if sign * (mine - own) > noise:", "if sign * (mine - own) > 0:", "noise is a loss of KD or recall"),
        ("noise = abs(self.seed_floor[key] - own)", "noise = self.seed_floor[key] - own", "another seed that is worse is no noise"),
        ("(\"recall\", \"recall\", -1)", "(\"recall\", \"recall\", 1)", "less recall is better"),
        ("return error_of(line) - sum(", "return error_of(line) + sum(", "losses of the layers are added to the stack's"),
    ),
    *core("ledger_page", LEDGER, ("\"\" if extra is None else f\"{extra:+.1e}\"", "\"\"", "the terminal has no interaction of losses")),
    *core(
        "tuner",
        IN_USE,
        ("fingerprint(work.host, work.steps,", "fingerprint(work.host, None,", "a tuned plan fits other steps"),
        ("self.held_out = Set(work, replace(work, subjects=two), calls, 1, calls)", "self.held_out = self.seen", "nothing is held out"),
    ),
    *core("speed/plan", IN_USE, ("\"stack\": [as_dict(t) for t in self.transforms]}", "\"stack\": [as_dict(t) for t in self.transforms[:1]]}", "a file has the first layer alone")),
    *core("speed/tiles", "tests/test_speed_pipelines.py -k every_other and sana", ("            for back in reversed(undos):\n                back()\n", "", "a VAE that goes on counting")),
    *core("speed/memory", "tests/test_speed_pipelines.py -k every_other and flux2", ("vars(m).pop(key, None)", "pass", "hooks of offloading stay")),
]  # fmt: skip
