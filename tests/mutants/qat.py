# ruff: noqa: E501
"""Mutations of quantization-aware training."""

from __future__ import annotations

from mutant import core

TESTS = "tests/test_qat.py"
MUTANTS = [
    *core(
        "qat",
        TESTS,
        ("amax(dim=-1, keepdim=True)", "amax()", "one scale for everything"),
        (".clamp_min(TINY) / 127", ".clamp_min(TINY) / 128", "another grid"),
        ("    return x + ((x.detach() / scale).round() * scale - x.detach()).to(x.dtype)", "    return (x / scale).round() * scale", "the rounding stops the gradient"),
        ("    return x + ((x.detach() / scale)", "    return 2 * x - x.detach() + ((x.detach() / scale)", "the gradient is doubled"),
        ("F.linear(rounded(input), rounded(self.weight), self.bias)", "F.linear(input, rounded(self.weight), self.bias)", "activations are not rounded"),
        ("F.linear(rounded(input), rounded(self.weight), self.bias)", "F.linear(rounded(input), self.weight, self.bias)", "weights are not rounded"),
        ("    quantize.check(at, ())\n", "", "a student without a rounded linear"),
        ("            if isinstance(child, RoundedLinear):", "            if False:", "copies keep rounding"),
    ),
    *core(
        "distribute",
        TESTS,
        ("twin = plain(net.with_second_time() if second_time else copy.deepcopy(net))", "twin = net.with_second_time() if second_time else copy.deepcopy(net)", "the average and the next teacher keep rounding"),
    ),
    *core(
        "role",
        "-q --tb=line tests/test_qat.py -k settings or quantizing or grid",
        ("jvp_mode=\"exact\") if self.qat and", "jvp_mode=\"exact\") if False and", "a difference of rounded numbers"),
        ("if config.qat and averaged:", "if config.qat:", "the fake is rounded too"),
        ("if config.qat and averaged:", "if False:", "nothing is rounded"),
        ("if self.qat and self.clone == \"lora\":", "if False:", "adapters are not rounded, and nobody says so"),
        ("if not self.qat and self.qat_min_side != 512:", "if False:", "a setting that does nothing"),
    ),
]  # fmt: skip
