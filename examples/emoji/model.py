"""An untrained StableDiffusion3Pipeline of stock classes for 64x64 pixels, and its attention while it is trained."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import json
import math
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS, WORDS = 32, (192, 64)  # of a prompt; widths of the two text encoders


def tokenizer(captions: list[str]) -> Any:
    """CLIP's byte-level BPE, its merges learnt from the captions."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(ByteLevel.alphabet())
    core = CLIPTokenizer()._tokenizer
    core.train_from_iterator(captions, BpeTrainer(vocab_size=2048, end_of_word_suffix="</w>", show_progress=False))
    merges: Any = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    words = [*letters, *(c + "</w>" for c in letters), *dict.fromkeys(a + b for a, b in merges), *special]
    return CLIPTokenizer({w: i for i, w in enumerate(dict.fromkeys(words))}, merges, model_max_length=TOKENS)


def no_t5() -> tuple[Any, Any]:
    """A T5 encoder and tokenizer that say nothing: the last norm's weight is 0, so every embedding is exactly 0.

    That is what the pipeline itself puts where T5 is missing, but a folder without T5 does not load by itself.
    """
    config = T5Config(vocab_size=64, d_model=sum(WORDS), d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    vocab = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "\u2581")]
    return encoder, T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=256)


def build(tokens: Any) -> Any:
    """An untrained StableDiffusion3Pipeline for 64x64 pixels: 16x16x4 latents, 64 image tokens, two CLIP encoders."""

    def encoder(width: int, layers: int) -> CLIPTextModelWithProjection:
        ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
        config = CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TOKENS,
            pad_token_id=tokens.pad_token_id, **ends,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config)

    AnyVAE: Any = AutoencoderKL  # its own annotations know one block only
    vae = AnyVAE(
        block_out_channels=(32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=16,
        sample_size=64, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=4,
        attention_head_dim=48, joint_attention_dim=sum(WORDS), caption_projection_dim=192,
        pooled_projection_dim=sum(WORDS), pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    t5, t5_tokens = no_t5()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), tokenizer=tokens,
        tokenizer_2=tokens, text_encoder=encoder(WORDS[0], 3), text_encoder_2=encoder(WORDS[1], 2),
        tokenizer_3=t5_tokens, text_encoder_3=t5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's trained parts by name."""
    return {n: getattr(pipe, n) for n in ("vae", "transformer", "text_encoder", "text_encoder_2")}


class CountedAttention:
    """SD3's joint attention in which the last text token stands for ``count`` equal ones: their logits gain log count.

    The pipeline appends ``max_sequence_length`` (256 unless told) embeddings of T5 to a prompt, which are zeros here.
    They have no positions and stay equal through all layers, so one of them, counted so often, is exactly the same.
    """

    def __init__(self, tokens: int):
        self.bias = torch.zeros(tokens)

    def count(self, count: int) -> None:
        self.bias[-1] = math.log(count)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        image, text = hidden_states, encoder_hidden_states

        def heads(x: Tensor, y: Tensor) -> Tensor:  # [B, heads, image and text tokens, D / heads]
            return torch.cat([z.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for z in (x, y)], 2)

        n, normed = image.shape[1], lambda norm, x: norm(x.unflatten(-1, (attn.heads, -1))).flatten(-2)
        q = heads(normed(attn.norm_q, attn.to_q(image)), normed(attn.norm_added_q, attn.add_q_proj(text)))
        k = heads(normed(attn.norm_k, attn.to_k(image)), normed(attn.norm_added_k, attn.add_k_proj(text)))
        v = heads(attn.to_v(image), attn.add_v_proj(text))
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + self.bias).softmax(-1)
        x = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # at so few tokens faster than flash attention
        image, text = attn.to_out[0](x[:, :n]), x[:, n:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)
