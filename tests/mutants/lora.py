# ruff: noqa: E501
"""Mutations of adapters on shared weights."""

from __future__ import annotations

from mutant import core

TESTS = "tests/test_lora.py"
WORDS = "-q --tb=line tests/test_lora.py -k"
FROZEN = "tests/test_frozen.py"
MUTANTS = [
    *core(
        "frozen",
        FROZEN,
        ("Product.apply(grads[0], *ctx.saved_tensors, ctx.columns, not ctx.back)", "Product.apply(grads[0], *ctx.saved_tensors, ctx.columns, ctx.back)", "the gradient goes through W and not through its transpose"),
        ("min(GROUP, columns + columns % 2)", "columns + columns % 2", "int4 has one scale a row"),
        ("y + bias.to(y.dtype)", "y + bias", "the bias undoes autocast"),
        ("    if any(number(v) != self.hashes[k] for k, v in weights.items()):", "    if False:", "other weights come back"),
        ("for path in paths:\n            put(net, path, small)", "for path in paths[:1]:\n            put(net, path, small)", "a linear at two places keeps its full weight at one"),
        ("any(path.startswith(f\"{block}.\") for block in blocks)", "True", "embedders are rounded too"),
    ),
    *core(
        "core/packing",
        FROZEN,
        ("torch.stack((packed & 15, packed >> 4), -1)", "torch.stack((packed >> 4, packed & 15), -1)", "halves of a byte are exchanged"),
        ("scale.float()[..., None]).round().clamp", "scale.float()[..., None]).floor().clamp", "rounded down"),
    ),
    *core(
        "lora",
        FROZEN,
        ("raise UnsupportedModel(\n            \"Adapters are not merged", "return super().merged()\n        raise UnsupportedModel(\n            \"Adapters are not merged", "adapters are merged into rounded weights"),
    ),
    *core(
        "lora",
        TESTS,
        ("self.rank if self.alpha is None else self.alpha) / self.rank", "1 if self.alpha is None else self.alpha) / self.rank", "alpha is not the rank by default"),
        ("return self.frozen(input) + self.lora.scale * F", "return self.frozen(input) + F", "the adapter is not scaled"),
        ("down = F.linear(input, self.lora_A.to(input.dtype))", "down = F.linear(input, self.lora_A.detach().to(input.dtype))", "A has no gradient"),
        ("down = F.linear(input, self.lora_A.to(input.dtype))", "down = F.linear(input.detach(), self.lora_A.to(input.dtype))", "no gradient through the adapter to the input: the student's GAN and SiD lose a part"),
        ("\"dtype\": torch.promote_types(base.weight.dtype, torch.float32)", "\"dtype\": base.weight.dtype", "adapters in bfloat16 stand still"),
        ("nn.Parameter(torch.zeros(self.out_features, lora.rank, **like))", "nn.Parameter(torch.ones(self.out_features, lora.rank, **like))", "a view does not start equal"),
        ("nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))", "nn.init.zeros_(self.lora_A)", "nothing is ever learnt"),
        ("self.weight.to(self.lora_A.dtype) + self.lora.scale", "self.weight.to(self.lora_A.dtype) + 1", "merged without the scale"),
        ("vars(module)[name] = nn.Parameter(tensor.detach(), requires_grad=False)", "vars(module)[name] = nn.Parameter(tensor.detach())", "the backbone is not frozen"),
        ("vars(module)[name] = nn.Parameter(tensor.detach(), requires_grad=False)", "vars(module)[name] = nn.Parameter(tensor.detach().clone(), requires_grad=False)", "every view copies the weights"),
        ("for t in (*weights.values(), *net.buffers())}", "for t in net.buffers()}", "a view of a view copies the weights"),
        ("(merge(net) if old else net).with_second_time()", "net.with_second_time()", "a view takes no second time"),
        ("        twin.load_state_dict(net.state_dict(), strict=False)", "        pass", "a second time forgets the adapters of the stage before"),
        ("made.setdefault(id(child), kind(child, lora or adapters(net)).train(child.training))\n                parent._modules[name] = made[id(child)]", "parent._modules[name] = kind(child, lora or adapters(net)).train(child.training)", "a linear at two places becomes two"),
        ("if kind and vars(child).keys() & {\"weight\", \"packed\"}:", "if kind:", "the r embedding becomes an adapter on random weights"),
        ("nn.Parameter(value.clone()))", "value)", "a merged network shares weights"),
        ("return twin.requires_grad_(True)", "return twin", "a merged network is half frozen"),
    ),
    *core(
        "distribute",
        f"{WORDS} view_of or distilled or adapters",
        ("    if lora or is_view(net):", "    if lora:", "a copy of a view copies the backbone"),
        ("    net = merge(net)\n", "", "a view is saved as it is"),
        ("    if not moved and meta[\"weights\"] != _weights_of(twin):", "    if False:", "adapters on other weights"),
        ("clone(net, meta[\"second_time\"], LoRA", "clone(net, False, LoRA", "a second time is not restored"),
        ("\"lora_alpha\": lora.scale * lora.rank", "\"lora_alpha\": lora.rank", "peft is told another alpha"),
        ("    return twin.requires_grad_(False).eval()\n\n\ndef _weights", "    return twin\n\n\ndef _weights", "loaded adapters are in training"),
    ),
    *core(
        "role",
        f"{WORDS} settings",
        ("if is_view(teacher):", "if False:", "a view as the teacher"),
        ("partial(clone, lora=LoRA(self.lora_rank, self.lora_alpha))", "partial(clone, lora=LoRA(self.lora_rank))", "alpha is ignored"),
        ("if self.clone == \"full\" and (self.lora_rank != 64", "if self.clone == \"full\" and (self.lora_rank < 1", "a rank without adapters does nothing"),
    ),
    *core(
        "run",
        f"{WORDS} distilled or recipe",
        ("return merge(last[0].student).eval()", "return last[0].student.eval()", "distill returns a view"),
        ("            if is_view(step.student):", "            if False:", "the adapter alone is not saved"),
    ),
]  # fmt: skip
