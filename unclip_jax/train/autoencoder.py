"""The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1, appendix G), trained as published.

Two players move in turn in every step, each with its own Adam. The second sees the update of the first.

    generator       encoder, decoder and codebook
                    pixels: |x - y| + LPIPS(x, y), an image's distance added to each of its values. KL: the
                    sum over pixels and channels / B, plus `kl_weight` times the sum of the KL divergence / B.
                    The log variance of the published code is in no optimizer there, so it is 0, and left out
                    here. VQ: the mean, plus the quantiser's loss.
                    adversarial: -mean D(y), times the adaptive weight |grad pixels| / (|grad adversarial| +
                    1e-4), at most 1e4, times `discriminator.weight`. Both gradients are those of the
                    decoder's last kernel, over the global batch (Esser et al. 2021, equation 7)
    discriminator   patches, hinge: (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2

Before the step `discriminator.start` both adversarial terms are 0. Batch normalisation takes the statistics
of the global batch. Without `discriminator` the generator plays alone; without `perceptual_weight`, LPIPS is
not needed. A codebook of averages moves with the generator's objective (`models.quantiser`).

Every checkpoint measures `scale_factor`, 1 / the standard deviation of the latents of the first training
batch: diffusion sees latents times it. With `scale_latents` off it is 1, as for the published VQ.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.examples import picture_example
from unclip_jax.errors import InputError
from unclip_jax.models.autoencoder import KLAutoencoder, VQAutoencoder, kl_divergence, sample_moments
from unclip_jax.models.discriminator import PatchDiscriminator
from unclip_jax.models.lpips import SMALLEST
from unclip_jax.models.quantiser import usage
from unclip_jax.run import settings
from unclip_jax.run.batches import open_data
from unclip_jax.run.frozen import arrays, check_pictures, hashes, load_frozen
from unclip_jax.run.loop import Run
from unclip_jax.run.resume import config_json
from unclip_jax.run.stage import Player, Stage
from unclip_jax.run.state import step_rng
from unclip_jax.sharding import compute_dtype, make_gather, make_mesh
from unclip_jax.train.codebooks import (
    QUANTISER,
    codebook_loss,
    codebook_of,
    continue_averages,
    start_averages,
)
from unclip_jax.train.figures import (
    held_out_rows,
    image_figures,
    reconstruction_rows,
    sample_grid,
    with_image_figures,
)

FROZEN = {"lpips": "lpips"}
SETTINGS = settings.TRAINED | {
    "frozen": {"lpips": settings.maybe(settings.text())},
    "image_size": settings.whole("[1, inf)"),
    "model": {
        "latent_channels": settings.whole("[1, inf)"),
        "channels": settings.whole("[1, inf)"),
        "channel_mult": settings.several("[1, inf)"),
        "res_blocks": settings.whole("[1, inf)"),
        "attention_levels": settings.absent(settings.several("[0, inf)", least=0)),
        "middle_attention": settings.absent(settings.FLAG),
        "groups": settings.absent(settings.whole("[1, inf)")),
        "dropout": settings.absent(settings.number("[0, 1)")),
        "codes": settings.absent(settings.whole("[2, inf)")),
    },
    "kl_weight": settings.maybe(settings.number("[0, inf)")),
    "quantiser": settings.maybe(QUANTISER),
    "perceptual_weight": settings.number("[0, inf)"),
    "discriminator": settings.maybe(
        {
            "weight": settings.number("[0, inf)"),
            "start": settings.whole("[0, inf)"),
            "layers": settings.whole("[1, inf)"),
            "channels": settings.whole("[1, inf)"),
        }
    ),
    "discriminator_optimizer": settings.OPTIMIZER,
    "scale_latents": settings.FLAG,
    "eval": settings.DRAWN,
}
FIGURES = ("eval_psnr", "eval_l1", "eval_lpips", "eval_kl", "eval_codes_used", "eval_perplexity")


# ------------------------------------------------------------------------------------ loss
def reconstruct(params, extra, rng, image, *, model, config):
    """Images (B, H, W, 3) -> reconstructions (B, H, W, 3), the input (B, H, W, C) of the decoder's last
    layer, the loss () of the latents, metrics, and `extra` with the codebook's averages moved."""
    rng_latents, rng_restart, *keys = jax.random.split(rng, 4)
    variables, metrics = {"params": params}, {}
    apply = lambda x, method, key, **more: model.apply(
        variables, x, deterministic=False, method=method, rngs={"dropout": key}, **more
    )
    encoded = apply(image, "encode", keys[0])
    if config.quantiser is None:
        noise = jax.random.normal(rng_latents, encoded.mean.shape)
        z, kl = sample_moments(encoded, noise), jnp.mean(kl_divergence(encoded))
        latent_loss, metrics["kl"] = config.kl_weight * kl, kl
    else:
        found = model.apply(variables, encoded, method="quantise")
        z, averages = found.latents, extra.get("averages", {})
        latent_loss, used, moved = codebook_loss(
            config.quantiser, encoded, found, config.model.codes, averages.get("codebook"), rng_restart
        )
        if moved is not None:
            extra = extra | {"averages": {"codebook": moved}}
        metrics |= {"quantiser": latent_loss, "perplexity": used.perplexity, "codes_used": used.used}
    method = "decode" if config.quantiser is None else "decode_quantised"
    made, kept = apply(z, method, keys[1], mutable=["intermediates"])
    return made, kept["intermediates"]["decoder"]["features"][0], latent_loss, metrics, extra


def adaptive_weight(kernel, features, to_pixels, to_adversarial):
    """|grad pixels| / (|grad adversarial| + 1e-4), at most 1e4, of the last kernel (3, 3, C, 3).

    Args:
      kernel: the kernel.
      features: (B, H, W, C), what it is applied to.
      to_pixels, to_adversarial: (B, H, W, 3), the two losses' gradients with respect to its output.
    """
    last = nn.Conv(kernel.shape[-1], kernel.shape[:2], padding=1, use_bias=False)
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
    _, pull = jax.vjp(lambda k: last.apply({"params": {"kernel": k}}, features), kernel)
    pixels, adversarial = (jnp.linalg.norm(pull(to)[0]) for to in (to_pixels, to_adversarial))
    return jax.lax.stop_gradient(jnp.clip(pixels / (adversarial + 1e-4), 0.0, 1e4))


def generator_loss(params, extra, rng, batch, step, *, frozen, model, critic, lpips, config):
    """The generator's loss () of a global batch, its metrics, and `extra`."""
    image = batch["image"]
    made, features, latent_loss, metrics, extra = reconstruct(
        params, extra, rng, image, model=model, config=config
    )

    def pixels_of(made):
        absolute, metrics = jnp.abs(image - made), {}
        metrics["l1"] = jnp.mean(absolute)
        if lpips is not None:
            distance = lpips.apply({"params": frozen["lpips"]}, image, made)
            absolute, metrics["lpips"] = (
                absolute + config.perceptual_weight * distance[:, None, None, None],
                jnp.mean(distance),
            )
        return jnp.sum(absolute) / len(image) if config.quantiser is None else jnp.mean(absolute), metrics

    if critic is None:
        pixels, more = pixels_of(made)
        return pixels + latent_loss, (metrics | more | {"pixels": pixels}, extra)

    def adversarial_of(made):
        logits, state = critic.apply(
            {"params": params["discriminator"], "batch_stats": extra["discriminator"]},
            made,
            mutable=["batch_stats"],
        )
        return -jnp.mean(logits), state["batch_stats"]

    # Both gradients with respect to the image are needed for the adaptive weight. They are then those of the
    # loss, too, so that LPIPS and the discriminator run once.
    fixed = jax.lax.stop_gradient(made)
    (pixels, more), to_pixels = jax.value_and_grad(pixels_of, has_aux=True)(fixed)
    (adversarial, stats), to_adversarial = jax.value_and_grad(adversarial_of, has_aux=True)(fixed)
    weight = config.discriminator.weight * adaptive_weight(
        params["decoder"]["conv_out"]["kernel"], features, to_pixels, to_adversarial
    )
    weight = weight * (step >= config.discriminator.start)
    through = jnp.sum(made * jax.lax.stop_gradient(to_pixels + weight * to_adversarial))
    value = jax.lax.stop_gradient(pixels + weight * adversarial)
    loss = value + through - jax.lax.stop_gradient(through) + latent_loss
    metrics |= more | {"pixels": pixels, "adversarial": adversarial, "adaptive_weight": weight}
    return loss, (metrics, extra | {"discriminator": stats})


def discriminator_loss(params, extra, rng, batch, step, *, frozen, model, critic, config):
    """The discriminator's loss () of a global batch, its metrics, and `extra`."""
    del frozen
    made = jax.lax.stop_gradient(
        reconstruct(params, extra, rng, batch["image"], model=model, config=config)[0]
    )
    logits, stats = [], extra["discriminator"]
    for image in (batch["image"], made):
        variables = {"params": params["discriminator"], "batch_stats": stats}
        judged, state = critic.apply(variables, image, mutable=["batch_stats"])
        logits, stats = [*logits, judged], state["batch_stats"]
    real, fake = logits
    hinge = 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))
    metrics = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
    return hinge * (step >= config.discriminator.start), (metrics, extra | {"discriminator": stats})


# ------------------------------------------------------------------------------------ stage
def check(config) -> None:
    """Raises ValueError on a setting out of range, or settings that do not fit together."""
    settings.check_settings(config, SETTINGS, with_image_figures(config, FIGURES))
    model, size = config.model, config.image_size
    if (config.kl_weight is None) == (config.quantiser is None):
        raise InputError(
            "set kl_weight for a KL autoencoder or quantiser for a VQ autoencoder, and the other to None"
        )
    if ("codes" in model) != (config.quantiser is not None):
        raise InputError(
            "model.codes is the size of the codebook: a VQ autoencoder needs it, and a KL one has none"
        )
    factor, levels = 2 ** (len(model.channel_mult) - 1), len(model.channel_mult)
    if size % factor:
        raise InputError(f"image_size={size} must be a multiple of {factor}, the pixels along a latent")
    if any(level >= levels for level in model.get("attention_levels", ())):
        raise InputError(f"model.attention_levels={model.attention_levels} must be below the {levels} levels")
    groups = model.get("groups", 32)
    if any(model.channels * mult % groups for mult in model.channel_mult) or model.channels % groups:
        raise InputError(f"the widths of model must be multiples of model.groups={groups}")
    if bool(config.perceptual_weight) != (config.frozen.lpips is not None):
        raise InputError(
            "frozen.lpips names the network of LPIPS: perceptual_weight above 0 needs it, and 0 has it None"
        )
    if config.perceptual_weight and size < SMALLEST:
        raise InputError(f"image_size={size} is too small for LPIPS, which needs {SMALLEST}")
    if config.discriminator is not None:
        smallest = PatchDiscriminator(layers=config.discriminator.layers).smallest()
        if size < smallest:
            layers = config.discriminator.layers
            raise InputError(
                f"image_size={size} is too small for discriminator.layers={layers}, which need {smallest}"
            )


def stage(config, mesh, frozen) -> Stage:
    """The stage that its configuration describes. Raises ValueError as `check`."""
    check(config)
    size, dtype = config.image_size, compute_dtype(config.dtype, mesh)
    model_config = config_json(config.model)
    kind, module = ("kl", KLAutoencoder) if config.quantiser is None else ("vq", VQAutoencoder)
    part = {"kind": f"{kind}_autoencoder", "model": model_config, "scale_factor": 1.0}
    part["frozen"] = hashes(frozen)
    model = module(**model_config, dtype=dtype, remat=config.remat, gather=make_gather(mesh))
    critic = None
    if config.discriminator is not None:
        critic = PatchDiscriminator(config.discriminator.channels, config.discriminator.layers, dtype)

    def init(key):
        image = jnp.zeros((1, size, size, 3))
        params, extra = model.init(key, image)["params"], {}
        if averages:
            extra["averages"] = {"codebook": start_averages(config.quantiser, params["codebook"])}
        if critic is not None:
            begun = critic.init(jax.random.fold_in(key, 1), image)
            params |= {"discriminator": begun["params"]}
            extra["discriminator"] = begun["batch_stats"]
        return params, extra

    averages = config.quantiser is not None and config.quantiser.codebook == "averages"

    def follow(params, extra):
        if not averages:
            return params
        return params | {"codebook": codebook_of(config.quantiser, extra["averages"]["codebook"])}

    shared = {"model": model, "critic": critic, "config": config}
    lpips = frozen["lpips"].module if "lpips" in frozen else None
    objective = functools.partial(generator_loss, lpips=lpips, **shared)
    names = tuple(jax.eval_shape(init, jax.random.key(0))[0])
    players = (Player(project=follow),)
    if critic is not None:
        generated = tuple(name for name in names if name != "discriminator")
        judge = functools.partial(discriminator_loss, **shared)
        players = (
            Player("generator", generated, project=follow),
            Player("discriminator", ("discriminator",), judge, optimizer="discriminator_optimizer"),
        )
    example = functools.partial(picture_example, size=size, crop_scale=config.data.crop_scale)
    return Stage("autoencoder", model, part, init, example, objective, players)


# ------------------------------------------------------------------------------------ training
def train_and_evaluate(config, workdir: str, init_from: str | None = None) -> dict[str, float]:
    """Trains in `workdir`, or resumes there, and returns the figures of the last evaluation.

    Args:
      config: the run's configuration; see `configs/emoji/autoencoder.py`.
      workdir: the run's folder; a run in it is resumed.
      init_from: a bundle or run whose weights a new run starts from; a discriminator starts fresh.
    """
    # -------------------------------------------------------------------------------- mesh and data
    check(config)
    mesh = make_mesh(config.mesh)
    data = open_data(config, mesh)
    check_pictures(data)
    networks = load_frozen(config, workdir, mesh, FROZEN, None)
    frozen = arrays(networks)
    trained = stage(config, mesh, networks)
    model, size = trained.model, config.model.get("codes", 1)

    # -------------------------------------------------------------------------------- evaluators
    images_against_held_out = image_figures(trained, config, mesh, data)

    @jax.jit
    def measured(params, frozen, batch):
        image = batch["image"]
        made, latents = model.apply({"params": params}, image)
        made = jnp.clip(made, -1.0, 1.0)
        rows = reconstruction_rows(image, made)
        if networks:
            rows["lpips"] = networks["lpips"].with_params(frozen["lpips"]).apply(image, made)
        if config.quantiser is None:
            rows["kl"] = kl_divergence(latents)
        else:
            rows["codes"] = latents.codes
        return rows

    def evaluate(run, step) -> dict[str, float]:
        params = run.state.ema_params
        again = lambda batch, rng: reconstructed(params, batch["image"])
        sample_grid(run, step, again)
        joined = held_out_rows(run, functools.partial(measured, params, frozen))
        codes = joined.pop("codes", None)
        figures = {f"eval_{name}": float(np.mean(values)) for name, values in joined.items()}
        if codes is not None:
            perplexity, used = map(float, usage(jnp.asarray(codes), size))
            figures |= {"eval_codes_used": used, "eval_perplexity": perplexity}
        return figures | images_against_held_out(again, step)

    reconstructed = jax.jit(lambda params, image: model.apply({"params": params}, image)[0])

    @jax.jit
    def deviation(params, image, rng):
        latents = model.apply({"params": params}, image, method="encode")
        if config.quantiser is None:
            latents = sample_moments(latents, jax.random.normal(rng, latents.mean.shape))
        return jnp.std(latents)

    def scale_factor(run) -> float:
        """1 / the standard deviation of the first training batch's latents."""
        if not config.scale_latents:
            return 1.0
        (batch,) = run.measuring_batches(1)
        found = deviation(run.state.ema_params, batch["image"], step_rng(config.seed, 0))
        return float(f"{1.0 / max(float(found), 1e-6):.6g}")

    # -------------------------------------------------------------------------------- loop
    run = Run(config, workdir, trained, mesh, data, init_from)
    if init_from is not None and not run.start.step and "averages" in run.state.extra:
        continue_averages(run, {"codebook": config.batch_size * (config.image_size // model.factor) ** 2})
    with run:
        update = run.update()
        for step, batch in run:
            run.state, metrics = update(run.state, frozen, batch)
            run.log(step, metrics)
            if run.saves(step):
                run.save(step, scale_factor=scale_factor(run))
            if run.evaluates(step):
                run.part["scale_factor"] = scale_factor(run)  # of the best checkpoint
                run.record(step, evaluate(run, step))
    return run.figures
