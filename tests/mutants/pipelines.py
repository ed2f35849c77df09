# ruff: noqa: E501
"""Mutations of the adapter to diffusers pipelines."""

from __future__ import annotations

from mutant import core

ADAPTER = "tests/test_diffusers.py -k"
WAYS = f"{ADAPTER} (sd3 or flux or qwenimage or z_image) and not training_lower and not taps"
OWN = "tests/test_probe.py"  # what no replay shows
FRAMES = "tests/test_frames.py"
REPEATED = "tests/test_synthesize.py -k trains_on_it"
HALF = f"{ADAPTER} half_precision or time_map"
TABLES = f"{ADAPTER} (dit or sd15) and (replayed or path_and_kind)"
MUTANTS = [
    *core(
        "clips",
        "tests/test_clips.py",
        ("return (there - count) // 2", "return 0", "a clip is the beginning of a video"),
        ("islice(opened.decode(pictures), first, first + count)", "islice(opened.decode(pictures), 0, None, 2)", "a clip is faster than its video"),
        ("    if there < count:\n", "    if False:\n", "a short clip is taken"),
    ),
    *core(
        "models/template",
        HALF,
        ("(t.to(self.dtype) if self.early else t)", "t", "a time that the pipeline rounds before it maps it"),
    ),
    *core(
        "models/template",
        WAYS,
        ("(self.slope * wide + self.offset)", "(self.slope * wide)", "the time map has no offset"),
        ("return Each(one) if torch.equal(two, other) else Rows(name)", "return Each(one)", "every prompt gets the probe's condition"),
        ("[row[:k] for row, k in zip(cond[name], cond[name + SIZE].tolist(), strict=True)]", "list(cond[name])", "padding of listed conditions is taken for text"),
        ("    if one is None and isinstance(other, Tensor):\n        return Rows(name)\n", "", "a mask that the probe's prompt needs not is left out for all"),
    ),
    *core(
        "models/template",
        FRAMES,
        ("wide.repeat_interleave(self.slope.shape[1] // wide.shape[1], 1)", "wide.repeat(1, self.slope.shape[1] // wide.shape[1])", "frames share their tokens' times in turn"),
        ("    if any(node.slope.ndim != 2 for node in times):", "    if False:", "times of frames broadcast in a network with one time"),
        ("        if tokens * patch**2 != frames * area:", "        if False:", "tokens of two frames take the time of one"),
    ),
    *core(
        "models/diffusers",
        WAYS,
        ("pred = found.sign * as_sample(output, x_t)", "pred = as_sample(output, x_t)", "the sign of the prediction"),
        ("net.found = replace(net.found, cfg_scale=scale, error=error)", "net.found = replace(net.found, error=error)", "the pipeline's own guidance scale is lost"),
    ),
    *core(
        "models/diffusers",
        OWN,
        ("return {**call, **many, subject: list(values)}", "return {**call, subject: list(values)}", "several prompts beside one negative prompt"),
        ("        self.net.eval()\n        return self\n", "        self.net.train(mode)\n        return self\n", "label dropout of the pipeline's own network acts in training"),
    ),
    *core(
        "models/verify",
        WAYS,
        ("    if not error <= limit:", "    if False:", "a replay that differs is not refused"),
    ),
    *core(
        "models/verify",
        TABLES,
        ("count, -1.0  # entry i sits", "count, 0.0  # entry i sits", "a DDPM table is one entry off"),
    ),
    *core(
        "models/verify",
        OWN,
        ("math.exp(mu)", "mu", "the size-dependent shift is taken for its logarithm"),
    ),
    *core(
        "models/probe",
        f"{ADAPTER} z_image or stopped",
        ("fresh = walk(call, lambda v: v)", "fresh = dict(call)", "a pipeline that writes into its list of prompts changes the call"),
        ("        del scheduler.step, scheduler.set_timesteps\n", "", "the probe stays in the pipeline's scheduler"),
    ),
    *core(
        "models/encode",
        f"{ADAPTER} (qwenimage or z_image or sd3) and (encoded or encoding)",
        ("[prompt] if longest is None else [prompt, longest, longest[: len(longest) // 2]]", "[prompt]", "conditions of several lengths cannot be stacked"),
        ("        if rows_in(file) != len(some):\n            rows = []", "        if True:\n            rows = []", "an interrupted encoding starts again"),
        ("json.dumps([about, list(prompts)])", "json.dumps([about])", "other prompts read these conditions"),
    ),
    *core("models/encode", REPEATED, ("[place[prompt] for prompt in prompts], list(place)", "list(range(len(prompts))), list(prompts)", "a prompt that is there twice is stored twice")),
    *core("models/refuse", "tests/test_bad_pipelines.py -k defect_stays", ("        if mine in file.parents:\n            return False", "        if False:\n            return False", "a defect in a hook of ours is laid on the call")),
    *core("models/encode", "tests/test_synthesize.py -k made_again", ("    except (SafetensorError, OSError):\n        return 0", "    except (SafetensorError, OSError):\n        return 3", "a truncated shard counts as whole")),
    *core("synthesize", "tests/test_synthesize.py -k made_again", ("    if name == DONE and not complete(folder, about):", "    if False:", "a finished synthesis never looks at its shards")),
    *core("captioned", "tests/test_hosted.py -k other_pictures", ("hashlib.file_digest(file, \"sha256\").digest()", "b\"\"", "other pictures have the latents of the first")),
    *core("hosted", "tests/test_hosted.py -k whole", ("            del self.freed[0]\n        if self.work:", "            del self.freed[0]\n            break\n        if self.work:", "only the first encoder comes back")),
    *core("pipelines", "tests/test_hosted.py -k whole", ("    finally:\n        there.restore()\n", "    finally:\n        pass\n", "encoders stay away when training is over")),
    *core("hosted", "tests/test_hosted.py -k another_run", ("            words = [(theirs[0], mine[0])] if theirs[1:] != mine[1:] else []", "            words = []", "a folder takes any run"), ("pairs: list[Any] = [(a, b) for a, b in zip_longest(theirs, mine, fillvalue={}) if a != b]", "pairs: list[Any] = []", "a folder takes any call")),
    *core("hosted", "tests/test_clips.py -k before_anything", ("if pictures is not None and frames else ():", "if False else ():", "clips are counted when they are encoded")),
    *core("synthesize", "tests/test_synthesize.py -k takes_no_samples", ("        if other := next((n for n in OTHERS if (folder / n).exists()), None):", "        if other := \"\":", "samples go into a model's folder")),
    *core("pipelines", "tests/test_hosted.py -k finished", ("not found or int(found[-1].name) != total", "not found", "an unfinished run counts as finished")),
    *core("prompts", "tests/test_prompts.py -k colon", ("    if not colon or column is not None or there(os.path.expanduser(spec)):", "    if not colon or column is not None:", "a file with a colon in its name is taken apart")),
    *core("compared", "tests/test_end_to_end.py -k like", ("seen[\"teacher\"].append(request(pipe, call, student.found.latent, seed))", "seen[\"teacher\"].append(request(pipe, call, student.found.latent, seed + 1))", "the teacher's samples are of other noise")),
    *core("compared", "tests/test_end_to_end.py -k guider_is_off", ("scheduler=trial.scheduler), switched(pipe, inner):", "scheduler=trial.scheduler):", "the student's card is timed with the guider on"), ("        if seen[\"teacher\"][-1][0] > LONG:\n            break\n", "", "a slow teacher is asked three times")),
    *core("pipelines", "tests/test_hosted.py -k finished", ("saved_step(self.out) == step.index and all(", "all(", "a student of an earlier step counts as that of the last"), ("        files += [self.out / \"lora\" / ABOUT] * is_view(step.student)\n", "", "a run without its adapters counts as complete")),
    *core("pipelines", "tests/test_hosted.py -k measurement", ("except (Exception, KeyboardInterrupt) as error:", "except TypeError as error:", "a measurement that fails loses the export")),
    *core("pipelines", "tests/test_hosted.py -k torchrun", ("        if world()[0] > 0:", "        if False:", "every rank exports")),
    *core("hosted", "tests/test_hosted.py -k torchrun", ("if not checkpoints(work) and world()[0] == 0:", "if not checkpoints(work):", "every rank writes run.json"), ("self.work / own(\"encoders\")", "self.work / \"encoders\"", "a rank removes the first one's encoders")),
    *core("cli", "tests/test_hosted.py -k torchrun", ("if (licence or repo) and world()[0] == 0:", "if licence or repo:", "every rank uploads")),
    *core("run", "tests/test_cli.py -k resumes_and_repeats", ("[\"extra\"][\"iterations\"] == step.index", "[\"extra\"][\"iterations\"] > 0", "a model of an earlier step counts as that of the last")),
    *core("whole", "tests/test_hosted.py -k two_ranks", ("f\".partial{rank}-{file.name}\"", "f\".partial-{file.name}\"", "ranks share a partial file")),
    *core("models/refuse", "tests/test_bad_pipelines.py -k without_a_file", ("    if isinstance(error, torch.AcceleratorError) or (", "    if False and (", "what a GPU reports is laid on the call"), ("code.co_filename == own.co_filename", "False", "a pipeline's own refusal is a defect")),
    *core("encoded", REPEATED, ("rows([mine[\"_order\"][i] for i in index])", "rows(index)", "repeated prompts read other rows")),
    *core(
        "encoded",
        f"{ADAPTER} (qwenimage or z_image or sd3) and (encoded or encoding)",
        ("trimmed = [v[0, : int(n)] for", "trimmed = [v[0] for", "padded conditions keep the shard's length"),
    ),
]  # fmt: skip
