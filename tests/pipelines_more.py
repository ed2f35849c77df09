"""Further tiny pipelines of diffusers, each chosen for something that an adapter may get wrong.

``PLAIN`` are ordinary text-to-image and text-to-video models, ``EXOTIC`` those with a second input, expert, latent or
time. ``pipe, call = MORE["chroma"]()`` as in `tests.pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from tests.pipeline_parts import (
    FLOW,
    FLUX_SHIFT,
    LTX_SHIFT,
    Made,
    awake,
    bert,
    bos_tokenizer,
    clip,
    clip_tokenizer,
    clip_vision,
    dc_vae,
    diffusers,
    flow_euler,
    gemma,
    half_mask,
    hunyuan_vae,
    kl_vae,
    llama,
    ltx2_parts,
    ltx_vae,
    picture,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
    transformers,
    umt5,
    wan_vae,
)
from tests.pipelines import NEGATIVE, PROMPT

WORDS = dict(prompt=PROMPT, negative_prompt=NEGATIVE)
FLUX = dict(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8))  # fmt: skip
WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
           text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)  # fmt: skip


def pixart() -> Made:
    """PixArt-Sigma: noise and a learned variance, a masked prompt, a multistep solver."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=32)  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=kl_vae(), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler())  # fmt: skip
    sizes = dict(height=8, width=8, max_sequence_length=32, use_resolution_binning=False, clean_caption=False)
    return awake(pipe), WORDS | sizes


def chroma() -> Made:
    """Chroma: a network that makes the modulations of all blocks, and two calls under guidance."""
    config = {k: v for k, v in FLUX.items() if k != "pooled_projection_dim"}
    transformer = diffusers.ChromaTransformer2DModel(
        **config, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    )
    pipe = diffusers.ChromaPipeline(
        scheduler=flow_euler(use_beta_sigmas=True, shift=1.0), vae=kl_vae(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=t5(), tokenizer=t5_tokenizer(), transformer=transformer)  # fmt: skip
    return awake(pipe), WORDS | dict(height=8, width=8, max_sequence_length=32)


def lumina2() -> Made:
    """Lumina 2: time and prediction with their signs turned round, a guided prediction with its norm rescaled."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=8)  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=flow_euler(shift=6.0), text_encoder=gemma(), tokenizer=bos_tokenizer(),
        vae=kl_vae(4, (4,) * 4, shift_factor=0.1159))  # fmt: skip
    return awake(pipe), WORDS | dict(height=64, width=64, max_sequence_length=64, system_prompt="Paint.")


def hidream() -> Made:
    """HiDream: four encoders, mixtures of experts, a prediction with its sign turned round."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128), llama_layers=(0, 1), force_inference_output=True)  # fmt: skip
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=flow_euler(shift=3.0), vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(projected=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(projected=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(head=True), tokenizer_4=bos_tokenizer(), transformer=transformer)  # fmt: skip
    return awake(pipe), WORDS | dict(height=128, width=128, max_sequence_length=32)  # it scales every size to this area


def auraflow() -> Made:
    """AuraFlow: the time from 0 to 1, learned positions."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=64)  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=kl_vae(), transformer=transformer,
        scheduler=flow_euler(shift=1.73))  # fmt: skip
    return awake(pipe), WORDS | dict(height=8, width=8, max_sequence_length=32)


def cogview4() -> Made:
    """CogView 4: sizes as conditions, a linear shift that depends on the size, times that the pipeline rounds."""
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4)  # fmt: skip
    scheduler = flow_euler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, max_image_seq_len=4096,
        time_shift_type="linear")  # fmt: skip
    pipe = diffusers.CogView4Pipeline(
        tokenizer=bos_tokenizer(), text_encoder=llama(32), vae=kl_vae(), transformer=transformer,
        scheduler=scheduler)  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, max_sequence_length=32)


def bria() -> Made:
    """Bria: packed latents in a batch of two under guidance, the scheduler's own time, no pooled prompt."""
    config = FLUX | dict(pooled_projection_dim=None, axes_dims_rope=[4, 4, 8])
    pipe = diffusers.BriaPipeline(
        scheduler=flow_euler(**FLUX_SHIFT), vae=kl_vae(4, (4, 8)), text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=diffusers.BriaTransformer2DModel(**config))  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, max_sequence_length=32)


def hunyuandit() -> Made:
    """Hunyuan-DiT: v prediction with a learned variance, an ancestral scheduler, two masks, long skips."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=32)  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction",
        steps_offset=1, clip_sample=False, timestep_spacing="leading")  # fmt: skip
    encoder, tokenizer = bert()
    pipe = diffusers.HunyuanDiTPipeline(
        vae=kl_vae(), text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=transformer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, use_resolution_binning=False)


def flux_schnell() -> Made:
    """FLUX.1-schnell: no guidance at all, a shift of 1."""
    pipe = diffusers.FluxPipeline(
        scheduler=flow_euler(shift=1.0), vae=kl_vae(shift_factor=0.1159), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(**FLUX))  # fmt: skip
    return awake(pipe), dict(prompt=PROMPT, guidance_scale=0.0, height=8, width=8, max_sequence_length=32)


def allegro() -> Made:
    """Allegro: a video model that predicts noise, an ancestral scheduler that scales the network's input."""
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=24, caption_channels=32)  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, sample_size=16
    )
    vae.enable_tiling()  # the autoencoder decodes whole tiles only, of 24 frames; no config says so
    pipe = diffusers.AllegroPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer,
        scheduler=diffusers.EulerAncestralDiscreteScheduler())  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, num_frames=24, max_sequence_length=32, clean_caption=False)


def mochi() -> Made:
    """Mochi: the scheduler's times run upwards, the prediction has the other sign."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, text_embed_dim=32,
        time_embed_dim=4, max_sequence_length=32)  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    pipe = diffusers.MochiPipeline(
        scheduler=flow_euler(invert_sigmas=True), vae=vae, text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=transformer)  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, num_frames=7, max_sequence_length=32)


def hunyuanvideo() -> Made:
    """HunyuanVideo: guidance times 1000 as an input, a language model's hidden layer, a pooled prompt."""
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4))  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=llama(), tokenizer=bos_tokenizer(), transformer=transformer, vae=hunyuan_vae(),
        scheduler=flow_euler(shift=7.0), text_encoder_2=clip(), tokenizer_2=clip_tokenizer())  # fmt: skip
    template = dict(template="{}", crop_start=0)
    sizes = dict(height=16, width=16, num_frames=9, max_sequence_length=32, prompt_template=template)
    return awake(pipe), dict(prompt=PROMPT, guidance_scale=6.0) | sizes


def sana_sprint() -> Made:
    """Sana-Sprint: angles for times and TrigFlow's velocity, scaled input and output, guidance as an input."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32, qk_norm="rms_norm_across_heads", guidance_embeds=True)  # fmt: skip
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=bos_tokenizer(), text_encoder=gemma(), vae=dc_vae(), transformer=transformer,
        scheduler=diffusers.SCMScheduler())  # fmt: skip
    sizes = dict(height=32, width=32, max_sequence_length=32, use_resolution_binning=False)
    call = dict(prompt=PROMPT, complex_human_instruction=None, intermediate_timesteps=None)
    return awake(pipe), call | sizes


def cosmos2() -> Made:
    """Cosmos Predict 2: a preconditioned network guided in x0, sigmas from 0.002 to 80."""

    class Harmless:
        """A safety checker that finds nothing; the pipeline refuses to go without one."""

        def to(self, device: Any) -> None:
            pass

        def check_text_safety(self, prompt: str) -> bool:
            return True

        def check_video_safety(self, frames: Any) -> Any:
            return frames

    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), extra_pos_embed_type=None,
        concat_padding_mask=False)  # fmt: skip
    scheduler = flow_euler(use_karras_sigmas=True)
    pipe = diffusers.Cosmos2TextToImagePipeline(
        text_encoder=t5(), tokenizer=t5_tokenizer(), transformer=transformer, vae=wan_vae(), scheduler=scheduler,
        safety_checker=Harmless())  # fmt: skip
    return awake(pipe), WORDS | dict(guidance_scale=3.0, height=16, width=16, max_sequence_length=32)


def _flux_of(kind: Any, **config: Any) -> Any:
    return kind(
        scheduler=flow_euler(**FLUX_SHIFT), vae=kl_vae(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(**(FLUX | config), guidance_embeds=True))  # fmt: skip


def flux_kontext() -> Made:
    """FLUX.1 Kontext: a picture as further tokens of the latent's sequence, cut off behind the network."""
    pipe = _flux_of(diffusers.FluxKontextPipeline)
    sizes = dict(height=8, width=8, max_area=64, _auto_resize=False, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, image=picture(8, 8)) | sizes


def flux_fill() -> Made:
    """FLUX.1 Fill: a masked picture and its mask as further channels."""
    pipe = _flux_of(diffusers.FluxFillPipeline, in_channels=16 + 16 + 4, out_channels=16)
    sizes = dict(height=8, width=8, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, image=picture(8, 8), mask_image=half_mask(8, 8)) | sizes


def sd_inpaint() -> Made:
    """Stable Diffusion inpainting: a UNet of 4 + 1 + 4 channels."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=9, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2)  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1)  # fmt: skip
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae=kl_vae(4, (4, 8)), text_encoder=clip(8), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    return awake(pipe), WORDS | dict(image=picture(16, 16), mask_image=half_mask(16, 16), height=16, width=16)


def wan_i2v() -> Made:
    """Wan 2.1 image-to-video: the first frame and its mask as further channels, and seen by an image encoder."""
    module = import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
    if not hasattr(module, "ftfy"):  # it repairs prompts of broken encoding, is optional, and is called all the same
        vars(module)["ftfy"] = SimpleNamespace(fix_text=str)
    encoder, processor = clip_vision()
    transformer = diffusers.WanTransformer3DModel(
        **(WAN | dict(in_channels=16 + 16 + 4)), image_dim=8, added_kv_proj_dim=24
    )
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=wan_vae(), image_encoder=encoder, image_processor=processor,
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW), transformer=transformer)  # fmt: skip
    return awake(pipe), WORDS | dict(image=picture(16, 16), height=16, width=16, num_frames=9, max_sequence_length=32)


def wan22_a14b() -> Made:
    """Wan 2.2 A14B: one expert for much noise, one for little, each with a guidance scale of its own."""
    pipe = diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=wan_vae(), boundary_ratio=0.875,
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW), transformer=diffusers.WanTransformer3DModel(**WAN),
        transformer_2=diffusers.WanTransformer3DModel(**WAN))  # fmt: skip
    sizes = dict(height=16, width=16, num_frames=9, max_sequence_length=32)
    return awake(pipe), WORDS | dict(guidance_scale=4.0, guidance_scale_2=3.0) | sizes


def wan22_5b() -> Made:
    """Wan 2.2 5B: a time for every token, an autoencoder of 16x in space and 48 channels."""
    vae = wan_vae(
        z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2, latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48, scale_factor_spatial=16)  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=vae, expand_timesteps=True,
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW),
        transformer=diffusers.WanTransformer3DModel(**(WAN | dict(in_channels=48, out_channels=48))))  # fmt: skip
    return awake(pipe), WORDS | dict(height=32, width=32, num_frames=9, max_sequence_length=32)


def ltx_i2v() -> Made:
    """LTX-Video from an image: a time for every token, those of the first frame 0."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32)  # fmt: skip
    pipe = diffusers.LTXImageToVideoPipeline(
        scheduler=flow_euler(**LTX_SHIFT), vae=ltx_vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=transformer)  # fmt: skip
    return awake(pipe), WORDS | dict(image=picture(32, 32), height=32, width=32, num_frames=9, max_sequence_length=32)


def hunyuanvideo15() -> Made:
    """HunyuanVideo 1.5: an empty first frame and its mask as further channels, three prompts, a guider."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4 + 4 + 1, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v")  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16,) * 3, layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4)  # fmt: skip
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen_vl(16).model.language_model, tokenizer=qwen_tokenizer(1200), transformer=transformer, vae=vae,
        scheduler=flow_euler(shift=7.0), text_encoder_2=t5(), tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0))  # fmt: skip
    return awake(pipe), WORDS | dict(height=16, width=16, num_frames=5)


def ltx2() -> Made:
    """LTX-2: a video and its sound are denoised together."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False)  # fmt: skip
    pipe = diffusers.LTX2Pipeline(**ltx2_parts(), transformer=transformer)
    sizes = dict(height=32, width=32, num_frames=5, frame_rate=25.0, max_sequence_length=32)
    no_more_guidance = dict(stg_scale=0.0, modality_scale=1.0, audio_stg_scale=0.0, audio_modality_scale=1.0)
    return awake(pipe), WORDS | sizes | no_more_guidance


def named(*made: Callable[[], Made]) -> dict[str, Callable[[], Made]]:
    """The functions by their names."""
    return {one.__name__: one for one in made}


PLAIN = named(pixart, chroma, lumina2, hidream, auraflow, cogview4, bria, hunyuandit, flux_schnell, allegro, mochi,
              hunyuanvideo)  # fmt: skip
EXOTIC = named(sana_sprint, cosmos2, flux_kontext, flux_fill, sd_inpaint, wan_i2v, wan22_a14b, wan22_5b, ltx_i2v,
               hunyuanvideo15, ltx2)  # fmt: skip
MORE = PLAIN | EXOTIC
