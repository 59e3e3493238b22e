"""Endpoints that draw: the three published ones, and the paper's own verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.responses import Response

from unclip_jax.errors import UserError, one_line
from unclip_jax.sampling.edits.coders import coder_of
from unclip_jax.sampling.edits.interpolation import between
from unclip_jax.sampling.edits.inversion import Latents
from unclip_jax.sampling.edits.reconstruct import DIMS, check_dims, components
from unclip_jax.sampling.edits.text_diff import direction_between, turned
from unclip_jax.serve import fields, uploads
from unclip_jax.serve.errors import KINDS, ApiError
from unclip_jax.serve.models import Model
from unclip_jax.serve.service import Plan, Service, new_seed

JSON = "application/json"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": code or kind, "content": {JSON: {"schema": ERROR}}}
    for status, (kind, code) in KINDS.items()
}
FILE = {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, GIF or BMP"}
TWO = {"type": "array", "items": FILE, "minItems": 2, "maxItems": 2}
MOST = 10  # pictures of one answer


def json_body(verb: str) -> dict[str, Any]:
    """The OpenAPI description of a JSON request."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": fields.schema(verb)}}}}


def form(verb: str, files: Mapping[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI description of a form."""
    body = {"schema": fields.schema(verb, files, needed)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": body}}}


def check_verb(model: Model, verb: str) -> None:
    """Raises an ApiError where a bundle cannot do what is asked."""
    if verb not in model.verbs:
        known = ", ".join(model.verbs)
        raise ApiError(400, f"the model {model.name} cannot do {verb}; it can do {known}", "model")


def add_drawing(app: FastAPI, service: Service) -> None:
    """Adds the endpoints that draw."""
    models, settings = service.models, service.settings

    async def read_form(request: Request, verb: str, most: int, mask: bool = False) -> tuple[dict, dict]:
        text, files = await uploads.read_form(request, settings, {"image": most, "mask": int(mask)})
        values = fields.check_fields(verb, text, text=True)
        service.log(request, verb, values)
        fields.read_size(values["size"])
        return values, files

    async def decode_all(files: Sequence[bytes], name: str = "image") -> list[np.ndarray]:
        return [await uploads.picture(data, settings, service.decoding, name) for data in files]

    # ----------------------------------------------------------------------------------- published endpoints
    @app.post("/v1/images/generations", openapi_extra=json_body("generations"), responses=ANSWERS)
    async def generations(request: Request) -> Response:
        """Pictures of a caption."""
        values = fields.check_fields("generations", await uploads.read_json(request, settings))
        service.log(request, "generations", values)
        fields.read_size(values["size"])
        model, seed, n, prompt = models.find(values["model"]), new_seed(values), values["n"], values["prompt"]
        prior = model.prior(values)
        options = model.options(values, prior)
        task = model.generate(prompt, n, seed, prior, options)
        how = {"model": model.name, "prompt": prompt, "seed": seed, "prior": prior, "options": options}
        plan = Plan(
            model, task, [{**how, "position": i} for i in range(n)], "image_generation", {"seed": seed}
        )
        return await service.respond(request, plan, values)

    @app.post(
        "/v1/images/edits",
        openapi_extra=form("edits", {"image": FILE, "mask": FILE}, ["image"]),
        responses=ANSWERS,
    )
    async def edits(request: Request) -> Response:
        """Pictures drawn anew where the mask, or their own alpha, is transparent."""
        values, files = await read_form(request, "edits", MOST, mask=True)
        model, seed, n, prompt = models.find(values["model"]), new_seed(values), values["n"], values["prompt"]
        check_verb(model, "edits")
        if n * len(files["image"]) > MOST:
            raise ApiError(400, f"n times the number of images must be at most {MOST}", "n")
        pairs = []
        for i, data in enumerate(files["image"]):
            mask = files["mask"][0] if i == 0 and files["mask"] else None
            pairs.append(await uploads.picture_and_mask(data, mask, settings, service.decoding))
        prior = model.prior(values)
        options = model.options(values, prior)
        task = model.inpaint(pairs, prompt, n, seed, prior, options)
        how = {"model": model.name, "prompt": prompt, "seed": seed, "prior": prior, "options": options}
        every = [{**how, "position": i} for i in range(len(task.rows))]
        return await service.respond(request, Plan(model, task, every, "image_edit", {"seed": seed}), values)

    @app.post(
        "/v1/images/variations",
        openapi_extra=form("variations", {"image": FILE}, ["image"]),
        responses=ANSWERS,
    )
    async def variations(request: Request) -> Response:
        """Pictures that show what an image shows, and differ in the rest."""
        values, files = await read_form(request, "variations", 1)
        model, seed, n = models.find(values["model"]), new_seed(values), values["n"]
        check_verb(model, "variations")
        ends = await encode(request, model, await decode_all(files["image"]), values)
        drawn = Latents(*(np.repeat(a, n, axis=0) for a in ends))
        return await follow(
            request, model, "image_variation", drawn, values, seed, range(n), values["eta"], {}
        )

    # -------------------------------------------------------------------------------------- the paper's verbs
    async def encode(
        request: Request, model: Model, images: list[np.ndarray], values: Mapping[str, Any]
    ) -> Latents:
        task = model.encode(images, values["steps"], values["guidance_scale"])
        return Latents(*map(np.stack, zip(*await service.draw(request, task))))

    async def follow(
        request: Request,
        model: Model,
        kind: str,
        latents: Latents,
        values: Mapping[str, Any],
        seed: int,
        positions: Sequence[int],
        eta: float,
        more: Mapping[str, Sequence[Any]],
    ) -> Response:
        # Draws latents, and answers. `more` is what is said of each picture.
        pairs = list(zip(*latents))
        task = model.decode(pairs, seed, list(positions), values["steps"], values["guidance_scale"], eta)
        how = {"model": model.name, "kind": kind, "seed": seed, "eta": eta}
        named = ("source", "target", "noise", "steps", "guidance_scale")
        how |= {name: values[name] for name in named if values.get(name)}
        every = [
            {**how, "position": position, **{name: column[i] for name, column in more.items()}}
            for i, position in enumerate(positions)
        ]
        return await service.respond(request, Plan(model, task, every, kind, {"seed": seed}), values)

    @app.post(
        "/v1/unclip/interpolate",
        openapi_extra=form("interpolate", {"image[]": TWO}, ["image[]"]),
        responses=ANSWERS,
    )
    async def interpolate(request: Request) -> Response:
        """Pictures on the way from the first image to the second (unCLIP section 3.2)."""
        values, files = await read_form(request, "interpolate", 2)
        if len(files["image"]) != 2:
            raise ApiError(400, f"interpolate takes two images, got {len(files['image'])}", "image")
        model, seed, n = models.find(values["model"]), new_seed(values), values["n"]
        check_verb(model, "interpolate")
        ends = await encode(request, model, await decode_all(files["image"]), values)
        with bad_request():
            latents = between(ends, n, values["noise"], seed)
        thetas = {"theta": np.linspace(0, 1, n).tolist()}
        return await follow(
            request, model, "image_interpolation", latents, values, seed, [0] * n, 0.0, thetas
        )

    @app.post(
        "/v1/unclip/text_diff", openapi_extra=form("text_diff", {"image": FILE}, ["image"]), responses=ANSWERS
    )
    async def text_diff(request: Request) -> Response:
        """An image changed in the direction from one caption to another (unCLIP section 3.3)."""
        values, files = await read_form(request, "text_diff", 1)
        model, seed, n = models.find(values["model"]), new_seed(values), values["n"]
        check_verb(model, "text_diff")
        captions = await service.draw(request, model.embed_captions([values["source"], values["target"]]))
        with bad_request("target"):
            direction = direction_between(*captions)
        image = await encode(request, model, await decode_all(files["image"]), values)
        with bad_request():
            latents = turned(image, direction, n, values["max_theta"])
        thetas = {"theta": np.linspace(0, values["max_theta"], n).tolist()}
        return await follow(request, model, "image_text_diff", latents, values, seed, [0] * n, 0.0, thetas)

    @app.post(
        "/v1/unclip/reconstruct",
        openapi_extra=form("reconstruct", {"image": FILE}, ["image"]),
        responses=ANSWERS,
    )
    async def reconstruct(request: Request) -> Response:
        """An image from more and more principal components of its embedding (unCLIP figure 7)."""
        values, files = await read_form(request, "reconstruct", 1)
        model, seed = models.find(values["model"]), new_seed(values)
        check_verb(model, "reconstruct")
        most = model.sampler.network("codec").config["embed_dim"]
        if values["dims"] is None:
            dims = [*(number for number in DIMS if number < most), most]
        else:
            dims = [int(number) for number in values["dims"].split(",")]
        with bad_request("dims"):
            for number in dims:
                check_dims(number, most)
        (z_image,) = await service.draw(request, model.embed_images(await decode_all(files["image"])))
        shape = coder_of(model.sampler).noise_shape(model.sampler)
        latents = components(model.sampler.bundle, z_image[None], dims, shape, seed)
        return await follow(
            request,
            model,
            "image_reconstruction",
            latents,
            values,
            seed,
            [0] * len(dims),
            0.0,
            {"dims": dims},
        )


class bad_request:
    """A context in which errors about the input become answers with status 400.

    param: the field at fault.
    """

    def __init__(self, param: str | None = None):
        self.param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise ApiError(400, one_line(error), self.param) from None
