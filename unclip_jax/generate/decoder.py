"""Guided sampling of one stage at a time: prior, decoder, upsampler. Pure and jittable; train and sampling both stand on it.

Each function takes the model, its parameters, conditioning and options, and returns arrays. Guidance runs the conditional and the
unconditional half as one batch of 2B rows. The unconditional half has the empty caption (start and end tokens kept), and in the
decoder the learned null embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.embedding_space import EmbeddingSpace, denormalize
from unclip_jax.diffusion.guidance import Denoise, Guidance, check_threshold, guide, make_denoiser
from unclip_jax.diffusion.process import eps_from_x0, fold_in, standard_normal
from unclip_jax.diffusion.samplers import SAMPLERS, VARIANCES, ddim_invert, repaint
from unclip_jax.diffusion.schedule import Schedule, make_schedule, time_steps
from unclip_jax.models.clip import CLIP
from unclip_jax.models.layers import Dtype
from unclip_jax.models.prior_ar import ARPrior, Codec, cosine, dequantize, unproject
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.models.unet import Decoder, Upsampler
from unclip_jax.sharding import Mesh, compute_dtype, make_gather

MODELS = {"clip": CLIP, "prior_diffusion": DiffusionPrior, "prior_ar": ARPrior, "decoder": Decoder, "upsampler": Upsampler}


class TextConditioning(NamedTuple):
    """A batch of captions.

    As the frozen CLIP sees them: embed (B, D) raw, states (B, L, W), mask (B, L) bool. For networks with a text encoder of their own:
    tokens (B, L') int32, token_mask (B, L') bool, None where there is none.
    """

    embed: jax.Array
    states: jax.Array
    mask: jax.Array
    tokens: jax.Array | None = None
    token_mask: jax.Array | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How one stage is sampled.

    steps: what `schedule.time_steps` takes: a number, "10,10,3,2,2", "fast27", a tuple of time steps; sampler: one of `SAMPLERS`;
    eta: DDIM's; variance: DDPM's (`small`, `large`, `learned`, `analytic`); guidance_scale: 1 is the conditional model;
    guidance_schedule, guidance_interval, guidance_rescale: see `guidance.Guidance`; clip: bound on |x0| in the stage's own units, None
    for none; threshold: percentile of dynamic thresholding, None for plain clipping; candidates: samples a prior draws per caption, of
    which the one with the largest z_i.z_t is kept (the paper: 2).
    """

    steps: int | str | tuple[int, ...]
    sampler: str = "ddpm"
    eta: float = 0.0
    variance: str = "small"
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    clip: float | None = 1.0
    threshold: float | None = None
    candidates: int = 1


@dataclass(frozen=True)
class CodeSamplingOptions:
    """How the autoregressive prior is sampled.

    guidance_scale: 1 is the conditional model; temperature: divides the logits, 0 takes the likeliest code; top_k: draws among the k
    likeliest codes, None among all; dot_quantile: the dot-product token is drawn from the bins above this quantile of its distribution
    over the training data (the paper: 0.5); candidates: as in `SamplingOptions`.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    dot_quantile: float = 0.5
    candidates: int = 1


Options = SamplingOptions | CodeSamplingOptions


def options_from(config: dict, kind: str = "", **overrides: Any) -> Options:
    """Options of a stage's `sampling` settings, with overrides; `kind` is the part's.

    Raises:
      ValueError: on an unknown setting.
    """
    options = CodeSamplingOptions if kind == "prior_ar" else SamplingOptions
    unknown = set(config) | set(overrides)
    unknown -= set(options.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown sampling option {', '.join(sorted(unknown))}; known: {', '.join(options.__dataclass_fields__)}")
    chosen = {**config, **overrides}
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})


def check_options(options: Options, part_config: dict) -> None:
    """Raises ValueError where an option is out of range for the part, before anything is compiled."""
    if not np.isfinite(options.guidance_scale):
        raise ValueError(f"the guidance scale must be a finite number, got {options.guidance_scale}")
    if not 1 <= options.candidates:
        raise ValueError(f"candidates must be at least 1, got {options.candidates}")
    if isinstance(options, CodeSamplingOptions):
        if not 0 <= options.temperature < np.inf:
            raise ValueError(f"temperature must be 0 or a positive number, got {options.temperature}")
        if options.top_k is not None and not 1 <= options.top_k <= part_config["model"]["buckets"]:
            raise ValueError(f"top_k must be between 1 and {part_config['model']['buckets']}, got {options.top_k}")
        if not 0 <= options.dot_quantile < 1:
            raise ValueError(f"dot_quantile must be in [0, 1), got {options.dot_quantile}")
        return
    time_steps(part_schedule(part_config).num_steps, options.steps)
    if options.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {options.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if options.variance not in VARIANCES:
        raise ValueError(f"unknown variance {options.variance!r}; choose one of {', '.join(VARIANCES)}")
    if not 0 <= options.eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {options.eta}")
    _guidance(options).check()
    if options.clip is not None and not options.clip > 0:
        raise ValueError(f"clip must be positive or None, got {options.clip}")
    check_threshold(options.threshold, options.clip)


def is_guided(options: Options) -> bool:
    """Whether guidance costs its second half: not at the Python number 1, where it is the conditional model. A traced scale does."""
    return not (isinstance(options.guidance_scale, (int, float)) and options.guidance_scale == 1)


def build_model(part_config: dict, dtype: Dtype = jnp.float32, **hooks: Any) -> nn.Module:
    """The linen module a part's configuration describes. `hooks`: remat, scan, gather, and winograd of the U-Nets.

    Raises:
      ValueError: on an unknown kind; TypeError on an unknown model option.
    """
    kind = part_config["kind"]
    if kind not in MODELS:
        raise ValueError(f"unknown kind of network {kind!r}; known: {', '.join(MODELS)}")
    return MODELS[kind](**part_config["model"], dtype=dtype, **hooks)


def sampling_model(part_config: dict, mesh: Mesh) -> nn.Module:
    """The module to sample a part with on a mesh, in the mesh's compute dtype; on CPU the U-Nets convolve with fewer products."""
    on_cpu = mesh.devices.flat[0].platform == "cpu" and part_config["kind"] in ("decoder", "upsampler")
    return build_model(part_config, compute_dtype("auto", mesh), gather=make_gather(mesh), **({"winograd": True} if on_cpu else {}))


def part_schedule(part_config: dict) -> Schedule:
    """The noise schedule a part was trained with."""
    return make_schedule(part_config["diffusion"]["schedule"], part_config["diffusion"]["num_steps"])


def part_space(part_config: dict) -> EmbeddingSpace:
    """The embedding space a prior works in."""
    space = dict(part_config["embedding_space"])
    for key in ("mean", "std"):
        if space.get(key) is not None:
            space[key] = np.asarray(space[key], np.float32)
    return EmbeddingSpace(**space)


def encode_text(model: CLIP, params: Any, batch: Mapping[str, jax.Array]) -> TextConditioning:
    """What the frozen CLIP's text tower says of a batch's `clip_tokens` and `clip_token_mask`; `tokens` and `token_mask` pass through."""
    features = model.apply({"params": params}, batch["clip_tokens"], method="encode_text")
    return TextConditioning(features.embed, features.states, batch["clip_token_mask"], batch.get("tokens"), batch.get("token_mask"))


def text_inputs(model: DiffusionPrior | ARPrior | Decoder, text: TextConditioning) -> dict[str, jax.Array]:
    """Captions as the arguments of a network: its own tokens if it has a text encoder, CLIP's states if not; z_t in both cases."""
    if model.text is None:
        return {"text_embed": text.embed, "text_states": text.states, "text_mask": text.mask}
    return {"text_embed": text.embed, "tokens": text.tokens, "token_mask": text.token_mask}


def select_text(keep: jax.Array, text: TextConditioning, empty: TextConditioning) -> TextConditioning:
    """The caption's conditioning where keep (B,) is True, the empty caption's (1 row) elsewhere."""
    pick = lambda a, b: jnp.where(keep.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, text, empty)


def _with_empty(text: TextConditioning, empty: TextConditioning) -> TextConditioning:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.broadcast_to(b, a.shape)]), text, empty)


def _twice(tree: Any, guided: bool) -> Any:
    # Guidance's two halves in one batch, where there is guidance.
    return jax.tree.map(lambda a: jnp.concatenate([a, a]), tree) if guided else tree


def _guidance(options: SamplingOptions) -> Guidance:
    return Guidance(options.guidance_scale, options.guidance_schedule, options.guidance_interval, options.guidance_rescale)


def _denoiser(network: Callable[[jax.Array, jax.Array], jax.Array], config: dict, options: SamplingOptions, guided: bool) -> Denoise:
    return make_denoiser(
        network,
        part_schedule(config),
        prediction=config["diffusion"]["prediction"],
        guidance=_guidance(options) if guided else None,
        clip=options.clip,
        threshold=options.threshold,
    )


def _sample(denoise: Denoise, x: jax.Array, config: dict, rng: jax.Array, options: SamplingOptions) -> jax.Array:
    schedule = part_schedule(config)
    steps = time_steps(schedule.num_steps, options.steps)
    if options.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {options.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    settings = {}
    if options.sampler == "ddpm":
        settings = {"variance": options.variance, "x0_error": config.get("x0_error")}
    elif options.sampler == "ddim":
        settings = {"eta": options.eta}
    return SAMPLERS[options.sampler](denoise, x, schedule, steps, rng, **settings)


def sample_prior(
    model: DiffusionPrior | ARPrior,
    params: Any,
    config: dict,
    text: TextConditioning,
    empty: TextConditioning,
    rng: jax.Array,
    options: Options,
    codec: Codec | None = None,
) -> jax.Array:
    """Draws image embeddings for captions with either prior (unCLIP section 2.2).

    Args:
      model, params, config: the prior and its part configuration.
      text: of the captions; empty: of the empty caption, one row.
      rng: one key, or (B,) keys, one per row.
      options: of the prior's kind; `clip` is in units of the diffusion prior's normalised space.
      codec: the autoregressive prior's.

    Returns:
      (B, D) float32 raw image embeddings.

    Raises:
      ValueError: when the autoregressive prior is given no codec.
    """
    if config["kind"] == "prior_ar" and codec is None:
        raise ValueError("the autoregressive prior needs the codec of the pca part")

    b, count = text.embed.shape[0], options.candidates
    many = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), text)
    if count > 1:
        rng = rng if rng.ndim == 0 else jax.vmap(lambda key: jax.random.split(key, count))(rng).reshape(-1)
    if config["kind"] == "prior_ar":
        z = _sample_codes(model, params, config, codec, many, empty, rng, options)
    else:
        z = _sample_embedding(model, params, config, text, empty, rng, options)
    best = jnp.argmax(cosine(z, many.embed).reshape(b, count), axis=1)
    return z.reshape(b, count, -1)[jnp.arange(b), best]


def _sample_embedding(
    model: DiffusionPrior,
    params: Any,
    config: dict,
    text: TextConditioning,
    empty: TextConditioning,
    rng: jax.Array,
    options: SamplingOptions,
) -> jax.Array:
    # Every candidate of a caption and every row's empty caption share one prefix: a caption's keys and values are computed once.
    guided, rows = is_guided(options), text.embed.shape[0] * options.candidates

    def prefix(text, repeats):
        once = model.apply({"params": params}, **text_inputs(model, text), method="prefill")
        return jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=0), once)

    caches, allowed = prefix(text, options.candidates)
    if guided:
        caches, allowed = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (caches, allowed), prefix(empty, rows))

    def network(z, t):
        return model.apply({"params": params}, z, t, caches, allowed, method="predict")

    x = standard_normal(fold_in(rng, 0), (rows, text.embed.shape[1]))
    return denormalize(part_space(config), _sample(_denoiser(network, config, options, guided), x, config, fold_in(rng, 1), options))


def _sample_codes(
    model: ARPrior,
    params: Any,
    config: dict,
    codec: Codec,
    text: TextConditioning,
    empty: TextConditioning,
    rng: jax.Array,
    options: CodeSamplingOptions,
) -> jax.Array:
    # One code after the other with cached keys and values; guidance runs both halves in one batch and mixes their logits.
    b, guided = text.embed.shape[0], is_guided(options)
    both = _with_empty(text, empty) if guided else text
    keys = rng if rng.ndim else jax.random.split(rng, b)
    lowest = int(np.floor(options.dot_quantile * model.dot_bins))
    dot = jax.vmap(lambda key: jax.random.randint(key, (), lowest, model.dot_bins))(fold_in(keys, 0))

    def pick(logits, n):
        if guided:
            logits = guide(logits[:b], logits[b:], options.guidance_scale)
        if options.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if options.top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, options.top_k)[0][:, -1:], -jnp.inf, logits)
        draw = jax.vmap(jax.random.categorical)(fold_in(fold_in(keys, 1), n), logits / options.temperature)
        return draw.astype(jnp.int32)

    inputs = text_inputs(model, both)
    z_text = inputs.pop("text_embed")
    states, mask = model.apply({"params": params}, **inputs, method="encode_text")
    dots = _twice(dot, guided)
    logits, caches = model.apply({"params": params}, dots, text_embed=z_text, text_states=states, text_mask=mask, method="prefill")
    first = pick(logits, 0)

    def body(carry, n):
        code, caches = carry
        logits, caches = model.apply({"params": params}, _twice(code, guided), n, caches, text_mask=mask, method="extend")
        code = pick(logits, n + 1)
        return (code, caches), code

    _, rest = jax.lax.scan(body, (first, caches), jnp.arange(model.codes - 1))
    codes = jnp.concatenate([first[:, None], rest.T], axis=1)
    return unproject(codec, dequantize(codec, codes, model.buckets))


def decoder_denoiser(
    model: Decoder,
    params: Any,
    config: dict,
    z_image: jax.Array | None,
    text: TextConditioning,
    empty: TextConditioning,
    options: SamplingOptions,
    known_image: jax.Array | None = None,
    known: jax.Array | None = None,
) -> Denoise:
    """The decoder as a denoiser of (B, H, W, 3), conditioned on raw z_image (B, D) (None: the learned null embedding) and captions, guided
    by options.guidance_scale; with known_image (B, H, W, 3) and known (B, H, W, 1), of which it then says exactly what is known."""
    b = text.embed.shape[0]
    guided = is_guided(options)
    both = _with_empty(text, empty) if guided else text
    z = jnp.zeros_like(both.embed) if z_image is None else _twice(z_image, guided)
    drop = jnp.full(z.shape[0], True) if z_image is None else jnp.arange(z.shape[0]) >= b
    inputs = {"image_embed": z, "drop_image": drop, **text_inputs(model, both)}
    if known is not None:
        inputs |= _twice({"known_image": known_image, "known": known}, guided)
    size = config["model"]["unet"]["image_size"]
    nothing = jnp.zeros((z.shape[0], size, size, 3)), jnp.zeros(z.shape[0])
    _, fixed = model.apply({"params": params}, *nothing, **inputs, mutable=["fixed"])  # its U-Net is not computed: nothing of it is used

    def network(x, t):
        return model.apply({"params": params, **fixed}, x, t, **inputs)

    denoise = _denoiser(network, config, options, guided)
    if known is None:
        return denoise
    table = np.asarray(part_schedule(config).alphas_cumprod)

    def with_known(x_t, t):
        said = denoise(x_t, t)
        x0 = jnp.where(known, known_image, said.x0)
        return said._replace(x0=x0, eps=eps_from_x0(x0, x_t, jnp.asarray(table, x_t.dtype)[t]))

    return with_known


def sample_decoder(
    model: Decoder,
    params: Any,
    config: dict,
    z_image: jax.Array | None,
    text: TextConditioning,
    empty: TextConditioning,
    rng: jax.Array,
    options: SamplingOptions,
    x_T: jax.Array | None = None,
    known_image: jax.Array | None = None,
    known: jax.Array | None = None,
) -> jax.Array:
    """Draws images for embeddings (unCLIP section 2.1), or their unknown part with a decoder trained to inpaint.

    Args:
      z_image: (B, D) raw image embeddings; None: the null embedding, so that the caption alone says what to draw.
      text, empty: as in `sample_prior`.
      x_T: (B, H, W, 3) the noise to start from; drawn when None.
      known_image: (B, H, W, 3) in [-1, 1], known: (B, H, W, 1) bool, for a decoder that inpaints: what is kept, and where.

    Returns:
      (B, H, W, 3) float32 in [-1, 1], H = W = the decoder's image size; equal to `known_image` where known.

    Raises:
      ValueError: when a decoder that inpaints is not told what is known, or another one is.
    """
    if model.inpaint != (known is not None):
        raise ValueError("a decoder that inpaints needs the known part of the image, and another one cannot use it")
    denoise = decoder_denoiser(model, params, config, z_image, text, empty, options, known_image, known)
    size = config["model"]["unet"]["image_size"]
    x = standard_normal(fold_in(rng, 0), (text.embed.shape[0], size, size, 3)) if x_T is None else x_T
    return jnp.clip(_sample(denoise, x, config, fold_in(rng, 1), options), -1, 1)


def invert_decoder(
    model: Decoder,
    params: Any,
    config: dict,
    image: jax.Array,
    z_image: jax.Array,
    text: TextConditioning,
    empty: TextConditioning,
    options: SamplingOptions,
) -> jax.Array:
    """The noise x_T from which DDIM with the same options at eta 0 draws the image again (unCLIP section 3).

    Args:
      image: (B, H, W, 3) in [-1, 1], of the decoder's size.
      z_image: (B, D) its raw embedding.
      text, empty, options: as in `sample_decoder`; x0 is never clipped here, so `options.clip` must be None.

    Returns:
      (B, H, W, 3) float32.

    Raises:
      ValueError: when the options clip.
    """
    if options.clip is not None:
        raise ValueError("DDIM inversion needs clip None: what clipping cuts off cannot be found again")
    schedule = part_schedule(config)
    denoise = decoder_denoiser(model, params, config, z_image, text, empty, options)
    return ddim_invert(denoise, image, schedule, time_steps(schedule.num_steps, options.steps))


def inpaint_decoder(
    model: Decoder,
    params: Any,
    config: dict,
    image: jax.Array,
    known: jax.Array,
    z_image: jax.Array,
    text: TextConditioning,
    empty: TextConditioning,
    rng: jax.Array,
    options: SamplingOptions,
    resamples: int,
) -> jax.Array:
    """Draws the unknown part of images with any decoder, without training for it (`samplers.repaint`).

    Args:
      image: (B, H, W, 3) in [-1, 1], of the decoder's size.
      known: (B, H, W, 1) bool, True where the image is kept.
      z_image, text, empty, rng: as in `sample_decoder`.
      options: steps, guidance and clip; the sampler is ancestral with the posterior's variance.
      resamples: passes per step, at least 1.

    Returns:
      (B, H, W, 3) float32 in [-1, 1]; equal to `image` where known.
    """
    schedule = part_schedule(config)
    denoise = decoder_denoiser(model, params, config, z_image, text, empty, options)
    x = standard_normal(fold_in(rng, 0), image.shape)
    steps = time_steps(schedule.num_steps, options.steps)
    out = repaint(denoise, x, schedule, steps, fold_in(rng, 1), image=image, known=known, resamples=resamples)
    return jnp.clip(out, -1, 1)


def sample_upsampler(
    model: Upsampler,
    params: Any,
    config: dict,
    low_res: jax.Array,
    rng: jax.Array,
    options: SamplingOptions,
    last: tuple[Upsampler, Any] | None = None,
) -> jax.Array:
    """Enlarges images (B, h, w, 3) in [-1, 1] by the upsampler's factor; no guidance (unCLIP section 2.1).

    Args:
      last: model and parameters that make the last step, where there are others for it (Karlo).

    Returns:
      (B, H, W, 3) float32 in [-1, 1].
    """
    factor = config["factor"]
    b, h, w, c = low_res.shape
    size = h * factor, w * factor
    enlarged = model.enlarge(low_res, size)

    def network(x, t):
        return model.apply({"params": params}, x, t, low_res=enlarged)

    def network_with_last(x, t):
        final = time_steps(part_schedule(config).num_steps, options.steps)[-1]
        other = lambda x, t: last[0].apply({"params": last[1]}, x, t, low_res=last[0].enlarge(low_res, size))  # noqa: E731
        return jax.lax.cond(t[0] == final, other, network, x, t)

    x = standard_normal(fold_in(rng, 0), (b, *size, c))
    denoise = _denoiser(network if last is None else network_with_last, config, options, False)
    return jnp.clip(_sample(denoise, x, config, fold_in(rng, 1), options), -1, 1)
