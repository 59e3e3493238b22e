"""Every stage on the embedded data: it learns, resumes bit for bit, and does not depend on the mesh."""

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import BESIDE, STAGES, STEPS, Repeating, Signalling, losses, train_tiny, wrap_batches
from unclip_jax import sharding
from unclip_jax.checkpoint.load import load_bundle
from unclip_jax.checkpoint.store import load_run
from unclip_jax.cli.main import main
from unclip_jax.diffusion.losses import training_tables
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.generate.text import TextConditioning
from unclip_jax.run.frozen import EMPTY, clip_image_size, clip_network, clip_tokenizer, images_of
from unclip_jax.run.hosts import RESTART
from unclip_jax.run.stage import without_gradient
from unclip_jax.train import decoder


@pytest.fixture(params=list(STAGES))
def name(request):
    return request.param


@pytest.fixture
def beside(tiny_run, name, tmp_path):
    """A fresh run folder, with the shared runs beside it, where the configuration looks for them."""
    for other in BESIDE.get(name, ()):
        (tmp_path / other).symlink_to(tiny_run(other))
    return tmp_path / name


def test_run_writes_what_it_promises(name, tiny_run):
    """It writes the metrics of every step, TensorBoard events, checkpoints, and sample grids."""
    workdir = tiny_run(name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate", "examples_per_second", "step_time"):
        assert all(np.isfinite(row[key]) for row in steps), key
    assert list((workdir / "tb").glob("events*"))
    assert (workdir / "checkpoints" / str(STEPS)).is_dir()
    if name in ("decoder", "upsampler_16", "autoencoder", "vqvae", "dvae"):
        assert (workdir / "samples" / f"{STEPS:07d}.png").stat().st_size > 1000
    evaluations = [row for row in rows if "loss" not in row]
    assert len(evaluations) == 1 and all(np.isfinite(v) for v in evaluations[0].values())
    meta, params, step = load_run(workdir)
    assert step == STEPS and meta["name"] == name
    assert len(meta["provenance"]["data_checksum"]) == 64
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_loss_on_a_fixed_batch_falls(name, beside, monkeypatch):
    wrap_batches(monkeypatch, Repeating)
    train_tiny(name, beside, eval_every=0)
    curve = losses(beside)
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3]), curve


def test_eight_devices_equal_one(name, tiny_run, beside, monkeypatch):
    """Compares the first ten losses, with dropout and Adam epsilon 1e-6."""
    assert jax.device_count() == 8
    eight = losses(tiny_run(name))[:10]
    monkeypatch.setattr(
        STAGES[name][0], "make_mesh", lambda shape: sharding.make_mesh(None, jax.devices()[:1])
    )
    train_tiny(name, beside, eval_every=0)
    np.testing.assert_allclose(losses(beside)[:10], eight, rtol=1e-4)


def test_stopped_and_resumed_equals_running_through(name, tiny_run, beside, monkeypatch):
    """SIGTERM during step 5; the same command again ends with the same bits."""
    with monkeypatch.context() as patch:
        wrap_batches(patch, lambda inner: Signalling(inner, at=5))
        with pytest.raises(SystemExit) as stopped:
            train_tiny(name, beside)
        assert stopped.value.code == RESTART
    assert load_run(beside)[2] == 5
    train_tiny(name, beside)
    (_, resumed, step), (_, through, _) = load_run(beside), load_run(tiny_run(name))
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    assert losses(beside) == losses(tiny_run(name))


def test_codec_is_the_pca_of_the_training_embeddings(tiny_run, tmp_path):
    """The components diagonalise the covariance of the rows that the run read.

    The extremes bound the projections of all these rows. A finished run stays as it is.
    """
    from unclip_jax.data import pipeline, sources
    from unclip_jax.data.examples import clip_example
    from unclip_jax.models.codec import Codec, project

    workdir = tiny_run("codec")
    meta, params, steps = load_run(workdir)
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    clip = clip_network(str(tiny_run("clip")), mesh, "float32")
    assert meta["part"]["frozen"] == {"clip": clip.hash} and steps == 2
    example = functools.partial(
        clip_example, tokenizer=clip_tokenizer(clip), size=clip_image_size(clip), crop_scale=0.95
    )
    source = sources.make_source(meta["config"]["data"]["train"])
    rows = list(
        pipeline.train_batches(
            source, example, batch_size=16, seed=0, num_steps=2, workers=pipeline.Workers("numpy")
        )
    )
    z = np.concatenate(
        [jax.jit(functools.partial(images_of, clip, mesh))(clip.params, row) for row in rows]
    ).astype(np.float64)
    np.testing.assert_allclose(params["mean"], z.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params["components"] @ params["components"].T, np.eye(16), atol=1e-5)
    covariance = params["components"] @ np.cov(z.T, bias=True) @ params["components"].T
    np.testing.assert_allclose(
        covariance, np.diag(params["eigenvalues"]), atol=1e-4 * params["eigenvalues"][0]
    )
    assert np.all(np.diff(params["eigenvalues"]) <= 0)
    y = np.asarray(project(Codec(**params), z, 16))
    np.testing.assert_allclose(y.min(0), params["low"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(y.max(0), params["high"], rtol=1e-3, atol=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    again = train_tiny("codec", workdir)
    assert again["explained_variance"] == pytest.approx(
        sum(params["eigenvalues"][:6]) / sum(params["eigenvalues"])
    )
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}


def test_what_the_codec_refuses(tiny_run, tmp_path):
    """Too few rows for a covariance, too many components, initial weights; and a prior with another CLIP."""
    (tmp_path / "clip").symlink_to(tiny_run("clip"))
    with pytest.raises(ValueError, match="16 rows .* too few for the covariance of 16"):
        train_tiny("codec", tmp_path / "codec", steps=1)
    with pytest.raises(ValueError, match="between 1 and the embedding's 16, got 17"):
        train_tiny("codec", tmp_path / "codec", dims=17)
    with pytest.raises(ValueError, match="starts from nothing"):
        train_tiny("codec", tmp_path / "codec", init_from="emoji")
    (tmp_path / "codec").symlink_to(tiny_run("codec"))
    with pytest.raises(ValueError, match="20 codes need as many dimensions"):
        train_tiny("prior_ar", tmp_path / "prior_ar", model__codes=20)
    with pytest.raises(ValueError, match="fitted in the embedding space of CLIP"):
        train_tiny("prior_ar", tmp_path / "prior_ar", frozen__clip="emoji")


def test_init_from_a_run(tiny_run, tmp_path):
    """A new run may start from trained weights: its first loss is lower than a fresh network's."""
    source = tiny_run("upsampler_16")
    train_tiny("upsampler_16", tmp_path / "run", init_from=str(source))
    assert losses(tmp_path / "run")[0] < 0.95 * losses(source)[0]
    assert load_run(tmp_path / "run")[0]["provenance"]["initialised_from"]["step"] == STEPS


def test_a_decoder_is_fine_tuned_to_inpaint(tiny_run, tmp_path):
    """The decoder that inpaints starts as the ordinary decoder, which ignores the known part.

    Training makes it use the known part. A new run prefers to start from weights of its own kind.
    """
    from unclip_jax.run.resume import load_widened

    source = tiny_run("decoder")
    (tmp_path / "clip").symlink_to(tiny_run("clip"))
    ordinary, (part, _) = load_run(source)[1], load_widened(source, "decoder_inpaint")
    kernel = part.params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :3], ordinary["unet"]["conv_in"]["kernel"])
    assert kernel.shape[2] == 7 and not kernel[:, :, 3:].any()
    run = tmp_path / "decoder_inpaint"
    # Evaluation sizes that do not divide over the eight devices are rounded up.
    train_tiny(
        "decoder",
        run,
        str(source),
        model__inpaint=True,
        steps=3,
        eval_every=3,
        eval__batch_size=5,
        eval__samples=3,
    )
    meta, trained, _ = load_run(run)
    assert meta["name"] == "decoder_inpaint" and meta["part"]["model"]["inpaint"]
    assert np.abs(trained["unet"]["conv_in"]["kernel"][:, :, 3:]).min() > 0
    again, _ = load_widened(run, "decoder_inpaint")
    jax.tree.map(np.testing.assert_array_equal, again.params, trained)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inpaint", [False, True])
def test_what_the_decoder_loss_teaches(inpaint, frozen):
    """Gradients exist at unknown pixels only, and for the text encoder unless it is frozen."""
    known = np.broadcast_to(np.arange(8) < 5, (2, 8, 8))[..., None]
    image, noise = np.random.default_rng(0).normal(size=(2, 2, 8, 8, 3)).astype(np.float32)
    caption = TextConditioning(jnp.ones((2, 4)), jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool))
    clip = SimpleNamespace(
        images=lambda params, batch: jnp.ones((2, 4)), captions=lambda params, batch: caption
    )
    answers = SimpleNamespace(
        text=None,
        inpaint=inpaint,
        apply=lambda variables, *_, **__: variables["params"]["unet"] + variables["params"]["text"],
    )
    settings = {
        "diffusion": {"prediction": "v", "vb_weight": 0.0, "num_steps": 1000},
        "drop_embedding": 0.1,
        "drop_text": 0.5,
    }
    settings |= {"tables": training_tables(make_schedule("cosine", 1000)), "clip": clip, "model": answers}
    loss_fn = functools.partial(decoder.loss_fn, **settings)
    loss_fn = without_gradient(loss_fn, "text") if frozen else loss_fn
    networks = {"clip": None, EMPTY: jax.tree.map(lambda a: a[:1], caption)}
    batch = {"image": image} | ({"known": known} if inpaint else {})
    loss = functools.partial(loss_fn, rng=jax.random.key(0), batch=batch, frozen=networks)
    taught = jax.grad(lambda params: loss(params)[0])({"unet": noise, "text": np.zeros_like(noise)})
    unknown = np.broadcast_to(~known | (not inpaint), noise.shape)
    np.testing.assert_array_equal(taught["unet"] != 0, unknown)
    np.testing.assert_array_equal(taught["text"] != 0, unknown & (not frozen))


def test_bundle_of_runs(tiny_run, tiny_judge, tmp_path, capsys):
    """`unclip bundle` collects the runs' averaged weights and measures the bundle."""
    runs = {name: tiny_run(name) for name in STAGES}
    assert (
        main(
            [
                "bundle",
                str(runs["clip"].parent),
                "--out",
                str(tmp_path / "b"),
                "--rows",
                "8",
                "--judge",
                str(tiny_judge),
                "--sampling",
                "decoder.steps=2",
            ]
        )
        == 0
    )
    assert "own caption first of 8" in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "b")
    assert set(bundle.parts) == {*STAGES, "codec"} and bundle.sampling["decoder"]["steps"] == 2
    assert (
        bundle.provenance["figures"]["chance"] == 0.125
        and bundle.provenance["training"]["prior_diffusion"]["step"] == STEPS
    )
    trained = load_run(runs["prior_diffusion"])[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16)),
        bundle.parts["prior_diffusion"].params,
        trained,
    )


def test_bundle_of_one_run_and_a_base(tiny_run, tiny_bundle, tmp_path, capsys):
    """Parts, settings and provenance come from the runs, and otherwise from the base, if there is one."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "upsampler_16").symlink_to(tiny_run("upsampler_16"))
    args = ["bundle", str(tmp_path / "runs"), "--out", str(tmp_path / "b"), "--rows", "0"]
    assert main(args) == 1
    assert (
        "has no run of clip, prior_diffusion, decoder; train it first (it has: upsampler_16)"
        in capsys.readouterr().err
    )
    assert main([*args, "--base", str(tiny_bundle)]) == 0
    bundle, base = load_bundle(tmp_path / "b"), load_bundle(tiny_bundle)
    assert set(bundle.parts) == set(base.parts) and bundle.sampling == base.sampling
    for name, part in bundle.parts.items():
        same = all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(part.params), jax.tree.leaves(base.parts[name].params))
        )
        assert same == (name != "upsampler_16"), name
    assert set(bundle.provenance["training"]) == {"upsampler_16"}


def test_another_model_in_the_workdir_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run("upsampler_16"), tmp_path / "run")
    with pytest.raises(ValueError, match="another workdir"):
        train_tiny("upsampler_16", tmp_path / "run", model__unet__channels=12)


def test_missing_clip_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="train 'clip' first"):
        train_tiny("prior_diffusion", tmp_path / "prior_diffusion")


def test_not_finite_gradient_skips_the_update(tmp_path, monkeypatch):
    """A batch of NaN does not change the parameters. Training continues with the next batch."""

    class Poisoned(Repeating):
        def __next__(self):
            return {k: np.full_like(v, np.nan) for k, v in super().__next__().items()}

    wrap_batches(monkeypatch, Poisoned)
    train_tiny("upsampler_16", tmp_path / "run", eval_every=0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == 1 for row in rows)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(tmp_path / "run")[1]))
