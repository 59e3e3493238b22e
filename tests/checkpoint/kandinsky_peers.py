"""A tiny Kandinsky 2.2 in its library's pipelines, saved as published: a folder for each pipeline."""

import warnings

from tests.checkpoint.peers import CROSS, DIM, LENGTH, clip_configs, randomize
from unclip_jax.data.tokenizer import ClipTokenizer

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")


def unet(seed, in_channels=4, **changes):
    """The decoder's U-Net."""
    from diffusers import UNet2DConditionModel

    settings = dict(
        sample_size=8,
        in_channels=in_channels,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        cross_attention_dim=20,
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", f"{CROSS}DownBlock2D"),
        mid_block_type=f"UNetMidBlock2D{CROSS}",
        up_block_types=(f"{CROSS}UpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="image",
        encoder_hid_dim=DIM,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    return randomize(UNet2DConditionModel(**settings | changes), seed)


def movq(seed=2):
    """The autoencoder with spatial norms, whose pictures keep within [-1, 1] for the most part."""
    from diffusers import VQModel

    made = randomize(
        VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=12,
            vq_embed_dim=4,
            norm_type="spatial",
        ),
        seed,
    )
    for value in made.decoder.conv_out.parameters():
        value.data *= 0.1
    return made


def prior_pipeline(folder):
    """The prior's pipeline, whose tokenizer is written into the folder."""
    from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    text, image = clip_configs("gelu")
    ClipTokenizer(LENGTH, 600).save_folder(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=LENGTH, pad_token="!")
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    )
    sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return KandinskyV22PriorPipeline(
        prior=randomize(prior, 6),
        image_encoder=randomize(CLIPVisionModelWithProjection(image), 7),
        text_encoder=randomize(CLIPTextModelWithProjection(text), 3),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        image_processor=CLIPImageProcessor(**sizes, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.5, 0.7]),
    )


def kandinsky(folder):
    """All three pipelines, saved into folders of this one; returns them by role."""
    warnings.filterwarnings("ignore")
    from diffusers import DDPMScheduler, KandinskyV22InpaintPipeline, KandinskyV22Pipeline

    made = {"prior": prior_pipeline(folder / "kandinsky-2-2-prior")}
    shared = movq()
    made["decoder"] = KandinskyV22Pipeline(
        unet=unet(1), scheduler=DDPMScheduler(**SCHEDULE, clip_sample=False), movq=shared
    )
    made["inpaint"] = KandinskyV22InpaintPipeline(
        unet=unet(4, 9), scheduler=DDPMScheduler(**SCHEDULE, clip_sample=False), movq=shared
    )
    for role, pipeline in made.items():
        pipeline.set_progress_bar_config(disable=True)
        name = {"prior": "prior", "decoder": "decoder", "inpaint": "decoder-inpaint"}[role]
        pipeline.save_pretrained(folder / f"kandinsky-2-2-{name}")
    return made
