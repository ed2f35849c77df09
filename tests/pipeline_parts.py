"""Parts of tiny pipelines built without a model hub: byte tokenizers, small random encoders and VAEs, and ``awake``."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from torch import nn


class Late:
    """A library that is imported at its first use, as that takes seconds; untyped, as their annotations are narrow."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


diffusers: Any = Late("diffusers")
transformers: Any = Late("transformers")
Made = tuple[Any, dict[str, Any]]  # a pipeline, and the keyword arguments of one call of it

FLUX_SHIFT: dict[str, Any] = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
    max_image_seq_len=4096)  # fmt: skip
LTX_SHIFT: dict[str, Any] = dict(
    use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
    shift_terminal=0.1)  # fmt: skip
FLOW: dict[str, Any] = dict(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)  # multistep solvers

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c.get('text', '') }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One byte is one token here, so a system message of a sentence or two would fill the encoder's length by itself.
CHAT_OF_USER = CHAT.replace("for m in messages", "for m in messages if m['role'] == 'user'")


def awake(pipe: Any, seed: int = 0) -> Any:
    """The pipeline with all parameters drawn anew, of which none is zero, constant or uninitialised.

    Last layers, gates and modulations usually start at zero, and then the output depends on neither time nor
    prompt. Matrices get a standard deviation of 1/sqrt(fan in), vectors 0.1 about their start (0 or 1). Every
    component has a stream of its own: two pipelines of one architecture are equal whatever was drawn before.
    """
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            redraw(part.eval(), crc32(f"{seed} {name}".encode()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def redraw(module: nn.Module, seed: int) -> None:
    """New values for every parameter of a module; see `awake`."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if p.ndim > 1:
            p.copy_(noise / (p.numel() / p.shape[0]) ** 0.5)
        else:
            p.copy_(0.1 * noise + bool((p == 1).all()))


def flow_euler(**config: Any) -> Any:
    """The scheduler of most rectified flows."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def alphabet() -> list[str]:
    """The 256 printable stand-ins of the bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer(length: int = 77) -> Any:
    """A byte-level CLIP tokenizer: 512 bytes, then begin and end; the end is the largest id and pads, as in CLIP."""
    tokens = [*alphabet(), *(c + "</w>" for c in alphabet()), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=length)


def clip(hidden: int = 32, *, projected: bool = False, layers: int = 2) -> Any:
    """A CLIP text encoder for `clip_tokenizer`."""
    config = transformers.CLIPTextConfig(
        vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513, hidden_size=hidden, hidden_act="gelu",
        intermediate_size=32, num_attention_heads=4, num_hidden_layers=layers, projection_dim=32)  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5_tokenizer(length: int = 512) -> Any:
    """A T5 tokenizer of the printable ASCII characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, additional_special_tokens=[], model_max_length=length)


def t5(width: int = 32) -> Any:
    """A T5 encoder for `t5_tokenizer`."""
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu"))  # fmt: skip


def umt5(width: int = 32) -> Any:
    """A UMT5 encoder for `t5_tokenizer`."""
    return transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0))  # fmt: skip


def qwen_tokenizer(length: int = 512, *, chat: str = CHAT) -> Any:
    """A byte-level Qwen2 tokenizer with a chat template that takes text and lists of parts."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*special, *alphabet()])}, merges=[],
        additional_special_tokens=special[1:], model_max_length=length)  # fmt: skip
    tokenizer.chat_template = chat
    return tokenizer


def bos_tokenizer(length: int = 512) -> Any:
    """A byte-level tokenizer that begins with a token of its own, as those of Gemma, Llama and GLM do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<eos>", "<bos>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet()])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=length
    )


def qwen3(hidden: int = 16) -> Any:
    """A Qwen3 language model without head."""
    return transformers.Qwen3Model(transformers.Qwen3Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024))  # fmt: skip


def qwen_vl(hidden: int = 16) -> Any:
    """A Qwen2.5-VL model, vision tower included."""
    text = dict(
        vocab_size=512, hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, rope_theta=1e6,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"})  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=hidden)
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=300, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303))  # fmt: skip


def mistral(hidden: int = 16) -> Any:
    """A Mistral 3 model, vision tower included."""
    text = dict(
        model_type="mistral", vocab_size=512, hidden_size=hidden, intermediate_size=32, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, head_dim=4, sliding_window=None,
        max_position_embeddings=1024)  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=4, head_dim=4,
        intermediate_size=32, image_size=30, patch_size=6, num_channels=3)  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=300)
    )


def gemma(hidden: int = 8) -> Any:
    """A Gemma 2 language model without head."""
    return transformers.Gemma2Model(transformers.Gemma2Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager"))  # fmt: skip


def llama(hidden: int = 16, *, head: bool = False) -> Any:
    """A Llama language model, with or without its head."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4)  # fmt: skip
    return (transformers.LlamaForCausalLM if head else transformers.LlamaModel)(config)


def kl_vae(channels: int = 4, blocks: tuple[int, ...] = (4,), **more: Any) -> Any:
    """The KL autoencoder of Stable Diffusion: each block after the first halves height and width."""
    return diffusers.AutoencoderKL(
        block_out_channels=blocks, down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks), layers_per_block=1, latent_channels=channels,
        norm_num_groups=1, sample_size=32, use_quant_conv=False, use_post_quant_conv=False, **more)  # fmt: skip


def wan_vae(**more: Any) -> Any:
    """Wan 2.1's causal video autoencoder: 4x in time, 8x in space, 16 channels."""
    config: dict[str, Any] = dict(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1) | more
    return diffusers.AutoencoderKLWan(temperal_downsample=[False, True, True], **config)


def dc_vae(channels: int = 4) -> Any:
    """The deep-compression autoencoder, here 2x in space."""
    kinds, widths, scales, layers = ("ResBlock", "EfficientViTBlock"), (8, 8), ((), (5,)), (1, 1)
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=channels, attention_head_dim=2, encoder_block_types=kinds,
        decoder_block_types=kinds, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, encoder_layers_per_block=layers,
        decoder_layers_per_block=layers, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407)  # fmt: skip


def ltx_vae() -> Any:
    """LTX-Video's causal autoencoder, here 4x in time and 4x in space."""
    four, five = (8,) * 4, (1,) * 5
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=four, decoder_block_out_channels=four,
        layers_per_block=five, decoder_layers_per_block=five, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False)  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def bert(hidden: int = 32) -> tuple[Any, Any]:
    """A BERT encoder and its tokenizer, which knows single letters."""
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.BertModel(config), tokenizer


def gemma3(hidden: int = 16) -> Any:
    """A Gemma 3 model, vision tower included."""
    text = dict(vocab_size=512, hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=8)  # fmt: skip
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                  patch_size=4)  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=300, mm_tokens_per_image=4)
    )


def clip_vision(hidden: int = 8, size: int = 8) -> tuple[Any, Any]:
    """A CLIP image encoder and its image processor."""
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=size,
        patch_size=4, projection_dim=hidden)  # fmt: skip
    processor = transformers.CLIPImageProcessor(crop_size=size, size=size)
    return transformers.CLIPVisionModel(config), processor


def hunyuan_vae() -> Any:
    """HunyuanVideo's causal autoencoder: 4x in time, 8x in space."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, layers_per_block=1, norm_num_groups=4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4)  # fmt: skip


def ltx2_parts(text: int = 16) -> dict[str, Any]:
    """Everything of LTX-2 but its transformer: a video and an audio autoencoder, a vocoder, text and its connectors."""
    ltx2 = import_module("diffusers.pipelines.ltx2")
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_type=("spatiotemporal",), upsample_factor=(1,), patch_size=1,
        decoder_causal=False)  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8)  # fmt: skip
    vocoder = ltx2.LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000)  # fmt: skip
    connectors = ltx2.LTX2TextConnectors(
        caption_channels=text, text_proj_in_factor=3, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=text // 4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=text // 4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
        rope_double_precision=False)  # fmt: skip
    return dict(vae=vae, audio_vae=audio, vocoder=vocoder, connectors=connectors, text_encoder=gemma3(text),
                tokenizer=bos_tokenizer(), scheduler=flow_euler(**LTX_SHIFT))  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> Any:
    """A PIL picture of random pixels."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def half_mask(width: int, height: int) -> Any:
    """A PIL mask whose right half is to be painted."""
    return Image.fromarray((torch.arange(width) >= width // 2).expand(height, width).byte().mul(255).numpy())
