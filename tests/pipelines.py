"""Twelve tiny pipelines of diffusers, with random weights and no model hub: ``pipe, call = FAMILIES["flux"]()``.

``pipe(**call, num_inference_steps=2)`` runs on a CPU in well under a second. The schedulers shift, space and round
their times as those of published checkpoints do, since that is what an adapter gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.pipeline_parts import (
    CHAT_OF_USER,
    FLOW,
    FLUX_SHIFT,
    LTX_SHIFT,
    Made,
    awake,
    bos_tokenizer,
    clip,
    clip_tokenizer,
    dc_vae,
    diffusers,
    flow_euler,
    gemma,
    kl_vae,
    ltx_vae,
    mistral,
    qwen3,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
    umt5,
    wan_vae,
)

PROMPT, NEGATIVE = "a red bicycle", "blurry"


def dit() -> Made:
    """DiT: a class label instead of a prompt, noise and its learned variance."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False)  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, kl_vae(), diffusers.DDIMScheduler(clip_sample=False))
    return awake(pipe), dict(class_labels=[1], guidance_scale=4.0)


def sd15() -> Made:
    """Stable Diffusion 1.5: a UNet that predicts noise."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2)  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1)  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=kl_vae(4, (4, 8)), text_encoder=clip(8), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=6.0, height=16, width=16)


def sdxl() -> Made:
    """Stable Diffusion XL: two encoders, sizes as conditions, a scheduler that scales the network's input."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), norm_num_groups=1,
        projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64)  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=kl_vae(4, (4, 8)), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=clip(projected=True),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False)  # fmt: skip
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, height=32, width=32)


def sd3() -> Made:
    """Stable Diffusion 3: three encoders, rectified flow."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16)  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow_euler(shift=3.0),
        vae=kl_vae(shift_factor=0.0609, scaling_factor=1.5035), text_encoder=clip(projected=True),
        tokenizer=clip_tokenizer(), text_encoder_2=clip(projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer())  # fmt: skip
    sizes = dict(height=8, width=8, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, **sizes)


def flux() -> Made:
    """FLUX.1: packed latents with ids, a shift that depends on the size, guidance as an input."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=flow_euler(**FLUX_SHIFT), vae=kl_vae(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        transformer=transformer)  # fmt: skip
    return awake(pipe), dict(prompt=PROMPT, guidance_scale=3.5, height=8, width=8, max_sequence_length=32)


def flux2() -> Made:
    """FLUX.2: a language model's hidden layers as the text, batched ids of four axes."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True)  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False)  # fmt: skip
    pipe = diffusers.Flux2Pipeline(
        scheduler=flow_euler(**FLUX_SHIFT), vae=vae, text_encoder=mistral(),
        tokenizer=qwen_tokenizer(chat=CHAT_OF_USER), transformer=transformer)  # fmt: skip
    sizes = dict(height=8, width=8, max_sequence_length=64, text_encoder_out_layers=(1,))
    return awake(pipe), dict(prompt=PROMPT, guidance_scale=4.0, **sizes)


def qwenimage() -> Made:
    """Qwen-Image: sizes as a list of tuples, two calls under guidance, the norm of the guided one rescaled."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4))  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    scheduler = flow_euler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02)  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=qwen_vl(), tokenizer=qwen_tokenizer(), transformer=transformer
    )
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=3.0, height=32, width=32)


def z_image() -> Made:
    """Z-Image: lists of samples, time and prediction with their signs turned round."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32])  # fmt: skip
    pipe = diffusers.ZImagePipeline(
        scheduler=flow_euler(shift=3.0), text_encoder=qwen3(), tokenizer=qwen_tokenizer(),
        vae=kl_vae(16, (8, 16), scaling_factor=0.3611, shift_factor=0.1159),
        transformer=transformer)  # fmt: skip
    sizes = dict(height=32, width=32, max_sequence_length=64)
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=3.0, **sizes)


def sana() -> Made:
    """Sana: linear attention, and a multistep solver that rounds its times."""
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32)  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    pipe = diffusers.SanaPipeline(
        tokenizer=bos_tokenizer(), text_encoder=gemma(), vae=dc_vae(), transformer=transformer,
        scheduler=scheduler)  # fmt: skip
    sizes = dict(height=32, width=32, max_sequence_length=32, use_resolution_binning=False)
    call = dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=4.0, complex_human_instruction=None)
    return awake(pipe), call | sizes


def wan() -> Made:
    """Wan 2.1: a video, a multistep solver that rounds its times, two calls under guidance."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32)  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    pipe = diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler,
        transformer=transformer)  # fmt: skip
    sizes = dict(height=16, width=16, num_frames=9, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, **sizes)


def ltx() -> Made:
    """LTX-Video: a packed video, its sizes and rates as conditions, a shift that leaves a last time above 0."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32)  # fmt: skip
    pipe = diffusers.LTXPipeline(
        scheduler=flow_euler(**LTX_SHIFT), vae=ltx_vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
        transformer=transformer)  # fmt: skip
    sizes = dict(height=32, width=32, num_frames=9, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=3.0, **sizes)


def cogvideox() -> Made:
    """CogVideoX: frames before channels, v prediction, no signal left at the last time."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=32)  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4)  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0,
        clip_sample=False, set_alpha_to_one=True)  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer,
        scheduler=scheduler)  # fmt: skip
    sizes = dict(height=16, width=16, num_frames=9, max_sequence_length=32)
    return awake(pipe), dict(prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=6.0, **sizes)


FAMILIES: dict[str, Callable[[], Made]] = {
    made.__name__: made for made in (dit, sd15, sdxl, sd3, flux, flux2, qwenimage, z_image, sana, wan, ltx, cogvideox)
}
