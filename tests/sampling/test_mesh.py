"""Bundles on a mesh: any split of batch and weights gives the same pictures.

Weights load directly onto the mesh.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import unclip_jax
from tests.helpers import param_shapes, struct
from unclip_jax import sharding
from unclip_jax.checkpoint.bundle import save_bundle
from unclip_jax.checkpoint.convert import export
from unclip_jax.checkpoint.providers import karlo
from unclip_jax.cli.main import main
from unclip_jax.models.prior_diffusion import DiffusionPrior
from unclip_jax.sampling.edits.inversion import embed_images
from unclip_jax.sampling.programs import Sampler
from unclip_jax.sharding import infer_shardings, make_mesh, sampling_mesh

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_mesh_draws_the_same(shape, tiny_bundle, monkeypatch):
    """The number of captions does not divide by the number of devices.

    Parameters are sharded as the rules say; only those that the rules replicate are whole on a device.
    """
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 256)
    captions = ["a red fox", "a 3d emoji of a pizza", "x"]
    expected = unclip_jax.text_to_image(unclip_jax.load_bundle(tiny_bundle), captions)
    bundle = unclip_jax.load_bundle(tiny_bundle, mesh=make_mesh(shape))
    drawn = unclip_jax.text_to_image(bundle, captions)
    assert expected.std() > 0 and np.abs(drawn.astype(int) - expected).max() <= 1
    split = 0
    for part in bundle.parts.values():
        if part.config["kind"] == "codec":
            continue
        for leaf, wanted in zip(
            jax.tree.leaves(part.params), jax.tree.leaves(infer_shardings(part.params, bundle.mesh))
        ):
            assert leaf.sharding == wanted
            split += not leaf.is_fully_replicated
    assert split > 0
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(
        embed_images(bundle, images), embed_images(unclip_jax.load_bundle(tiny_bundle), images), atol=1e-4
    )


def test_where_sampling_runs_by_default(monkeypatch):
    """The default is one CPU device, or all accelerators; it splits weights that one device cannot hold."""

    class Chip:
        platform, limit = "gpu", {"bytes_limit": 16 * 2**30}
        memory_stats = lambda self: self.limit

    assert sampling_mesh().size == 1 and sampling_mesh({"fsdp": 4}).shape["data"] == 2
    chips = [Chip() for _ in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    assert dict(sampling_mesh(weight_bytes=6 * 2**30).shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    assert dict(sampling_mesh(weight_bytes=13 * 2**30).shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    assert sharding.compute_dtype("auto", sampling_mesh()) == jax.numpy.bfloat16


def test_the_mesh_of_the_command(tiny_bundle, tmp_path, capsys):
    """`--mesh` sets the sampler's mesh; a wrong value gives an error of one line."""
    out = tmp_path / "a.png"
    arguments = ["sample", "a fox", "--bundle", str(tiny_bundle), "--out", str(out)]
    assert main([*arguments, "--mesh", "data=8"]) == 0 and out.exists()
    for mesh, message in (
        ("data=3", "does not fit 8 devices"),
        ("date=8", "unknown mesh axis date"),
        ("data=x", "must be whole numbers"),
    ):
        assert main([*arguments, "--mesh", mesh]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error


def test_placed_weights_are_not_saved(tiny_bundle, tmp_path):
    bundle = unclip_jax.load_bundle(tiny_bundle, mesh=sampling_mesh())
    with pytest.raises(ValueError, match="loaded onto a mesh"):
        save_bundle(bundle, tmp_path / "out")


LOADING = """
import sys, threading, time
from pathlib import Path
import jax, numpy as np
from tests.sampling.test_mesh import prior_shapes
from unclip_jax.checkpoint import files
from unclip_jax.checkpoint.convert import convert
from unclip_jax.checkpoint.providers import karlo
from unclip_jax.sharding import placer, sampling_mesh

def anonymous():  # bytes of memory that are this process's own, and no file's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(1e-3)

folder, shapes, place = Path(sys.argv[1]), prior_shapes(), placer(sampling_mesh())
done, peak = threading.Event(), [0]
before, watcher = anonymous(), threading.Thread(target=watch)
watcher.start()
placed = jax.block_until_ready(convert(files.open_weights(folder), karlo.PRIOR, shapes, "prior", place))
done.set()
watcher.join()
size = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
print((peak[0] - before) / size, np.asarray(placed["z_out"]["bias"])[0])
"""
MODEL = DiffusionPrior(embed_dim=768, length=77, width=1024, layers=4, heads=16)
INPUTS = {
    "text_embed": struct(1, 768),
    "text_states": struct(1, 77, 768),
    "text_mask": struct(1, 77, dtype=bool),
}


def prior_shapes():
    return param_shapes(MODEL, struct(1, 768), struct(1), **INPUTS)


def test_memory_of_loading(tmp_path):
    """Public weights of 220 MB reach the device without a second copy on the host.

    The peak of memory is less than 1.2 times their size.
    """
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), prior_shapes())
    save_file(
        {k: np.ascontiguousarray(v) for k, v in export(params, karlo.PRIOR, "prior").items()},
        tmp_path / "model.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    ratio, value = map(float, done.stdout.split())
    assert 0.95 < ratio < 1.2 and value == 0.5


def test_on_cpu_the_hosts_weights_are_the_devices(tiny_bundle):
    """Sampling a bundle that was loaded onto the host copies nothing."""
    bundle = unclip_jax.load_bundle(tiny_bundle)
    host, device = (
        bundle.parts["prior_diffusion"].params["z_in"]["kernel"],
        Sampler(bundle).params["prior_diffusion"]["z_in"]["kernel"],
    )
    assert device.unsafe_buffer_pointer() == host.ctypes.data
