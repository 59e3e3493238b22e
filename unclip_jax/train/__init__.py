"""Training: one linear file per stage, each with `FROZEN`, `stage` and `train_and_evaluate`.

`STAGES` maps the name of a stage to its file.
"""

from unclip_jax.train import (
    autoencoder,
    clip,
    codec,
    dalle,
    decoder,
    dvae,
    glide,
    imagen,
    kandinsky,
    latent,
    pixelsnail,
    prior_ar,
    prior_diffusion,
    retrieval,
    stable_unclip,
    upsampler,
    vqvae,
)

STAGES = {
    "clip": clip,
    "prior_diffusion": prior_diffusion,
    "codec": codec,
    "prior_ar": prior_ar,
    "decoder": decoder,
    "upsampler": upsampler,
    "autoencoder": autoencoder,
    "latent": latent,
    "glide": glide,
    "kandinsky": kandinsky,
    "stable_unclip": stable_unclip,
    "imagen": imagen,
    "retrieval": retrieval,
    "vqvae": vqvae,
    "dvae": dvae,
    "dalle": dalle,
    "pixelsnail": pixelsnail,
}
