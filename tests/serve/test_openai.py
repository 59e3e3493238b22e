"""The unmodified `openai` client against a running server."""

import base64
import io
import json

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

import unclip_jax


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, timeout=60)


def decoded(picture):
    """A picture of an answer, as a PIL image."""
    if picture.b64_json is not None:
        return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))
    response = httpx.get(picture.url)
    assert response.status_code == 200 and response.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(response.content))


def test_pictures_are_those_of_text_to_image(client, models):
    """By url and in base64, they are the pictures of the same caption, seed and positions."""
    expected = unclip_jax.text_to_image(models.first.sampler, ["a red fox"] * 2, seed=7)
    for form in ("url", "b64_json"):
        answer = client.images.generate(prompt="a red fox", n=2, response_format=form, extra_body={"seed": 7})
        assert len(answer.data) == 2 and answer.created > 1e9 and answer.seed == 7
        drawn = np.stack([np.asarray(decoded(picture)) for picture in answer.data])
        np.testing.assert_array_equal(drawn, expected)


def test_metadata_says_what_made_a_picture(client):
    answer = client.images.generate(prompt="a blue heart", response_format="b64_json", model="dall-e-2")
    picture = decoded(answer.data[0])
    settings = json.loads(picture.text["unclip"])
    assert settings["prompt"] == "a blue heart" and settings["seed"] == answer.seed
    assert settings["model"] == "tiny" and settings["position"] == 0
    assert "generated" in picture.text["Comment"]
    assert "trainedAlgorithmicMedia" in picture.text["XML:com.adobe.xmp"]


def test_sizes(client):
    """Own sizes are drawn; others are resized from the nearest own size, and a header says so."""
    raw = client.images.with_raw_response
    for side, resized in ((8, None), (16, None), (64, "16x16 to 64x64")):
        response = raw.generate(
            prompt="a fox", size=f"{side}x{side}", response_format="b64_json", extra_body={"seed": 1}
        )
        assert response.headers.get("x-unclip-resized") == resized
        assert decoded(response.parse().data[0]).size == (side, side)
    with pytest.raises(openai.BadRequestError, match="square"):
        client.images.generate(prompt="a fox", size="1024x1792")


def test_models(client, models):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.sizes == ["8x8", "16x16"]
    assert client.models.retrieve("tiny").priors == list(models.first.priors)
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-image-9")
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 characters"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000 characters"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 11}, "n", "at most 10"),
        ({"size": "huge"}, "size", "such as 64x64"),
        ({"size": "4x4"}, "size", "from 8x8"),
        ({"response_format": "tiff"}, "response_format", "one of url, b64_json"),
        ({"quality": "hd"}, "quality", "one of auto, standard"),
        ({"extra_body": {"seed": -1}}, "seed", "at least 0"),
        ({"extra_body": {"seed": 1.5}}, "seed", "type integer"),
        ({"extra_body": {"n": True}}, "n", "type integer"),
        ({"extra_body": {"steps": 0}}, "steps", "at least 1"),
        ({"extra_body": {"prior": "gan"}}, "prior", "one of prior_diffusion"),
        ({"extra_body": {"guidance_scale": "3"}}, "guidance_scale", "type number"),
        ({"extra_body": {"eta": 2}}, "eta", "at most 1"),
        ({"extra_body": {"candidates": 2, "prior": "null"}}, "candidates", "draws nothing"),
        ({"extra_body": {"negative_prompt": "blur"}}, "negative_prompt", "takes no negative prompt"),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown field"),
    ],
)
def test_bad_fields(client, fields, param, message):
    """400, and one line that names the field."""
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": "a fox", **fields})
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert message in error.value.body["message"] and "\n" not in error.value.body["message"]
    assert error.value.response.headers["x-should-retry"] == "false" and error.value.request_id


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        client.images.generate(prompt="a fox", model="dall-e-3")
