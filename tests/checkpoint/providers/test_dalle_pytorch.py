"""DALLE-pytorch's discrete VAE and VQGAN, read from files in its layouts, and what is refused.

The package no longer installs beside a current torch, so its discrete VAE is derived again here in torch,
with the names that its files have. The VQGAN's names are those of `test_autoencoder`'s table.
"""

import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import random_params
from tests.runs import ROOT
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.load import load_bundle, load_part
from unclip_jax.checkpoint.providers.autoencoder import compvis_rules
from unclip_jax.cli.main import main
from unclip_jax.errors import InputError
from unclip_jax.generate.networks import build_model
from unclip_jax.models.autoencoder import VQAutoencoder
from unclip_jax.sampling.text_to_image import text_to_image

CHANNELS, CODES, EMBED, LEVELS = 6, 11, 5, 2
HALF = [[0.5] * 3] * 2


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda side: nn.Conv2d(CHANNELS, CHANNELS, side, padding=side // 2)
        self.net = nn.Sequential(conv(3), nn.ReLU(), conv(3), nn.ReLU(), conv(1))

    def forward(self, x):
        return self.net(x) + x


class Published(nn.Module):
    """The discrete VAE with its names: `codebook`, `encoder.0.0`, ..., `decoder.N`."""

    def __init__(self, blocks):
        super().__init__()
        self.codebook = nn.Embedding(CODES, EMBED)
        down = lambda n: nn.Sequential(nn.Conv2d(n, CHANNELS, 4, stride=2, padding=1), nn.ReLU())
        up = lambda n: nn.Sequential(nn.ConvTranspose2d(n, CHANNELS, 4, stride=2, padding=1), nn.ReLU())
        residual = lambda: [Residual() for _ in range(blocks)]
        first = [nn.Conv2d(EMBED, CHANNELS, 1), *residual()] if blocks else []
        widths = [CHANNELS if blocks else EMBED, CHANNELS]
        self.encoder = nn.Sequential(down(3), down(CHANNELS), *residual(), nn.Conv2d(CHANNELS, CODES, 1))
        self.decoder = nn.Sequential(*first, *map(up, widths), nn.Conv2d(CHANNELS, 3, 1))


def torch_dvae(blocks):
    torch.manual_seed(blocks)
    network = Published(blocks).eval().requires_grad_(False)
    for layer in network.encoder.modules():
        if isinstance(layer, nn.Conv2d):  # at torch's initial weights, all pixels have one code
            layer.weight *= 2
            layer.bias *= 0.2
    return network


@pytest.mark.parametrize("blocks, normalization", [(0, HALF), (2, None)])
def test_discrete_vae_equals_its_torch(blocks, normalization, tmp_path):
    """Logits, codes and pictures, with the pixels that the settings name, also from inside a whole DALL-E."""
    network = torch_dvae(blocks)
    settings = {"image_size": 16, "num_layers": 2, "normalization": normalization}
    torch.save({"hparams": settings, "weights": network.state_dict()}, tmp_path / "vae-final.pt")
    whole = {f"vae.{name}": value for name, value in network.state_dict().items()}
    whole["text_emb.weight"] = torch.zeros(4, 3)
    torch.save({"hparams": {"dim": 3}, "vae_params": settings, "weights": whole}, tmp_path / "dalle.pt")
    part, _ = load_part(tmp_path / "vae-final.pt", "dvae")
    assert part.config["model"] == {
        "channels": CHANNELS, "levels": LEVELS, "code_blocks": blocks, "codes": CODES, "embed_dim": EMBED,
        "image_channels": 3, "unit_range": normalization is None,
    }  # fmt: skip
    inside = load_bundle(tmp_path / "dalle.pt").parts["dvae"]
    jax.tree.map(np.testing.assert_array_equal, inside.params, part.params)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    with torch.no_grad():
        seen = torch.from_numpy(x).movedim(-1, 1)
        logits = network.encoder((seen + 1) / 2 if normalization is None else seen)
        codes = logits.argmax(1)
        image = network.decoder(network.codebook(codes).movedim(-1, 1))
        image = (2 * image - 1 if normalization is None else image).clamp(-1, 1)
    model, variables = build_model(part.config), {"params": part.params}
    ours = model.apply(variables, x, method="encode")
    np.testing.assert_allclose(ours, logits.movedim(1, -1), atol=1e-4 * float(logits.abs().max()))
    (found,) = model.apply(variables, x, method="encode_codes")
    np.testing.assert_array_equal(found, codes)
    assert len(np.unique(found)) > 2
    drawn = model.apply(variables, jnp.asarray(codes.numpy()), method="decode_codes")
    np.testing.assert_allclose(drawn, image.movedim(1, -1), atol=1e-5)
    assert model.factor == 4 and model.sides(16) == (4,)


def test_a_json_file_says_which_pixels_were_seen(tmp_path, capsys):
    """Settings without `normalization` are refused with the words of the remedy; then `convert` works."""
    file = tmp_path / "vae.pt"
    torch.save({"hparams": {"num_layers": 2}, "weights": torch_dvae(0).state_dict()}, file)
    convert = ["convert", str(file), "--out", str(tmp_path / "out")]
    assert main(convert) == 1
    err = capsys.readouterr().err
    assert 'write into vae.json beside it {"normalization": null} for [0, 1]' in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    file.with_suffix(".json").write_text(json.dumps({"normalization": [[0.4] * 3, [0.5] * 3]}))
    with pytest.raises(InputError, match="not with the normalization"):
        load_bundle(file)
    file.with_suffix(".json").write_text(json.dumps({"normalization": HALF}))
    assert main(convert) == 0
    assert load_bundle(tmp_path / "out").parts["dvae"].config["model"]["unit_range"] is False


# ------------------------------------------------------------------------------------ the VQGAN
MODEL = {
    "latent_channels": 4, "channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "attention_levels": [1],
    "codes": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def vqgan():
    """The parameters of a small VQGAN, and its tensors by their published names."""
    params = random_params(VQAutoencoder(**MODEL), jnp.zeros((1, 8, 8, 3)))
    tensors = export(params, compvis_rules(), "a VQGAN")
    return params, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def test_vqgan(vqgan, tmp_path, monkeypatch):
    """As published, with the networks of its losses and the class of a callback; and inside a DALL-E. Its
    codes make the picture that its latents make."""
    params, tensors = vqgan
    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, lightning.__name__, lightning)
    published = {
        "epoch": 3,
        "state_dict": tensors | {"loss.discriminator.main.0.weight": torch.zeros(2)},
        "callbacks": {lightning.ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}},
    }
    torch.save(published, tmp_path / "vqgan.1024.model.ckpt")
    inside = {f"vae.model.{name}": value for name, value in tensors.items()} | {"logits.bias": torch.zeros(2)}
    torch.save({"hparams": {}, "vae_params": None, "weights": inside}, tmp_path / "dalle.pt")
    monkeypatch.undo()
    for file, name in (
        ("vqgan.1024.model.ckpt", "dvae"),
        ("vqgan.1024.model.ckpt", "autoencoder"),
        ("dalle.pt", "dvae"),
    ):
        part, _ = load_part(tmp_path / file, name)
        assert {k: part.config["model"][k] for k in MODEL} == MODEL
        jax.tree.map(np.testing.assert_array_equal, part.params, params)
    model = build_model(part.config)
    apply = lambda *given, method: jax.jit(functools.partial(model.apply, method=method))(
        {"params": params}, *given
    )
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    (codes,) = apply(x, method="encode_codes")
    assert codes.shape == (2, *model.sides(8) * 2) == (2, 4, 4) and len(np.unique(codes)) > 2
    expected = np.clip(apply(apply(x, method="encode"), method="decode"), -1, 1)
    np.testing.assert_allclose(apply(codes, method="decode_codes"), expected, atol=1e-5)


def refused(tmp_path, name, value):
    torch.save(value, tmp_path / name)
    with pytest.raises(InputError) as caught:
        load_bundle(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_refused(vqgan, tmp_path):
    """Each in one line: other quantisers and networks, tensors too many or too few, code in a pickle."""
    _, tensors = vqgan
    one = torch.zeros(1)
    says = refused(tmp_path, "vqgan.ckpt", {"state_dict": {"quantize.proj.weight": one}})
    assert "Gumbel quantiser" in says
    says = refused(tmp_path, "dalle.pt", {"weights": {"vae.enc.blocks.input.w": one}})
    assert "give the folder of its encoder.pkl and decoder.pkl" in says
    assert "neither a discrete VAE" in refused(tmp_path, "vae.pt", {"weights": {"text_emb.weight": one}})
    says = refused(tmp_path, "vqgan.ckpt", {"state_dict": tensors | {"decoder.mask": one}})
    assert "1 tensors of the file have no use: decoder.mask" in says
    network = torch_dvae(2).state_dict()
    hparams = {"normalization": None}
    missing = {name: value for name, value in network.items() if name != "decoder.2.net.4.bias"}
    says = refused(tmp_path, "vae.pt", {"hparams": hparams, "weights": missing})
    assert "1 parameters are missing in it: decoder/block_1/conv3/bias" in says
    says = refused(tmp_path, "vae.pt", {"hparams": hparams, "weights": {"codebook.weight": one}})
    assert "it has no encoder.0.0.weight of 4 axes" in says
    assert "it asks for" in refused(tmp_path, "vae.pt", {"weights": network, "hook": print})
    with pytest.raises(InputError, match="name the one to read"):
        load_bundle(tmp_path)


@pytest.mark.slow
def test_dalle_trains_on_its_codes(vqgan, tmp_path):
    """From a file of either network: training, the bundle with it as the base, a picture, the doctor."""
    torch.save(
        {"hparams": {"normalization": HALF}, "weights": torch_dvae(0).state_dict()}, tmp_path / "vae.pt"
    )
    torch.save({"state_dict": vqgan[1]}, tmp_path / "vqgan.ckpt")
    for name, pixels, codes in (("vae.pt", 16, CODES), ("vqgan.ckpt", 8, MODEL["codes"])):
        file, runs, out = str(tmp_path / name), tmp_path / f"{name}_runs", tmp_path / f"{name}_bundle"
        train = ["train", f"{ROOT}/configs/dalle/dalle.py:tiny", "--workdir", str(runs / "dalle")]
        train += ["--set", f"frozen.dvae={file}", "--set", "steps=2", "--set", f"image_size={pixels}"]
        assert main(train) == 0
        assert main(["bundle", str(runs), "--base", file, "--out", str(out)]) == 0
        bundle = load_bundle(out)
        assert bundle.parts["dalle"].config["model"]["codes"] == codes
        assert text_to_image(bundle, ["a red fox"]).shape == (1, pixels, pixels, 3)
        report = tmp_path / f"{name}.json"
        assert main(["doctor", str(out), "--rows", "16", "--drawn", "2", "--json", str(report)]) in (0, 1)
        assert report.read_text().count("perplexity of") == 2
