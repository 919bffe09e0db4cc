"""A tiny pipeline of every family with random weights, in the folder format of the real one."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from opd_tiny.build.sd3 import assemble, build_clip, build_t5, build_transformer
from opd_tiny.build.tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer
from opd_tiny.build.vae import build_vae
from torch import nn
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)


def stable_diffusion_3() -> DiffusionPipeline:
    return assemble(build_transformer(), build_vae())


def flux(*, schnell: bool = False) -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=not schnell,
    )  # fmt: skip
    clip_tokens, t5_tokens = clip_tokenizer(), t5_tokenizer()
    with_projection = build_clip(len(clip_tokens), clip_tokens.eos_token_id, clip_tokens.bos_token_id)
    return FluxPipeline(
        transformer=transformer, vae=_vae(), text_encoder=CLIPTextModel(with_projection.config),
        tokenizer=clip_tokens, text_encoder_2=build_t5(len(t5_tokens)), tokenizer_2=t5_tokens,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0) if schnell else _dynamic(),
    )  # fmt: skip


def flux_schnell() -> DiffusionPipeline:
    return flux(schnell=True)


def flux2_klein(*, distilled: bool = False) -> DiffusionPipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=8, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=transformer, vae=vae, text_encoder=_qwen3(layers=28, hidden=16), tokenizer=qwen_tokenizer(),
        scheduler=_dynamic(), is_distilled=distilled,
    )  # fmt: skip


def flux2_klein_distilled() -> DiffusionPipeline:
    return flux2_klein(distilled=True)


def qwen_image() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True])
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 400, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return QwenImagePipeline(
        transformer=transformer, vae=vae, text_encoder=encoder, tokenizer=qwen_tokenizer(),
        scheduler=_dynamic(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
    )  # fmt: skip


def z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        transformer=transformer, vae=_vae(), text_encoder=_qwen3(layers=2, hidden=16), tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip


def sana() -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=16, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )  # fmt: skip
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    return SanaPipeline(
        transformer=transformer, vae=vae, text_encoder=encoder, tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def wan(*, dense: bool = False, boundary: float | None = None) -> DiffusionPipeline:
    """Of 2.1; `dense`: of 2.2 with one transformer, whose autoencoder has patches of its own; `boundary`: of 2.2 with two."""
    channels = 48 if dense else 16
    transformer, transformer_2 = (
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels, text_dim=16,
            freq_dim=64, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
        for _ in range(2)
    )  # fmt: skip
    more = {
        "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
        "latents_mean": torch.randn(48).tolist(), "latents_std": torch.rand(48).add(0.5).tolist(), "decoder_base_dim": 8,
    }  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **(more if dense else {})
    )
    tokenizer = t5_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    return WanPipeline(
        transformer=transformer, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), expand_timesteps=dense,
        transformer_2=None if boundary is None else transformer_2, boundary_ratio=boundary,
    )  # fmt: skip


def wan_dense() -> DiffusionPipeline:
    return wan(dense=True)


def wan_pair() -> DiffusionPipeline:
    """A14B: two transformers take turns."""
    return wan(boundary=0.875)


def aura_flow() -> DiffusionPipeline:
    """Whose family is in `elsewhere`, a package of its own."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=16, out_channels=16, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32,
        pos_embed_max_size=256,
    )  # fmt: skip
    tokenizer = t5_tokenizer()
    return AuraFlowPipeline(
        transformer=transformer, vae=_vae(), text_encoder=build_t5(len(tokenizer)), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


PIPELINES = (
    stable_diffusion_3,
    flux,
    flux_schnell,
    flux2_klein,
    flux2_klein_distilled,
    qwen_image,
    z_image,
    sana,
    wan,
    wan_dense,
    wan_pair,
    aura_flow,
)


def _qwen3(layers: int, hidden: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=400, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    vae = build_vae()
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return vae


def _dynamic(**changes: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **changes)


def randomised(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Some layers begin at zero, so that a network would answer zero whatever it is told."""
    generator = torch.Generator().manual_seed(0)
    for network in filter(None, (pipeline.transformer, getattr(pipeline, "transformer_2", None))):
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 1.2 * parameter.shape[1] ** -0.5, generator=generator)
    return pipeline
