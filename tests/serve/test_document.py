"""The OpenAPI document describes the server, and the examples of docs/serving.md work."""

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis.errors import Unsatisfiable
from PIL import Image

from unclip_jax.serve import fields

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def examples():
    """The curl commands of docs/serving.md."""
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    photo = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(photo).save(folder / "picture.png")
    alpha = np.repeat((np.arange(24) < 12)[None] * np.uint8(255), 24, axis=0)
    Image.fromarray(np.dstack([photo, alpha])).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize("example", examples(), ids=lambda line: re.search(r":8000(\S*)", line)[1])
def test_examples_of_the_docs(server, folder, example):
    """Each curl command, with this server's address, answers with what the endpoint promises."""
    command = shlex.split(example.replace("http://127.0.0.1:8000", server[0]))
    done = subprocess.run(
        [*command, "--fail-with-body"], cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout and ('"data"' in done.stdout or '"status"' in done.stdout)


def test_every_field_is_in_the_document(server):
    document = httpx.get(f"{server[0]}/openapi.json").json()
    paths = {verb: f"/v1/images/{verb}" for verb in ("generations", "edits", "variations")}
    paths |= {verb: f"/v1/unclip/{verb}" for verb in ("interpolate", "text_diff", "reconstruct")}
    assert set(paths) == set(fields.VERBS)
    for verb, path in paths.items():
        (body,) = document["paths"][path]["post"]["requestBody"]["content"].values()
        named = set(body["schema"]["properties"])
        assert named >= set(fields.VERBS[verb]), verb
        for name in ("400", "413", "429", "503"):
            assert name in document["paths"][path]["post"]["responses"]


COSTLY = ("steps", "eta", "prior", "candidates", "prior_guidance_scale", "guidance_scale", "size")


def test_schemathesis_finds_no_500(server):
    """Requests made from the document, valid and not, never hit an error of the server's own.

    Valid ones keep the settings whose programs are compiled, so that each takes a moment and not a minute.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")
    seen = set()

    def try_all(operation, mode, count):
        @settings(
            max_examples=count,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                for name in COSTLY:
                    case.body.pop(name, None)
            response = case.call(timeout=600)
            case.validate_response(response, checks=[not_a_server_error])
            seen.add((operation.path, response.status_code))

        with contextlib.suppress(Unsatisfiable):  # an operation without parameters has nothing to negate
            check()

    for result in schema.get_all_operations():
        try_all(result.ok(), GenerationMode.POSITIVE, 4)
        try_all(result.ok(), GenerationMode.NEGATIVE, 12)
    paths = {path for path, _ in seen}
    assert paths >= {"/v1/images/generations", "/v1/images/edits", "/v1/unclip/text_diff", "/v1/models"}
    assert {200, 400} <= {status for path, status in seen if path == "/v1/images/generations"}
    assert not [status for _, status in seen if status >= 500]
