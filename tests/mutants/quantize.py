# ruff: noqa: E501
"""Mutations of quantization."""

from __future__ import annotations

from mutant import core

ROUNDING, WHOLE = "tests/test_rounding.py", "tests/test_quantize.py"
MUTANTS = [
    *core(
        "speed/grids",
        ROUNDING,
        ("(high / TOP4 / outer).clamp(max=TOP8)", "(high / TOP8 / outer).clamp(max=TOP8)", "NVFP4's scales are too small"),
        ("torch.where(part > 0.5, exponent, exponent - 1)", "(exponent - 1)", "MXFP8 saturates"),
        ("torch.where(size < 4, size + 2, size / 2 + 4)", "size + 2", "the code of 6 is none"),
        ("(torch.floor(torch.log2(v.abs().clamp(1.0, TOP4))) - 1)", "(torch.floor(torch.log2(v.abs().clamp(1.0, TOP4))))", "E2M1 without a mantissa"),
    ),
    *core(
        "speed/linears",
        ROUNDING,
        ("rows.abs().amax(1, keepdim=True) if self.form == \"row\"", "rows.abs().amax(1, keepdim=True) if self.form == \"tensor\"", "FP8 mixes its scales up"),
        (".round_().clamp_(-127, 127)", ".round_()", "static scales wrap round"),
        ("y = F.linear(nearest(rows, self.form), self.weights(), self.bias)", "y = F.linear(rows, self.weights(), self.bias)", "activations are not rounded"),
        ("\"rank\": rank}", "\"rank\": 0}", "a file forgets the low-rank branch"),
    ),
    *core(
        "speed/rounding",
        ROUNDING,
        ("high.float() ** alpha / column ** (1 - alpha)", "high.float() ** alpha / column ** alpha", "another SmoothQuant"),
        ("Branched(module, 1 / s)", "Branched(module, s)", "smoothing changes the product"),
        ("        if not found < residuals[-1]:", "        if False:", "the residual rises"),
        ("tried = [torch.ones_like(stats.high[0])]", "tried = []", "none is no candidate"),
        ("return s / (s.amax() * s.amin()).sqrt()", "return s / s.amax()", "AWQ without its normalisation"),
        ("inner(whole - up @ down, bias, s)", "inner(whole, bias, s)", "the branch is added to the whole weight"),
    ),
    *core(
        "speed/calibrate",
        WHOLE,
        ("torch.maximum(self.high[t], high) if t in self.high else high", "high", "only the last call's maximum"),
        ("self.tokens or len(rows) > samples", "True", "modulation passes for tokens"),
        ("if now.get(key) != then.get(key):", "if False:", "a calibration of another network"),
    ),
    *core(
        "speed/budget",
        f"{WHOLE} -k budget",
        ("    return good, measure(good)", "    measure(0)\n    return good, limit", "what was measured is not what runs"),
        ("            good = middle\n", "            good = count\n", "more are kept than the budget asks"),
    ),
    *core(
        "speed/swap",
        WHOLE,
        ("        swap.put(linear)\n", "        pass\n", "nothing is undone"),
        ("    if low != high:", "    if False:", "samples of several ranges run the weights of one"),
    ),
    *core(
        "speed/swap",
        "tests/test_torchao.py",
        ("for v in inner(outer))", "for v in [outer])", "torchao's weights are weighed as what they stand for"),
        ("chain(small.buffers(), small.parameters())", "small.buffers()", "no place to put the originals back to"),
    ),
    *core(
        "speed/products",
        "tests/test_torchao.py",
        ("get_device_capability(device) < least", "get_device_capability(device) <= least", "the least capability is refused"),
        ('fast = how.backend == "auto" and not how.emulate', 'fast = how.backend == "auto"', "an emulation is torchao's"),
        ("and not weight.any():", "and False:", "a scale of zero"),
        ("128 if how.scaling == \"block\" else 16", "16", "sides that no block covers"),
        ('if device.type == "cpu" and how.dtype in ON_CPU:', 'if device.type == "cpu":', "a CPU is asked for a product it has not"),
    ),
    *core("speed/foreign", "tests/test_torchao.py -k part_by_part", ("    for name in tensor.__tensor_flatten__()[0]:\n        setattr(", "    for name in ():\n        setattr(", "parts stay where they were")),
    *core("speed/memory", "tests/test_torchao.py -k before_anything", ("if self.disk is not None and (torchaos or any", "if self.disk is not None and (any", "torchao's weights go to disk")),
    *core("speed/host", "tests/test_torchao.py -k beside_both", ("nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=\"meta\"), False)", "nn.Parameter(torch.empty_like(p, device=\"meta\"), False)", "a package's own type has no empty twin")),
    *core(
        "speed/ao",
        "tests/test_torchao.py",
        ("Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)", "Int8DynamicActivationInt8WeightConfig()", "the compiler's settings are changed for all"),
        ("dtype = dtype if self.wide else torch.bfloat16", "dtype = dtype", "float formats in float32"),
        ('if not hasattr(self.weight, "__tensor_flatten__"):', "if False:", "a linear stays as it is, and counts as rounded"),
        ("if not ours or beside:", "if not ours:", "a folder loses smoothing and branches"),
        ("        for key, value in before.items():\n", "        for key, value in {}.items():\n", "the model stays marked as quantized"),
        ("return y.to(x.dtype).view(", "return y.view(", "an answer in another dtype"),
        ("else torch.bfloat16).contiguous()", "else torch.bfloat16)", "slices of a sequence fail"),
        ("            y = torch.where(rows.any(), y, 0.0)\n", "            pass\n", "zeros are no number"),
        ("if not free(how) and net.dtype != torch.bfloat16:", "if False:", "a folder that nobody can run"),
        ("if len({id(m) for m in ours.values()}) < len(ours):", "if False:", "a linear at two places"),
        ("net.save_pretrained(partial)", "net.save_pretrained(folder)", "a folder half written"),
        ("class TorchaoLinear(nn.Module):", "class TorchaoLinear(nn.Linear):", "layerwise casting takes the biases"),
    ),
    *core(
        "speed/quantize",
        WHOLE,
        ("            and not _modulates(path)\n", "", "modulation is quantized"),
        ("swap.linear = None  # gone before the next one is made", "pass", "the originals stay until all are made"),
        ("key=lambda swap: -harm(", "key=lambda swap: harm(", "the best linears are kept"),
        ("swap.put(swap.linear if i < kept else swap.module)", "swap.put(swap.module)", "nothing is kept"),
        ("            and id(linear) not in skipped\n", "", "nothing is skipped by name"),
        ("32 if self.max_error is not None else 0) if self._needs else None", "32) if False else None", "a pipeline is not calibrated"),
        ("own_calibration(at, self.ranges,", "own_calibration(at, 1,", "one range is calibrated"),
        ("first, last = self.skip_first, len(at.names) - self.skip_last", "first, last = 0, len(at.names) - self.skip_last", "the first blocks are not left"),
    ),
    *core(
        "speed/saved",
        "tests/test_quantized_files.py",
        ("        for path in values[\"paths\"]:\n            parent", "        for path in values[\"paths\"][:1]:\n            parent", "a linear at two places is loaded at one"),
        ("if not isinstance(old, nn.Linear) or (", "if False and (", "a file of another network"),
    ),
]  # fmt: skip
