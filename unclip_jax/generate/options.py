"""Sampling options of a stage: typed, read from a part's settings, and checked before compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclip_jax.diffusion.guidance import Guidance, check_threshold
from unclip_jax.diffusion.samplers import SAMPLERS, VARIANCES, transitions
from unclip_jax.diffusion.schedule import continuous_steps, time_steps
from unclip_jax.diffusion.spacing import Moves, spaced
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import part_schedule


@dataclass(frozen=True)
class SamplingOptions:
    """How a diffusion stage is sampled.

    steps: an argument of `schedule.time_steps`: a number, "10,10,3,2,2", "fast27", or a tuple of time steps.
      A number, where the spacing is not `even`.
    spacing, offset, last: how the steps are spread, and where the last one leads (`diffusion.spacing`).
    sampler: one of `SAMPLERS`.
    eta: DDIM's. Other samplers take only 0.
    variance: DDPM's (`small`, `large`, `learned`, `analytic`).
    guidance_scale: 1 is the conditional model. Inside a program it may be traced, with one scale per row.
    guidance_schedule, guidance_interval, guidance_rescale: see `guidance.Guidance`.
    clip: bound on |x0| in the stage's own units; None for no bound.
    threshold: percentile of dynamic thresholding; None for plain clipping.
    threshold_most: the largest |x0| that counts in dynamic thresholding; None for no limit.
    clip_guidance: scale of CLIP guidance for a network that draws pixels from captions; 0 for none
      (`generate.clip_guidance`).
    candidates: samples that a prior draws per caption. It keeps the one with the largest z_i.z_t (the paper:
    2).
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
    threshold_most: float | None = None
    clip_guidance: float = 0.0
    candidates: int = 1
    spacing: str = "even"
    offset: int = 0
    last: str = "clean"

    def moves(self, num_steps: int, continuous: bool = False) -> Moves:
        """The moves of the sampler; `num_steps` is T. In continuous time, a number of steps that are spread
        evenly need not be whole.

        Raises:
          ValueError: as `time_steps` and `spaced`.
        """
        if self.spacing == "even":
            if continuous and type(self.steps) is int:
                return transitions(continuous_steps(num_steps, self.steps))
            return transitions(time_steps(num_steps, self.steps))
        settings = {"sampler": self.sampler, "offset": self.offset, "last": self.last}
        return spaced(num_steps, self.steps, self.spacing, **settings)

    @property
    def guidance(self) -> Guidance:
        """The guidance that these options describe."""
        return Guidance(
            self.guidance_scale, self.guidance_schedule, self.guidance_interval, self.guidance_rescale
        )


@dataclass(frozen=True)
class PixelSamplingOptions(SamplingOptions):
    """How a network that draws pixels from captions is sampled.

    noise_scale: what the noise that sampling starts from is multiplied with (GLIDE's upsampler: 0.997).
    augmentation: the level of the noise on the small image that Imagen's upsamplers see, in [0, 1]
      (`diffusion.augmentation`).
    """

    noise_scale: float = 1.0
    augmentation: float = 0.2


@dataclass(frozen=True)
class LatentSamplingOptions(SamplingOptions):
    """How a latent U-Net is sampled, and its latents decoded.

    negative: what the picture should not show; it takes the place of the empty caption.
    height, width: of the picture in pixels, multiples of the autoencoder's factor; None for the size of the
      training images.
    tile: side in pixels of the tiles that are decoded one at a time (`latents.decode_tiled`); None decodes
      the whole picture at once.
    filter: whether the bundle's safety checker, if it has one, blackens the pictures that it flags.
    noise_level: of the noise on z_i, for a U-Net that sees one (`generate.image_embeds`); from 0 (least).
    """

    clip: float | None = None
    filter: bool = True
    negative: str = ""
    height: int | None = None
    width: int | None = None
    tile: int | None = None
    noise_level: int = 0


RETRIEVAL_MODES = ("text", "text+neighbours", "neighbours", "popular")


@dataclass(frozen=True)
class RetrievalSamplingOptions(LatentSamplingOptions):
    """How a latent U-Net is sampled that sees neighbours.

    mode: what it sees: `text`, the caption's embedding alone; `text+neighbours`, that and the caption's
      nearest rows of an index; `neighbours`, these rows alone; `popular`, the neighbours of a row that served
      often in training, whatever the caption.
    neighbours: how many tokens it sees, the text among them; None for as many as in training. The mode `text`
      has one.
    popular: the share of an index's rows that `popular` draws from, the most used first, in (0, 1].
    weighted: whether `popular` draws rows as often as they served; otherwise all of them equally often.
    """

    mode: str = "text+neighbours"
    neighbours: int | None = None
    popular: float = 0.01
    weighted: bool = False


@dataclass(frozen=True)
class TokenSamplingOptions:
    """How codes are drawn one after another.

    guidance_scale: 1 is the conditional model.
    temperature: divides the logits; 0 takes the most probable code.
    top_k: draws from the k most probable codes; None draws from all.
    top_p: draws from the most probable codes that together have this probability, in (0, 1]; None draws from
      all.
    candidates: drawn for each caption, of which the best is kept; 1 where nothing ranks them.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    candidates: int = 1


@dataclass(frozen=True)
class CodeSamplingOptions(TokenSamplingOptions):
    """How the autoregressive prior is sampled.

    dot_quantile: the dot-product token is drawn from the bins above this quantile of its distribution over
      the training data (the paper: 0.5).
    """

    dot_quantile: float = 0.5


Options = SamplingOptions | TokenSamplingOptions

# The kinds of parts that are sampled, and the type of their options.
OPTIONS = {
    "prior_diffusion": SamplingOptions,
    "prior_laion": SamplingOptions,
    "prior_ar": CodeSamplingOptions,
    "decoder": SamplingOptions,
    "upsampler": SamplingOptions,
    "latent": LatentSamplingOptions,
    "glide": PixelSamplingOptions,
    "imagen": PixelSamplingOptions,
    "imagen_upsampler": PixelSamplingOptions,
    "kandinsky": LatentSamplingOptions,
    "pixelsnail": TokenSamplingOptions,
    "dalle": TokenSamplingOptions,
    "dalle_mini": TokenSamplingOptions,
    "retrieval": RetrievalSamplingOptions,
}


MAX_CANDIDATES = 1024
LARGEST = float(np.finfo(np.float32).max)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not (_is_whole(value) or isinstance(value, (float, np.floating))):
        return False
    return abs(value) <= LARGEST  # False for NaN


def _is_steps(value: Any) -> bool:
    return (
        _is_whole(value) or isinstance(value, str) or isinstance(value, tuple) and all(map(_is_whole, value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# What values each option takes: in words, and as a test.
_NUMBER, _TEXT = ("a finite number", _is_number), ("text", _is_text)
_FLAG = ("true or false", lambda value: isinstance(value, (bool, np.bool_)))
_NUMBER_OR_NONE = ("a finite number or None", _or_none(_is_number))
_WHOLE_OR_NONE = ("a whole number or None", _or_none(_is_whole))
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "steps": ("a whole number, text or a list of whole numbers", _is_steps),
    "sampler": _TEXT,
    "eta": _NUMBER,
    "variance": _TEXT,
    "guidance_scale": _NUMBER,
    "guidance_schedule": _TEXT,
    "guidance_interval": (
        "two finite numbers",
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)),
    ),
    "guidance_rescale": _NUMBER,
    "clip": _NUMBER_OR_NONE,
    "threshold": _NUMBER_OR_NONE,
    "threshold_most": _NUMBER_OR_NONE,
    "candidates": ("a whole number", _is_whole),
    "temperature": _NUMBER,
    "top_k": _WHOLE_OR_NONE,
    "top_p": _NUMBER_OR_NONE,
    "dot_quantile": _NUMBER,
    "clip_guidance": _NUMBER,
    "noise_scale": _NUMBER,
    "augmentation": _NUMBER,
    "spacing": _TEXT,
    "offset": ("a whole number", _is_whole),
    "last": _TEXT,
    "negative": _TEXT,
    "filter": _FLAG,
    "height": _WHOLE_OR_NONE,
    "width": _WHOLE_OR_NONE,
    "tile": _WHOLE_OR_NONE,
    "noise_level": ("a whole number", _is_whole),
    "mode": _TEXT,
    "neighbours": _WHOLE_OR_NONE,
    "popular": _NUMBER,
    "weighted": _FLAG,
}


def options_from(settings: dict, kind: str = "decoder", **overrides: Any) -> Options:
    """The options in a stage's `sampling` settings, with overrides. `kind` is the part's kind.

    Raises:
      ValueError: on an unknown setting, a missing one, or a value of a wrong type.
    """
    options = OPTIONS[kind]
    unknown = (set(settings) | set(overrides)) - set(options.__dataclass_fields__)
    if unknown:
        known = ", ".join(options.__dataclass_fields__)
        raise InputError(f"unknown sampling option {', '.join(sorted(unknown))}; known: {known}")
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in {**settings, **overrides}.items()}
    if issubclass(options, SamplingOptions) and "steps" not in chosen:
        raise InputError("the sampling options have no steps; set steps")
    for name, value in chosen.items():
        words, takes = VALUES[name]
        if not takes(value):
            raise InputError(f"the sampling option {name} must be {words}, got {value!r}")
    return options(**chosen)


def check_options(options: Options, part_config: dict) -> None:
    """Raises ValueError where an option is out of range for the part. Call it before compilation."""
    if not np.isfinite(options.guidance_scale):
        raise InputError(f"the guidance scale must be a finite number, got {options.guidance_scale}")
    if not 1 <= options.candidates <= MAX_CANDIDATES:
        raise InputError(f"candidates must be between 1 and {MAX_CANDIDATES}, got {options.candidates}")
    kind = part_config.get("kind")
    if isinstance(options, TokenSamplingOptions):
        model = part_config["model"]
        _check_token_options(options, model.get("buckets", model.get("codes")))
        if kind == "pixelsnail":
            _check_grid_options(options, model)
        return
    if kind == "prior_laion" and not part_config["model"].get("null_embeds", True) and is_guided(options):
        raise InputError("this prior has no null embeddings, so it cannot be guided: set guidance_scale to 1")
    if kind == "upsampler" and options.guidance_scale != 1:
        raise InputError(
            f"an upsampler is not guided: guidance_scale must be 1, got {options.guidance_scale}"
        )
    if kind is not None and not kind.startswith("prior_") and options.candidates != 1:
        raise InputError(f"only a prior chooses among candidates: they must be 1, got {options.candidates}")
    if isinstance(options, LatentSamplingOptions):
        _check_noise_level(options.noise_level, part_config)
    if isinstance(options, RetrievalSamplingOptions):
        _check_retrieval_options(options)
    if options.sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {options.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    schedule = part_schedule(part_config)
    options.moves(schedule.num_steps, schedule.continuous is not None)
    if options.spacing == "even" and (options.offset or options.last != "clean"):
        raise InputError("offset and last belong to the other spacings: leave them out where spacing is even")
    if options.offset and options.spacing != "leading":
        raise InputError(f"an offset belongs to the spacing leading, not to {options.spacing}: leave it out")
    if options.sampler == "plms" and schedule.alphas_cumprod[-1] == 0:
        raise InputError("plms cannot start at a step without signal (zero_snr): choose another sampler")
    if options.variance not in VARIANCES:
        raise InputError(f"unknown variance {options.variance!r}; choose one of {', '.join(VARIANCES)}")
    if options.sampler == "ddpm":
        _check_variance(options.variance, part_config)
    if not 0 <= options.eta <= 1:
        raise InputError(f"eta must be in [0, 1], got {options.eta}")
    if options.eta and options.sampler != "ddim":
        raise InputError(f"eta={options.eta} is for the sampler ddim, not for {options.sampler}: set it to 0")
    options.guidance.check()
    if options.clip_guidance and (
        kind not in (None, "decoder", "glide", "imagen") or "factor" in part_config
    ):
        raise InputError(
            "clip_guidance is for networks that draw pixels from captions (decoder, glide, imagen): leave it "
            "out"
        )
    if options.clip_guidance and options.spacing != "even":
        raise InputError("clip_guidance needs the spacing even")
    if isinstance(options, PixelSamplingOptions) and not 0 < options.noise_scale <= 10:
        raise InputError(f"noise_scale must be in (0, 10], got {options.noise_scale}")
    if isinstance(options, PixelSamplingOptions) and not 0 <= options.augmentation <= 1:
        raise InputError(f"augmentation must be in [0, 1], got {options.augmentation}")
    if options.clip is not None and not options.clip > 0:
        raise InputError(f"clip must be positive or None, got {options.clip}")
    check_threshold(options.threshold, options.clip, options.threshold_most)


def _check_retrieval_options(options: RetrievalSamplingOptions) -> None:
    if options.mode not in RETRIEVAL_MODES:
        known = ", ".join(RETRIEVAL_MODES)
        raise InputError(f"unknown mode {options.mode!r} of retrieval; choose one of {known}")
    if options.neighbours is not None and not 1 <= options.neighbours <= MAX_CANDIDATES:
        raise InputError(f"neighbours must be between 1 and {MAX_CANDIDATES}, got {options.neighbours}")
    if options.mode == "text" and options.neighbours not in (None, 1):
        raise InputError(f"the mode text sees the text alone, so neighbours={options.neighbours} has no use")
    if not 0 < options.popular <= 1:
        raise InputError(f"popular is a share of the index's rows in (0, 1], got {options.popular}")
    if options.negative:
        raise InputError("retrieval is guided against no neighbours: it takes no negative caption")


def _check_variance(variance: str, part_config: dict) -> None:
    model = part_config.get("model", {})
    channels = model.get("latent_channels", 3)  # of a sample
    if variance == "learned" and model.get("unet", {}).get("out_channels") != 2 * channels:
        raise InputError("variance 'learned' needs a network that predicts it; use 'small' or 'large'")
    if variance == "analytic" and part_config.get("x0_error") is None:
        raise InputError("variance 'analytic' needs measured errors (x0_error), which this network lacks")


def _check_noise_level(level: int, part_config: dict) -> None:
    augmentation = part_config.get("augmentation")
    if augmentation is None:
        if level:
            raise InputError(f"noise_level={level} is for networks that see a noised embedding: leave it out")
    elif not 0 <= level < augmentation["num_steps"]:
        raise InputError(f"noise_level must be between 0 and {augmentation['num_steps'] - 1}, got {level}")


def _check_token_options(options: TokenSamplingOptions, size: int | None) -> None:
    # size: how many codes there are; None where the configuration of a run does not know it yet.
    if not 0 <= options.temperature < np.inf:
        raise InputError(f"temperature must be 0 or a positive number, got {options.temperature}")
    if options.top_k is not None and not 1 <= options.top_k <= (size or np.inf):
        raise InputError(f"top_k must be between 1 and {size}, got {options.top_k}")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InputError(f"top_p must be in (0, 1] or None, got {options.top_p}")
    if isinstance(options, CodeSamplingOptions) and not 0 <= options.dot_quantile < 1:
        raise InputError(f"dot_quantile must be in [0, 1), got {options.dot_quantile}")


def _check_grid_options(options: TokenSamplingOptions, model: dict) -> None:
    if options.candidates != 1:
        raise InputError(f"nothing ranks these codes: candidates must be 1, got {options.candidates}")
    if is_guided(options) and model.get("text_dim") is None:
        raise InputError("a prior without captions is not guided: set guidance_scale to 1")


def is_guided(options: Options) -> bool:
    """Whether sampling has to run the unconditional half.

    It does not where the scale is the Python number 1: guidance is then the conditional model. It does where
    the scale is traced.
    """
    return not (isinstance(options.guidance_scale, (int, float)) and options.guidance_scale == 1)
