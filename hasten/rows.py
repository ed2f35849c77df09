"""The table of methods: where each is, what it needs and costs, and what suits it."""

from __future__ import annotations

from typing import Any, NamedTuple

from hasten.core.times import LogNormal


class Row(NamedTuple):
    """One method: where its class is, and what a person wants to know before choosing it."""

    target: str  # "module:Class"
    about: str
    data: str  # yes, no, or when
    teacher: str  # yes, no, or when
    networks: str  # trained beside the student
    forwards: str  # network forwards that a training step costs by arithmetic; a backward counts as two
    paper: str
    steps: str = ""  # its field that a recipe's ``steps`` set, where they shape the training
    one_count: bool = False  # whether that field is a single step count
    preset: tuple[tuple[str, Any], ...] = ()  # fields that make the class this variation; its own defaults without
    group: str = "trajectory"  # trajectory, distribution, hybrid, or what it is for
    memory: int = 2  # networks of the teacher's size in memory, without averages
    fit: tuple[tuple[str, Any], ...] = ()  # keys of FitConfig that suit it, full weights of a small network
    lora_lr: float = 1e-4  # learning rate of adapters on a large one
    trouble: str = ""  # what to change when it oscillates, blurs or collapses

    def defaults(self, adapters: bool = False, lr: Any = None) -> dict[str, Any]:
        """Keys of FitConfig that suit the method; another ``lr`` is every network's in proportion.

        Args:
            adapters: Whether they are trained: ``lora_lr`` is then the learning rate that suits.
            lr: The learning rate instead; anything but a number is left to who reads the recipe.
        """
        found = dict(self.fit)
        usual = found.get("lr", 1e-3)
        lr = lr if isinstance(lr, (int, float)) else self.lora_lr if adapters else usual
        lrs = {k: v * (lr / usual) for k, v in found.get("lrs", {}).items()}
        return found | {"lr": lr} | ({"lrs": lrs} if lrs else {})


# Adding a method touches one new file in methods/ and one row here; a variation of a method is a row with a preset.
METHODS: dict[str, Row] = {
    # --- trajectory
    "flow": Row(
        "hasten.methods.flow:Flow", "Trains or fine-tunes a teacher by flow matching.",
        "yes", "no", "none", "3", "Lipman et al. 2023; Esser et al. 2024",
        memory=1, fit=(("lr", 1e-3), ("schedule", "cosine"), ("warmup", 50), ("ema", (0.999,))), lora_lr=1e-4,
        trouble="When samples are noisy, train longer or average longer (a larger fit.ema); when guidance does "
        "nothing, check that drop is above 0.",
    ),
    "cm": Row(
        "hasten.methods.cm:CM", "Consistency in discrete time: training (ECT) and distillation (CD).",
        "yes", "for CD", "none", "4 (CD: 5)", "Song et al. 2023; Geng et al. 2024",
        fit=(("lr", 3e-4), ("optimizer", "radam"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When it stays blurred, train longer or set fewer doublings: each gap must be learnt before the next; "
        "when it jumps at a doubling, lower fit.lr.",
    ),
    "scm": Row(
        "hasten.methods.scm:SCM", "Continuous-time consistency on TrigFlow.",
        "yes", "optional", "logvar", "6", "Lu & Song 2025",
        fit=(("lr", 3e-4), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When it diverges, lengthen warmup (0.4) or lower fit.lr; when it is grainy at one step, sample with "
        "2, or look at scm in the log: it should fall.",
    ),
    "meanflow": Row(
        "hasten.methods.meanflow:MeanFlow", "Learns the mean velocity between two times.",
        "yes", "optional", "none", "5", "Geng et al. 2025",
        fit=(("lr", 5e-4), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="One step stays poor long after two are good: train longer, or sample with two; when it diverges, "
        "raise same: more of the batch then is plain flow matching.",
    ),
    "flowmap": Row(
        "hasten.methods.flowmap:FlowMap", "Learns the Lagrangian flow map between any two times.",
        "yes", "optional", "none", "6", "Boffi et al. 2025",
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When one step is worse than two by much, raise ends; when the loss is spiky, raise power towards 1, "
        "or lower fit.lr.",
    ),
    "progressive": Row(
        "hasten.methods.progressive:Progressive", "Halves the steps again and again, one student step doing two.",
        "yes", "yes", "none", "5", "Salimans & Ho 2022", "end", True,
        fit=(("lr", 5e-4), ("schedule", "linear"), ("ema", (0.99,))), lora_lr=1e-4,
        trouble="When the last halvings blur, stop earlier (a larger end) or give more iterations: every stage needs "
        "its share; start need not be above 32.",
    ),
    "kd": Row(
        "hasten.methods.kd:KD", "Regresses on trajectories that the teacher makes.",
        "no", "yes", "none", "3 (with pairs)", "Luhman & Luhman 2021", "steps", True,
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When samples blur, take more steps or more pairs: it regresses to a mean; when it is slow, make pairs "
        "once (--set pairs=20000) instead of trajectories on the fly.",
    ),
    "boss": Row(
        "hasten.methods.boss:BOSS", "Finds the teacher's best few times, then straightens it between them.",
        "no", "yes", "none", "3 (with pairs)", "Nguyen et al. 2024", "steps", True,
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When samples blur, take more steps or more pairs: it regresses to a mean; when times crowd on "
        "neighbouring fine steps, raise fine; at one step there is no time to find, and kd does the same.",
    ),
    # --- consistency, more of it
    "ect": Row(
        "hasten.methods.cm:CM", "Easy consistency tuning: turns a trained teacher into a consistency model, from data.",
        "yes", "optional", "none", "4", "Geng et al. 2024", preset=(("schedule", "ect"), ("from_teacher", False)),
        memory=1, fit=(("lr", 3e-4), ("optimizer", "radam"), ("ema", (0.995,))), lora_lr=3e-5,
        trouble="When it stays blurred, train longer: every gap must be learnt before the next; "
        "when it oscillates late, lower doublings or fit.lr.",
    ),
    "cd": Row(
        "hasten.methods.cm:CM", "Consistency distillation: one teacher step between the two ends.",
        "yes", "yes", "none", "5", "Song et al. 2023", preset=(("from_teacher", True),),
        fit=(("lr", 3e-4), ("optimizer", "radam"), ("ema", (0.995,))), lora_lr=3e-5,
        trouble="When it stays blurred, raise doublings: the teacher's one step over a wide gap is coarse; when it "
        "oscillates, lower fit.lr or raise the average's decay.",
    ),
    "ict": Row(
        "hasten.methods.cm:CM", "Improved consistency training: Karras' grid, doubled evenly over the run.",
        "yes", "no", "none", "4", "Song & Dhariwal 2024",
        preset=(("schedule", "ict"), ("from_teacher", False)), memory=1,
        fit=(("lr", 3e-4), ("optimizer", "radam"), ("ema", (0.999,))), lora_lr=3e-5,
        trouble="When it oscillates as the grid gets fine, lower doublings (a short run has no time for 1280 steps) "
        "or fit.lr; when it is blurred, train longer.",
    ),
    "pcm": Row(
        "hasten.methods.pcm:PCM", "Phased consistency: as many consistency functions as sampling steps, without noise.",
        "yes", "yes", "none", "5", "Wang et al. 2024", "phases", True,
        fit=(("lr", 3e-4), ("ema", (0.995,))), lora_lr=5e-6,
        trouble="When it is blurred, raise hops: a coarse teacher step is copied; when colours burn, lower cfg_scale; "
        "when one step matters most, choose lcm or another method.",
    ),
    "lcm": Row(
        "hasten.methods.pcm:PCM", "Latent consistency: the guided teacher's trajectory in one phase, for adapters.",
        "yes", "yes", "none", "5", "Luo et al. 2023", preset=(("phases", 1), ("hops", 50)),
        fit=(("lr", 3e-4), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When it is blurred, lower hops to 25, so that an error crosses fewer of them, or train longer; "
        "when colours burn, lower cfg_scale.",
    ),
    "ctm": Row(
        "hasten.methods.ctm:CTM", "Consistency trajectories: any time to any earlier one, and a denoiser as well.",
        "yes", "yes", "none", "11, and 2 per solver step", "Kim et al. 2024",
        fit=(("lr", 4e-4), ("ema", (0.999,))), lora_lr=3e-5,
        trouble="When it is slow, lower solver and grid together; when few steps are blurred, raise solver; when many "
        "steps are, raise dsm_weight.",
    ),
    "tcm": Row(
        "hasten.methods.tcm:TCM", "Truncated consistency: a consistency model, then one of late times alone.",
        "yes", "optional", "none", "stage 1 4, stage 2 5", "Lee et al. 2025",
        fit=(("lr", 2e-4), ("optimizer", "radam"), ("ema", (0.999,))), lora_lr=3e-5,
        trouble="When the second stage collapses or loses diversity, raise boundary_weight or boundary; when it gains "
        "nothing, the first stage is not done: raise first.",
    ),
    # --- flow maps, more of them
    "imf": Row(
        "hasten.methods.meanflow:MeanFlow", "Improved MeanFlow: a regression of V = u + (t - r) du/dt on the velocity.",
        "yes", "optional", "none", "5", "Geng et al. 2025b", preset=(("own_tangent", True), ("same", 0.5)),
        fit=(("lr", 5e-4), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When it diverges, raise same towards 0.75; when one step is blurred, lower it to 0.25; when guidance "
        "burns colours, lower self_cfg_scale (or cfg_scale with a teacher).",
    ),
    "lsd": Row(
        "hasten.methods.flowmap:FlowMap", "Lagrangian self-distillation: the flow map from data alone.",
        "yes", "no", "none", "6", "Boffi et al. 2025", preset=(("from_teacher", False),), memory=1,
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When many steps are bad too, raise same: the velocity is not learnt yet; when one step is worse than "
        "two by much, raise ends.",
    ),
    "shortcut": Row(
        "hasten.methods.shortcut:Shortcut", "A hop is two of half its length, halved down to steps of the velocity.",
        "yes", "optional", "none", "4", "Frans et al. 2024",
        fit=(("lr", 5e-4), ("weight_decay", 0.1), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When few steps are blurred, lower same to 0.5 or levels to 5: long hops are then met more often; "
        "when many steps are bad too, raise same. Sample with a power of two.",
    ),
    "psd": Row(
        "hasten.methods.shortcut:Shortcut", "Progressive self-distillation: a hop is any two shorter ones.",
        "yes", "optional", "none", "4", "Boffi et al. 2025", preset=(("split", "uniform"),),
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When few steps are blurred, lower same to 0.5 or set split to middle; when many steps are bad too, "
        "raise same.",
    ),
    "alphaflow": Row(
        "hasten.methods.alphaflow:AlphaFlow", "From trajectory flow matching to MeanFlow by a curriculum.",
        "yes", "optional", "none", "4 to 5", "Zhang et al. 2025",
        fit=(("lr", 5e-4), ("betas", (0.9, 0.95)), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When it diverges late in the run, where alpha is 0, raise same or lower fit.lr; when one step stays "
        "blurred, let the curriculum end earlier (end=0.7), so that more of the run is MeanFlow.",
    ),
    "ayf": Row(
        "hasten.methods.ayf:AYF", "Align Your Flow: the Eulerian flow map of a teacher; flowmap is its Lagrangian.",
        "yes", "yes", "none", "6", "Sabour et al. 2025",
        fit=(("lr", 3e-4), ("ema", (0.995,))), lora_lr=1e-5,
        trouble="When it diverges, lengthen warmup (0.4) or lower ceiling; when one step is worse than two by much, "
        "draw longer gaps (a larger mean).",
    ),
    # --- straightening, bootstrapping, from scratch
    "reflow": Row(
        "hasten.methods.reflow:Reflow", "Straightens the teacher's trajectories, so that few Euler steps suffice.",
        "no", "yes", "none", "3 (with pairs), else and one per substep", "Liu et al. 2023",
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When one step is blurred, raise substeps and make many pairs, or train longer; a second round "
        "straightens further but starts from the first one's errors.",
    ),
    "perflow": Row(
        "hasten.methods.reflow:Reflow", "PeRFlow: straight lines in every window of time, from noised data.",
        "optional", "yes", "none", "11", "Yan et al. 2024", "windows", True, preset=(("substeps", 8),),
        fit=(("lr", 5e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When it is blurred, train longer: the velocity must learn to jump where windows meet; when the first "
        "window is bad, use more windows.",
    ),
    "boot": Row(
        "hasten.methods.boot:BOOT", "Bootstraps one step from noise: its own earlier answer and one teacher step.",
        "no", "yes", "none", "9", "Gu et al. 2023",
        fit=(("lr", 3e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=3e-5,
        trouble="When it diverges or drifts from the teacher, raise boundary or lower fit.lr; when it learns slowly, "
        "raise gap, at the price of a coarser teacher. A teacher that predicts eps is badly conditioned at pure noise.",
    ),
    "guidance": Row(
        "hasten.methods.guidance:GuidanceDistillation", "Builds the guidance scale in: one call instead of two.",
        "yes", "yes", "none", "5", "Meng et al. 2023", group="guidance",
        fit=(("lr", 3e-4), ("schedule", "cosine"), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When colours burn, lower cfg_scale, as for the guided teacher; when it lags behind the teacher, train "
        "longer. Distil its steps afterwards, without a cfg_scale.",
    ),
    "imm": Row(
        "hasten.methods.imm:IMM", "Inductive moment matching: groups of particles agree in distribution, from data.",
        "yes", "no", "none", "4", "Zhou et al. 2025", memory=1,
        fit=(("lr", 3e-4), ("betas", (0.9, 0.999)), ("ema", (0.999,))), lora_lr=3e-5,
        trouble="When a short run learns nothing, lower k to 8: r is then farther from t; when samples lose variety, "
        "raise particles; when one step is worse than two by much, train longer.",
    ),
    # --- distribution
    "dmd2": Row(
        "hasten.methods.dmd2:DMD2", "Matches distributions: follows teacher minus fake, with an optional GAN.",
        "for the GAN", "yes", "fake, disc (GAN)", "student 5, critic 4", "Yin et al. 2024", "generate",
        group="distribution", memory=3,
        fit=(("lr", 5e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=5e-5,
        trouble="When it oscillates, raise student_every or fit.lrs.fake: fake must follow the student; when it "
        "collapses, lower gan_weight or set r1_weight; when colours burn, lower cfg_scale.",
    ),
    "sid": Row(
        "hasten.methods.sid:SiD", "Score identity: gradients flow through both denoisers.",
        "no", "yes", "fake", "student 7, critic 4", "Zhou et al. 2024", "generate",
        group="distribution", memory=3,
        fit=(("lr", 3e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When it oscillates, raise student_every or lower alpha to 1; when it is good at some step counts "
        "only, train for one of them.",
    ),
    # --- distribution, DMD's family
    "f_distill": Row(
        "hasten.methods.dmd2:DMD2", "DMD2 for any f-divergence: samples count by the discriminator's density ratio.",
        "yes", "yes", "fake, disc", "student 7, critic 7", "Xu et al. 2025", "generate",
        preset=(("divergence", "js"),), group="distribution", memory=3,
        fit=(("lr", 5e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=5e-5,
        trouble="When samples lack diversity, set divergence to forward_kl; when it is noisy, set it to reverse_kl "
        "(plain DMD2), or raise fit.batch: the weights are relative to the batch.",
    ),
    "dmd": Row(
        "hasten.methods.dmd2:DMD2", "The first DMD: one step, held to the teacher's pairs, without a GAN.",
        "no", "yes", "fake", "student 8 (with pairs), critic 4", "Yin et al. 2024a", "generate",
        preset=(("gan_weight", 0.0), ("regression", 0.25), ("student_every", 1)), group="distribution", memory=3,
        fit=(("lr", 3e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=5e-5,
        trouble="When it blurs, lower regression; when it collapses or oscillates, raise it; when it is slow, make the "
        "pairs once (--set pairs=20000).",
    ),
    "diff_instruct": Row(
        "hasten.methods.dmd2:DMD2", "The integral KL divergence, without DMD's normaliser and without a GAN.",
        "no", "yes", "fake", "student 5, critic 4", "Luo et al. 2023", "generate",
        preset=(
            ("gan_weight", 0.0), ("weight", "x0"), ("student_every", 1),
            ("times", LogNormal(-1.2, 1.2)),
        ), group="distribution", memory=3,
        fit=(("lr", 3e-4), ("lrs", {"student": 1e-4}), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))),
        lora_lr=5e-5,
        trouble="When it oscillates, raise student_every or lower fit.lrs.student; when large structures are wrong, "
        "move times towards noise (a larger mean), or use dmd2.",
    ),
    "decoupled": Row(
        "hasten.methods.decoupled:Decoupled", "DMD with guidance and matching at noise levels of their own.",
        "no", "yes", "fake", "student 5 (guided 7), critic 4", "Liu et al. 2025", "generate",
        group="distribution", memory=3,
        fit=(("lr", 5e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=5e-5,
        trouble="When colours burn or contrast grows, lower cfg_scale: it drives the student; when it oscillates, "
        "raise student_every or fit.lrs.fake.",
    ),
    "phased": Row(
        "hasten.methods.phased:Phased", "DMD at the end of every phase of a few-step trajectory; keeps diversity.",
        "no", "yes", "fake", "student 5, critic 4, and 1.5 of 4 steps", "Fan et al. 2025", "steps", True,
        group="distribution", memory=3,
        fit=(("lr", 5e-4), ("lrs", {"student": 2e-4}), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))),
        lora_lr=5e-5,
        trouble="When the last phase blurs, draw times nearer to 0 or train longer: it begins almost collapsed; when "
        "it oscillates, raise student_every or lower fit.lrs.student.",
    ),
    "tdm": Row(
        "hasten.methods.tdm:TDM", "The student's deterministic trajectory matches the teacher's in distribution.",
        "no", "yes", "fake", "student 5, critic 4, and 1.5 of 4 steps", "Luo et al. 2025", "steps", True,
        group="distribution", memory=3,
        fit=(("lr", 5e-4), ("lrs", {"student": 1e-4}), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))),
        lora_lr=2e-5,
        trouble="When it oscillates, raise student_every or lower fit.lrs.student (a fifth of fake's); when it is "
        "slow, raise huber, or set it to 0.",
    ),
    # --- distribution, adversarial and moments
    "sida": Row(
        "hasten.methods.sid:SiD", "SiD with a GAN whose discriminator is the fake's own encoder.",
        "yes", "yes", "fake", "student 7, critic 7", "Zhou et al. 2024b", "generate",
        preset=(("alpha", 1.0), ("gan_weight", 1e-4)), group="distribution", memory=3,
        fit=(("lr", 3e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When it oscillates or blurs, lower critic_gan_weight, whose task shares fake with denoising; when it "
        "collapses, lower the learning rate of the student.",
    ),
    "ladd": Row(
        "hasten.methods.ladd:LADD", "A GAN on the frozen teacher's features of noised samples.",
        "yes", "yes", "disc", "student 5, critic 3", "Sauer et al. 2024b", "steps",
        group="distribution", memory=2,
        fit=(("lr", 5e-5), ("lrs", {"disc": 2e-3}), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))),
        lora_lr=1e-5,
        trouble="When it collapses, or the loss of disc stays at 2 (it tells nothing apart), lower the learning rate "
        "of the student; when details are missing or images are small, move times towards clean ones (a mean of 0), "
        "and when shapes are wrong, towards noise.",
    ),
    "add": Row(
        "hasten.methods.add:ADD", "A GAN on features of the samples and the teacher's score distillation.",
        "yes", "yes", "disc, features", "student 4, critic 1", "Sauer et al. 2023", "steps",
        group="distribution", memory=2,
        fit=(("lr", 2e-4), ("lrs", {"disc": 4e-4, "features": 4e-4}), ("batch", 128), ("betas", (0.0, 0.99)),
             ("ema", (0.99,))),
        lora_lr=1e-5,
        trouble="When it blurs or loses variety, lower distill_weight, which pulls samples to their mean; when it "
        "oscillates or collapses, raise r1_weight or lower the learning rate of disc and features.",
    ),
    "moment": Row(
        "hasten.methods.moment:MomentMatching", "Matches E[x0 | z_s] of the student's steps with the teacher's.",
        "yes", "yes", "fake", "student 5, critic 5", "Salimans et al. 2024", "steps", True,
        group="distribution", memory=3,
        fit=(("lr", 3e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When it oscillates, let fake learn faster (lrs) or set student_every to 2; with few steps it blurs "
        "first, so raise steps.",
    ),
    # --- hybrid
    "rcm": Row(
        "hasten.methods.rcm:RCM", "Continuous-time consistency for variety, distribution matching for sharpness.",
        "yes", "yes", "fake", "student 11, critic 4", "Zheng et al. 2025", "generate",
        group="hybrid", memory=3,
        fit=(("lr", 2e-4), ("batch", 128), ("betas", (0.0, 0.99)), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When few steps blur, raise dmd_weight (its pull grows with the number of pixels, so small images need "
        "more); when modes are lost or colours burn, lower it; when it diverges early, lengthen warmup (0.4).",
    ),
    "sprint": Row(
        "hasten.methods.sprint:Sprint", "SANA-Sprint: continuous-time consistency and a GAN on the teacher's features.",
        "yes", "yes", "logvar, disc", "student 12, critic 3", "Chen et al. 2025",
        group="hybrid", memory=2,
        fit=(("lr", 2e-4), ("batch", 128), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When textures are noisy or it oscillates, lower gan_weight or the disc's rate (lrs); when one step "
        "blurs, raise gan_weight or largest; when real and generated meet in the log, the disc lost: raise its rate.",
    ),
    "hyper": Row(
        "hasten.methods.hyper:HyperSD", "Hyper-SD: consistency in 8, 4, 2, 1 segments, then DMD for one step.",
        "yes", "yes", "fake (last stage)", "5; last stage: student 5, critic 4", "Ren et al. 2024", "end", True,
        group="hybrid", memory=3,
        fit=(("lr", 3e-4), ("ema", (0.99,))), lora_lr=1e-4,
        trouble="When a stage blurs, give more iterations or a smaller start; when the last stage oscillates, let fake "
        "learn faster than the student (lrs) or set dmd_share to 0.",
    ),
    "twinflow": Row(
        "hasten.methods.twinflow:TwinFlow", "One network is generator, real and fake score; no teacher at hand.",
        "yes", "optional", "none", "5", "Cheng et al. 2025",
        group="hybrid", memory=1,
        fit=(("lr", 3e-4), ("ema", (0.995,))), lora_lr=1e-4,
        trouble="When one step blurs, raise match_weight towards 0.25; when samples drift and twin grows in the log, "
        "lower it; when the log's base does not fall, raise gap: the difference over it is noisy.",
    ),
    # --- after distillation
    "dpo": Row(
        "hasten.methods.dpo:DPO", "Prefers the better of two images, given pairs; on a teacher or a student.",
        "preferred and rejected images", "yes", "none", "8 a pair", "Wallace et al. 2023",
        group="preferences",
        fit=(("lr", 5e-5), ("batch", 128), ("warmup", 50), ("ema", (0.99,))), lora_lr=1e-5,
        trouble="When images degrade or agrees reaches 1 at once, raise beta or lower fit.lr; when nothing changes, "
        "lower beta: it scales with the number of pixels.",
    ),
}  # fmt: skip
