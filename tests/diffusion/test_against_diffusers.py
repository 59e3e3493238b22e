"""Every sampler and spacing of latent diffusion against diffusers' scheduler: the input of the network at
every call, and the sample at the end."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import unclip_jax.diffusion.samplers as ours
from unclip_jax.errors import InputError
from unclip_jax.generate.denoise import diffusion_sampler
from unclip_jax.generate.options import SamplingOptions, check_options

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CLASSES = {
    "ddim": ("DDIMScheduler", dict(clip_sample=False)),
    "plms": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
X = np.random.default_rng(0).normal(size=(2, 3, 2))


def network(x, t, np_like):
    """Any smooth function of the sample and of the step."""
    return 0.8 * np_like.tanh(0.7 * x - 0.002 * t) + 0.1 * x


def noise_of(call, shape):
    return np.random.default_rng(100 + call).normal(size=shape)


def exact(scheduler, zero_snr):
    """The scheduler with its tables in float64."""
    betas = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    if zero_snr:
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        betas = rescale_zero_terminal_snr(betas)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    floor = scheduler.alphas_cumprod[-1].double()
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if zero_snr:
        scheduler.alphas_cumprod[-1] = floor
    if hasattr(scheduler, "final_alpha_cumprod"):
        one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.tensor(1.0) if one else scheduler.alphas_cumprod[0]
    return scheduler


def run_theirs(sampler, count, prediction, zero_snr, eta, monkeypatch, **config):
    """The inputs of the network, and the sample at the end, by diffusers."""
    import diffusers

    warnings.filterwarnings("ignore")
    name, settings = CLASSES[sampler]
    if zero_snr:
        settings = settings | {"rescale_betas_zero_snr": True}
    scheduler = getattr(diffusers, name)(**SD, prediction_type=PREDICTIONS[prediction], **settings, **config)
    exact(scheduler, zero_snr).set_timesteps(count)
    calls, draws = [], iter(range(1000))
    for module in ("scheduling_ddim", "scheduling_euler_ancestral_discrete"):
        draw = lambda shape, **_: torch.from_numpy(noise_of(next(draws), tuple(shape)))
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)
    x = torch.from_numpy(X) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        calls.append((float(t), seen.numpy()))
        out = network(seen.double(), t.double(), torch)
        extra = {"eta": eta} if sampler == "ddim" else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
    return calls, x.numpy()


def run_ours(sampler, count, prediction, zero_snr, eta, monkeypatch, **options):
    """The same by our sampler, in float64."""
    config = {
        "kind": "decoder",
        "diffusion": {
            "schedule": "scaled_linear",
            "num_steps": 1000,
            "prediction": prediction,
            "zero_snr": zero_snr,
        },
    }
    chosen = SamplingOptions(steps=count, sampler=sampler, eta=eta, clip=None, **options)
    check_options(chosen, config)
    made, calls = diffusion_sampler(config, chosen), []
    draws = iter(range(1000))
    monkeypatch.setattr(
        ours, "standard_normal", lambda key, shape, dtype: jnp.asarray(noise_of(next(draws), shape))
    )

    def model(x, t):
        calls.append((float(t[0]), np.asarray(x)))
        return network(x, t[0].astype(jnp.float64), jnp)

    with jax.enable_x64(True), jax.disable_jit():
        x = made.run(made.denoiser(model, False), jnp.asarray(X), jax.random.key(0))
        return calls, np.asarray(x)


CASES = [
    # sampler, steps, prediction, spacing, offset, last
    ("ddim", 50, "eps", "leading", 1, "first"),
    ("ddim", 7, "v", "leading", 0, "clean"),
    ("ddim", 30, "eps", "trailing", 0, "clean"),
    ("ddim", 11, "x0", "linspace", 0, "first"),
    ("plms", 50, "eps", "leading", 1, "first"),
    ("plms", 7, "v", "leading", 1, "first"),
    ("plms", 30, "eps", "trailing", 0, "clean"),
    ("plms", 11, "v", "linspace", 0, "clean"),
    ("plms", 2, "eps", "leading", 1, "first"),
    ("plms", 1, "eps", "leading", 1, "first"),
    ("euler", 30, "eps", "leading", 1, "clean"),
    ("euler", 13, "v", "linspace", 0, "clean"),
    ("euler", 9, "eps", "trailing", 0, "first"),
    ("euler_ancestral", 30, "eps", "leading", 1, "clean"),
    ("euler_ancestral", 13, "v", "linspace", 0, "clean"),
    ("euler_ancestral", 9, "eps", "trailing", 0, "clean"),
    ("dpmpp_2m", 25, "eps", "leading", 1, "clean"),
    ("dpmpp_2m", 9, "v", "linspace", 0, "clean"),
    ("dpmpp_2m", 20, "eps", "trailing", 0, "first"),
    ("dpmpp_2m", 8, "eps", "leading", 0, "first"),
    ("dpmpp_2m", 1, "eps", "linspace", 0, "clean"),
]


def compare(ours_made, theirs_made, sampler):
    (calls, x), (wanted, end) = ours_made, theirs_made
    tolerance = 1e-9 if sampler in ("ddim", "plms") else 1e-4  # the others of theirs run in float32
    assert [t for t, _ in calls] == pytest.approx([t for t, _ in wanted], abs=1e-4)
    for (_, a), (_, b) in zip(calls, wanted):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)
    np.testing.assert_allclose(x, end, atol=tolerance * max(1, np.abs(end).max()), rtol=0)


@pytest.mark.parametrize("sampler, count, prediction, spacing, offset, last", CASES)
def test_every_call_equals_diffusers(sampler, count, prediction, spacing, offset, last, monkeypatch):
    theirs = {"timestep_spacing": spacing, "steps_offset": offset}
    if sampler in ("ddim", "plms"):
        theirs["set_alpha_to_one"] = last == "clean"
    elif sampler in ("euler", "dpmpp_2m"):
        theirs["final_sigmas_type"] = "zero" if last == "clean" else "sigma_min"
    args = sampler, count, prediction, False, 0.0, monkeypatch
    made = run_ours(*args, spacing=spacing, offset=offset, last=last)
    compare(made, run_theirs(*args, **theirs), sampler)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", ["v"])
def test_zero_terminal_snr(sampler, prediction, monkeypatch):
    """The last abar is zero, and the steps begin there."""
    theirs = {"timestep_spacing": "trailing"}
    args = sampler, 10, prediction, True, 0.0, monkeypatch
    made = run_ours(*args, spacing="trailing")
    assert made[0][0][0] == 999
    compare(made, run_theirs(*args, **theirs), sampler)


def test_ddim_with_noise(monkeypatch):
    """DDIM at eta 0.7 draws the same noise at the same places."""
    args = "ddim", 12, "eps", False, 0.7, monkeypatch
    theirs = run_theirs(*args, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    compare(run_ours(*args, spacing="leading", offset=1, last="first"), theirs, "ddim")


def test_wasted_and_odd_steps():
    """The facts of the spacings: what SD's scheduler visits, and the step of DDIM that does nothing."""
    moves = SamplingOptions(50, "ddim", spacing="leading", offset=1, last="first").moves(1000)
    assert list(moves.t[:3]) == [981, 961, 941] and list(moves.t[-2:]) == [21, 1] and moves.r[-1] == 0
    moves = SamplingOptions(50, "ddim", spacing="leading", last="first").moves(1000)
    assert moves.t[-1] == moves.r[-1] == 0
    moves = SamplingOptions(30, "ddim", spacing="trailing").moves(1000)
    assert (moves.t[1:] != moves.r[:-1]).sum() == 10


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(steps=1000, spacing="leading", offset=1), "leads out of the 1000 steps"),
        (dict(steps="10,5", spacing="leading"), "whole number of steps"),
        (dict(steps=10, spacing="karras"), "unknown spacing"),
        (dict(steps=10, spacing="trailing", last="none"), "unknown last"),
        (dict(steps=10, offset=1), "other spacings"),
        (dict(steps=10, spacing="trailing", offset=1), "belongs to the spacing leading"),
    ],
)
def test_refused(options, words):
    config = {"kind": "decoder", "diffusion": {"schedule": "linear", "num_steps": 1000, "prediction": "v"}}
    with pytest.raises(InputError, match=words):
        check_options(SamplingOptions(**options), config)
    if "zero_snr" not in config["diffusion"]:
        config["diffusion"]["zero_snr"] = True
        with pytest.raises(InputError, match="without signal"):
            check_options(SamplingOptions(10, "plms", spacing="leading", offset=1), config)
