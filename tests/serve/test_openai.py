"""The unmodified `openai` client against a running server."""

import asyncio
import base64
import io
import json
import threading
import time

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

import unclip_jax
from tests.serve.running import run_async, running


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


# ------------------------------------------------------------------------------------ edits and variations
@pytest.fixture(scope="module")
def photo():
    """A picture, uint8 (20, 20, 3)."""
    return np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)


def png(image, alpha=None):
    """A picture as the bytes of a PNG, with an alpha channel where one is given."""
    file = io.BytesIO()
    stacked = image if alpha is None else np.dstack([image, alpha])
    Image.fromarray(stacked).save(file, format="PNG")
    return file.getvalue()


def pixels(answer):
    return np.stack([np.asarray(decoded(picture)).astype(int) for picture in answer.data])


LEFT = np.repeat(
    (np.arange(20) < 10)[None] * np.uint8(255), 20, axis=0
)  # alpha: the right half is drawn anew


def test_edits_with_a_mask_and_with_alpha(client, models, photo):
    """Both draw the transparent half anew, as `inpaint` does, and keep the other half to the bit."""
    from unclip_jax.sampling.edits.inpaint import inpaint

    shared = {"prompt": "a red fox", "n": 2, "response_format": "b64_json", "extra_body": {"seed": 3}}
    masked = pixels(client.images.edit(image=png(photo), mask=png(photo, LEFT), **shared))
    own = pixels(client.images.edit(image=png(photo, LEFT), **shared))
    draw = lambda image: inpaint(models.first.sampler, image, LEFT > 0, "a red fox", count=2, seed=3).astype(
        int
    )
    expected, on_white = draw(photo), draw(np.where(LEFT[..., None] > 0, photo, np.uint8(255)))
    assert np.abs(masked - expected).max() <= 1 and np.abs(own - on_white).max() <= 1
    np.testing.assert_array_equal(masked[:, :, :8], expected[:, :, :8])
    assert np.abs(masked[0] - masked[1]).max() > 3


def test_several_images_are_edited_one_after_another(client, photo):
    """The mask is that of the first; the second one's own alpha decides."""
    answer = client.images.edit(
        image=[png(photo), png(photo[::-1], LEFT)],
        mask=png(photo, LEFT.T),
        prompt="a fox",
        response_format="b64_json",
    )
    assert [picture.position for picture in answer.data] == [0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mask": lambda photo: png(photo[:10], LEFT[:10])}, "the mask is 20x10, but the image is 20x20"),
        ({"mask": lambda photo: png(photo // 4)}, "nothing is to be drawn anew: the mask is opaque"),
        ({}, "the picture is opaque: give a mask"),
        ({"mask": lambda photo: b"GIF89a damaged"}, "mask"),
    ],
)
def test_bad_masks(client, photo, files, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.images.edit(image=png(photo), prompt="x", **{k: make(photo) for k, make in files.items()})


def test_variations(client, models, photo):
    """They are those of `variations`, and at eta 0 the picture's reconstruction."""
    from unclip_jax.sampling.edits.variations import variations

    answer = client.images.create_variation(
        image=png(photo), n=2, response_format="b64_json", extra_body={"seed": 4}
    )
    expected = variations(models.first.sampler, [photo], count=2, seed=4)[0].astype(int)
    assert np.abs(pixels(answer) - expected).max() <= 1
    assert np.abs(expected[0] - expected[1]).max() > 3
    still = client.images.create_variation(
        image=png(photo), n=2, size="8x8", response_format="b64_json", extra_body={"eta": 0}
    )
    first, second = pixels(still)  # before the upsampler, whose noise differs
    assert np.abs(first - second).max() <= 1


def test_the_papers_verbs(server, models, photo):
    """Interpolation, text diff and reconstruction are those of their functions."""
    from unclip_jax.sampling.edits.interpolation import interpolate
    from unclip_jax.sampling.edits.reconstruct import reconstruct
    from unclip_jax.sampling.edits.text_diff import text_diff

    def post(verb, fields, *images):
        files = [("image[]" if len(images) > 1 else "image", ("a.png", png(i), "image/png")) for i in images]
        shared = {"response_format": "b64_json", "seed": "5"}
        response = httpx.post(f"{server[0]}/v1/unclip/{verb}", data=shared | fields, files=files, timeout=600)
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        decode = lambda picture: Image.open(io.BytesIO(base64.b64decode(picture["b64_json"])))
        return np.stack([np.asarray(decode(picture)).astype(int) for picture in data]), data

    sampler = models.first.sampler
    drawn, data = post("interpolate", {"n": "2"}, photo, photo[::-1])
    assert np.abs(drawn - interpolate(sampler, photo, photo[::-1], count=2, seed=5)).max() <= 1
    assert [picture["theta"] for picture in data] == [0, 1]
    drawn, data = post("text_diff", {"n": "2", "source": "a fox", "target": "a heart"}, photo)
    assert np.abs(drawn - text_diff(sampler, photo, "a fox", "a heart", count=2, seed=5)).max() <= 1
    assert [picture["theta"] for picture in data] == [0, 0.5]
    drawn, data = post("reconstruct", {"dims": "2,4"}, photo)
    assert np.abs(drawn - reconstruct(sampler, photo, dims=(2, 4), seed=5)[0]).max() <= 1
    assert [picture["dims"] for picture in data] == [2, 4]


# --------------------------------------------------------------------------------------------- streaming
def test_stream(client, models):
    """Pictures clear up: events as published, and at the end the pictures of `text_to_image`."""
    events = list(
        client.images.generate(prompt="a red fox", n=2, stream=True, partial_images=3, extra_body={"seed": 7})
    )
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert events == [*partial, *completed] and len(completed) == 2
    assert sorted((event.index, event.partial_image_index) for event in partial) == [
        (i, k) for i in range(2) for k in range(3)
    ]
    expected = unclip_jax.text_to_image(models.first.sampler, ["a red fox"] * 2, seed=7).astype(int)
    drawn = np.stack([np.asarray(decoded(event)) for event in completed]).astype(int)
    assert np.abs(drawn - expected).max() <= 1
    first = np.asarray(decoded(partial[0])).astype(int)
    assert first.shape == expected[0].shape and np.abs(first - expected[0]).mean() > 1
    assert completed[0].seed == 7 and completed[0].size == "16x16"


def test_streams_of_edits_and_variations(client, photo):
    """They end with the pictures of the plain answers.

    The programs that show them on the way are compiled when they are first asked for. Until then, the stream
    has the finished pictures alone.
    """
    form = {"partial_images": 2, "seed": 3, "stream": True}
    cases = {
        "image_edit": lambda stream: client.images.edit(
            image=png(photo, LEFT),
            prompt="a fox",
            response_format="b64_json",
            extra_body={k: v for k, v in form.items() if stream or k == "seed"},
            **({"stream": True} if stream else {}),
        ),
        "image_variation": lambda stream: client.post(
            "/images/variations",
            cast_to=openai.types.ImagesResponse,
            body={"response_format": "b64_json", **{k: v for k, v in form.items() if stream or k == "seed"}},
            files=[("image", ("a.png", png(photo), "image/png"))],
            options={"headers": {"content-type": "multipart/form-data"}},
            stream=stream,
            stream_cls=openai.Stream[openai.types.ImageEditStreamEvent],
        ),
    }
    for kind, ask in cases.items():
        expected, until = pixels(ask(False)), time.monotonic() + 600
        while True:
            *shown, last = list(ask(True))
            assert last.type == f"{kind}.completed"
            assert np.abs(np.asarray(decoded(last)).astype(int) - expected[0]).max() <= 1
            if shown:
                break
            assert time.monotonic() < until
            time.sleep(0.2)
        assert [event.type for event in shown] == [f"{kind}.partial_image"] * 2
        assert [event.partial_image_index for event in shown] == [0, 1]


# ---------------------------------------------------------------------------------------- clients' manners
def test_async_client_and_joined_requests(server, models):
    """Requests at the same time share batches, and each gets its own picture."""

    sampler, before = models.first.sampler, server[1].telemetry.slots._value.get()

    async def draw():
        client = openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
        async with client:
            asked = [
                client.images.generate(
                    prompt=prompt,
                    response_format="b64_json",
                    extra_body={"seed": seed, "guidance_scale": 2 + seed / 4},
                )
                for seed, prompt in enumerate(["a fox", "a heart", "a car", "a fox"])
            ]
            return await asyncio.gather(*asked)

    answers = run_async(draw())
    for seed, (prompt, answer) in enumerate(zip(["a fox", "a heart", "a car", "a fox"], answers)):
        options = {"decoder": {"guidance_scale": 2 + seed / 4}}
        expected = unclip_jax.text_to_image(sampler, prompt, seed=seed, options=options).astype(int)
        assert np.abs(pixels(answer) - expected).max() <= 1
    assert server[1].telemetry.slots._value.get() - before <= 4


def test_a_timeout_ends_the_request(server):
    """The client gives up, and the server drops what it asked for."""
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="a fox", n=10, extra_body={"steps": 250})


def test_a_full_queue_is_tried_again(models):
    """429 and 503 come with `retry-after`, and the client's own retries succeed."""
    with running(models, wait_for=False, batch=1, queue=2) as (address, service):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=600)
        drawing, gate, draw = threading.Event(), threading.Event(), service.worker._draw
        service.worker._draw = lambda *args: (drawing.set(), gate.wait(600), draw(*args))
        ask = lambda n: threading.Thread(target=client.images.generate, kwargs={"prompt": "a fox", "n": n})
        threads = [ask(1), ask(2)]
        threads[0].start()
        assert drawing.wait(600)
        threads[1].start()
        while service.worker._waiting() < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as error:
            client.images.generate(prompt="a fox", n=2)
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert error.value.response.headers["x-should-retry"] == "true"
        threading.Timer(0.2, gate.set).start()
        patient = client.with_options(max_retries=5)
        assert len(patient.images.generate(prompt="a fox").data) == 1
        for thread in threads:
            thread.join()
