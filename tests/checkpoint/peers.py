"""The peers' networks at random weights and small size, saved as their libraries save them."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch

from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.generate.networks import build_model

DIM, LENGTH = 16, 10  # Karlo's text states are of the embedding's size, as ViT-L/14's are
CROSS = "SimpleCrossAttn"


def randomize(module, seed=0):
    """Every parameter and buffer of a torch module at random, those among them that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            scale = 0.2 if value.ndim < 2 else (value[0].numel()) ** -0.5
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name] = center + scale * torch.randn(value.shape, generator=generator)
    if "clip_std" in state:
        state["clip_std"] = state["clip_std"].abs() + 0.5
    module.load_state_dict(state)
    return module.eval()


def write_tokenizer(folder, vocab_size=600, length=LENGTH):
    """A transformers CLIP tokenizer of CLIP's first merges; the padding is id 0, as Karlo's."""
    from transformers import CLIPTokenizer

    ClipTokenizer(length, vocab_size).save_folder(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token="!")


def clip_configs(activation="quick_gelu", vocab_size=600, mlp=64, width=DIM):
    """A text and a vision configuration."""
    from transformers import CLIPTextConfig, CLIPVisionConfig

    shared = dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=DIM,
    )
    ids = dict(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=0)
    text = CLIPTextConfig(
        vocab_size=vocab_size, max_position_embeddings=LENGTH, hidden_act=activation, **ids, **shared
    )
    return text, CLIPVisionConfig(image_size=16, patch_size=8, hidden_act=activation, **shared)


def karlo(folder, pipeline="UnCLIPPipeline"):
    """A tiny Karlo in its library's pipeline, saved into the folder; returns the pipeline."""
    warnings.filterwarnings("ignore")
    from diffusers import (
        PriorTransformer,
        UnCLIPImageVariationPipeline,
        UnCLIPPipeline,
        UnCLIPScheduler,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text, image = clip_configs()
    small = dict(layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=32)
    decoder = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        cross_attention_dim=20,
        class_embed_type="identity",
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", f"{CROSS}DownBlock2D"),
        mid_block_type=f"UNetMidBlock2D{CROSS}",
        up_block_types=(f"{CROSS}UpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        **small,
    )

    def super_res():
        plain = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
        blocks = dict(zip(("down_block_types", "up_block_types"), plain))
        return UNet2DModel(
            sample_size=32, in_channels=6, out_channels=3, add_attention=False, **blocks, **small
        )

    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=4, clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=20
    )
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    )
    parts = {
        "decoder": randomize(decoder, 1),
        "text_encoder": randomize(CLIPTextModelWithProjection(text), 2),
        "tokenizer": write_tokenizer(folder / "tokenizer"),
        "text_proj": randomize(text_proj, 3),
        "super_res_first": randomize(super_res(), 4),
        "super_res_last": randomize(super_res(), 5),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    if pipeline == "UnCLIPPipeline":
        scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        )
        made = UnCLIPPipeline(prior=randomize(prior, 6), prior_scheduler=scheduler, **parts)
    else:
        encoder = randomize(CLIPVisionModelWithProjection(image), 7)
        sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        statistics = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.5, 0.7])
        extractor = CLIPImageProcessor(**sizes, **statistics)
        made = UnCLIPImageVariationPipeline(image_encoder=encoder, feature_extractor=extractor, **parts)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def load_karlo(folder):
    """The library's pipeline of a folder's parts, each loaded by its own class: new versions cannot load this
    pipeline whole, not even one that they saved."""
    from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    classes = {
        **{
            "prior": PriorTransformer,
            "decoder": UNet2DConditionModel,
            "text_proj": UnCLIPTextProjModel,
            "tokenizer": CLIPTokenizer,
        },
        **{f"super_res_{which}": UNet2DModel for which in ("first", "last")},
        **{f"{part}_scheduler": UnCLIPScheduler for part in ("prior", "decoder", "super_res")},
        "text_encoder": CLIPTextModelWithProjection,
    }
    made = UnCLIPPipeline(**{name: cls.from_pretrained(folder / name) for name, cls in classes.items()})
    made.set_progress_bar_config(disable=True)
    return made


SCHEDULERS = ("prior", "decoder", "super_res")


def exact(scheduler):
    """The scheduler with its tables in float64: in float32 its 1 - abar at t = 0 is off by 5e-4, and so is
    its last step."""
    scheduler.alphas = 1 - scheduler.betas.double()
    scheduler.betas, scheduler.alphas_cumprod = scheduler.betas.double(), torch.cumprod(scheduler.alphas, 0)
    return scheduler


def exact_pipeline(pipeline):
    """The pipeline with all its schedulers `exact`."""
    for part in SCHEDULERS:
        if hasattr(pipeline, f"{part}_scheduler"):
            exact(getattr(pipeline, f"{part}_scheduler"))
    return pipeline


def nchw(a):
    """NumPy (B, H, W, C) -> torch (B, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1)))


def share_noise(monkeypatch, dim, sides=(8, 32), rows=2, seed=0):
    """The same noise in both libraries at every step: of embeddings (rows, dim), and of images of these
    sides; returns the latents that the pipelines start from."""
    import diffusers.schedulers.scheduling_unclip as theirs

    rng = np.random.default_rng(seed)
    noises = [
        np.float32(rng.normal(size=shape))
        for shape in ((rows, dim), *((rows, side, side, 3) for side in sides))
    ]
    ours = {noise.shape: jnp.asarray(noise) for noise in noises}
    torches = [torch.from_numpy(noises[0]), *map(nchw, noises[1:])]
    by_shape = {tuple(t.shape): t for t in torches}
    monkeypatch.setattr(theirs, "randn_tensor", lambda shape, **kwargs: by_shape[tuple(shape)])

    def draw(key, shape, dtype=jnp.float32):
        return ours[tuple(shape)]

    for name, module in list(sys.modules.items()):  # whoever has imported the function
        if name.startswith("unclip_jax.") and hasattr(module, "standard_normal"):
            monkeypatch.setattr(module, "standard_normal", draw)
    return dict(zip((f"{part}_latents" for part in SCHEDULERS), torches))


def run_part(bundle, name, *args, method=None, **kwargs):
    """The network of a bundle's part, applied to inputs."""
    part = bundle.parts[name]
    model = build_model(part.config)
    return jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k, method=method))(
        part.params, args, kwargs
    )


def close(ours, theirs, atol=1e-5):
    """Asserts that arrays are equal to rounding, and that they are not zero everywhere."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert theirs.std() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=atol * max(1.0, np.abs(theirs).max()), rtol=0)


def inception_state(seed=0):
    """Tensors of FID's Inception by the names of `pt_inception-2015-12-05`: random filters that keep the size
    of the signal, and statistics that normalise. The gains are 1, as in the published file."""
    from unclip_jax.checkpoint.convert import array, shapes_of
    from unclip_jax.checkpoint.providers.inception import CONVOLUTIONS
    from unclip_jax.models.inception import SIZE, Inception

    rng = np.random.default_rng(seed)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
    shapes, state = shapes_of(Inception().init, array(1, SIZE, SIZE, 3)), {}
    for ours, theirs in CONVOLUTIONS.items():
        leaf = shapes
        for name in ours.split("/"):
            leaf = leaf[name]
        height, width, channels, filters = leaf["kernel"].shape
        scale = (2 / (height * width * channels)) ** 0.5
        state[f"{theirs}.conv.weight"] = scale * normal(filters, channels, height, width)
        state[f"{theirs}.bn.weight"] = torch.ones(filters)
        state[f"{theirs}.bn.bias"] = 0.2 * normal(filters)
        state[f"{theirs}.bn.running_mean"] = 0.2 * normal(filters)
        state[f"{theirs}.bn.running_var"] = torch.from_numpy(
            rng.uniform(0.5, 1.5, filters).astype(np.float32)
        )
        state[f"{theirs}.bn.num_batches_tracked"] = torch.tensor(0)
    return state | {"fc.weight": 0.05 * normal(1008, 2048), "fc.bias": normal(1008)}


# ------------------------------------------------------------------------------------------- Stable Diffusion
SCALED_LINEAR = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def latent_parts(folder, *, version=1, in_channels=4, width=16, **unet):
    """The tiny networks and the tokenizer that the pipelines of Stable Diffusion's family share; `unet` are
    more settings of the U-Net."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    vocab_size = 600
    text, _ = clip_configs("quick_gelu" if version == 1 else "gelu", vocab_size, width=width)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8 if version == 1 else (2, 4),
        use_linear_projection=version == 2,
        **unet,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.18215,
    )
    pad = 0 if version == 2 else vocab_size - 1
    ClipTokenizer(LENGTH, vocab_size, pad).save_folder(folder / "tokenizer")
    pad_token = "!" if version == 2 else "<|endoftext|>"
    tokenizer = CLIPTokenizer.from_pretrained(
        folder / "tokenizer", model_max_length=LENGTH, pad_token=pad_token
    )
    return {
        "unet": randomize(unet, 1),
        "vae": randomize(vae, 2),
        "text_encoder": randomize(CLIPTextModel(text), 3),
        "tokenizer": tokenizer,
    }


def pndm(prediction):
    """Stable Diffusion's scheduler."""
    from diffusers import PNDMScheduler

    settings = dict(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return PNDMScheduler(**SCALED_LINEAR, **settings, prediction_type=prediction)


def saved(pipeline, folder):
    """The pipeline, quiet, saved into the folder."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def stable_diffusion(folder, *, version=1, prediction="epsilon", in_channels=4, scheduler=None, width=16):
    """A tiny Stable Diffusion 1.x or 2.x in its library's pipeline, saved into the folder; returns the
    pipeline."""
    warnings.filterwarnings("ignore")
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInpaintPipeline
    made = pipeline(
        **latent_parts(folder, version=version, in_channels=in_channels, width=width),
        scheduler=scheduler or pndm(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(made, folder)


def stable_unclip(folder, *, draws=True):
    """A tiny StableUnCLIP in its library's pipeline, saved into the folder; returns the pipeline.

    draws: with a prior, to draw from captions; or with an image encoder, to vary images.
    """
    warnings.filterwarnings("ignore")
    import diffusers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    projected = dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * DIM)
    normalizer = randomize(StableUnCLIPImageNormalizer(DIM), 4)
    with torch.no_grad():
        normalizer.std.copy_(normalizer.std.abs() + 0.5)
    parts = latent_parts(folder, version=2, **projected) | {
        "scheduler": diffusers.DDIMScheduler(
            **SCALED_LINEAR,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        ),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    text, image = clip_configs()
    if not draws:
        sizes = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        statistics = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.5, 0.7])
        encoder = randomize(CLIPVisionModelWithProjection(image), 7)
        extractor = CLIPImageProcessor(**sizes, **statistics)
        return saved(
            diffusers.StableUnCLIPImg2ImgPipeline(
                image_encoder=encoder, feature_extractor=extractor, **parts
            ),
            folder,
        )
    # Karlo's scheduler as a DDPM one. The pipeline does not tell Karlo's own where a step leads.
    settings = dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    settings["beta_schedule"] = "squaredcos_cap_v2"
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    )
    made = diffusers.StableUnCLIPPipeline(
        prior=randomize(prior, 6),
        prior_tokenizer=write_tokenizer(folder / "prior_tokenizer"),
        prior_text_encoder=randomize(CLIPTextModelWithProjection(text), 5),
        prior_scheduler=diffusers.DDPMScheduler(**settings),
        **parts,
    )
    return saved(made, folder)
