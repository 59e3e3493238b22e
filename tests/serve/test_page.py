"""The page in a real browser: drawing, history, files, keys, errors and looks."""

import io
import json
import os
import re
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import unclip_jax
from tests.serve.browsing import PROMPT, draw, needs_browser, open_editor, open_picture, pixels, saved_file
from unclip_jax.errors import InputError
from unclip_jax.serve.gate import headers_for
from unclip_jax.serve.settings import Settings

PAGE = Path(unclip_jax.__file__).parent / "serve" / "page"


# ------------------------------------------------------------------------------------------------ files
def test_the_page_is_small_and_asks_nobody_else():
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    for path in files:
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\s\"'<>)]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name
        assert len(text.splitlines()) <= 450, path.name


def test_the_document_holds_no_script_and_no_style_of_its_own():
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "script-src 'self'; style-src 'self'" in text
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    named = set(re.findall(r'href="#icon-([a-z]+)"', text))
    for path in PAGE.glob("*.js"):
        named |= set(re.findall(r"icon: \"([a-z]+)\"", path.read_text(encoding="utf-8")))
    assert named <= set(re.findall(r'id="icon-([a-z]+)"', text)), "an icon that is not there"


def test_other_sites_show_the_page_only_where_they_may_call_the_server(server):
    with urllib.request.urlopen(server[0]) as answer:
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    allowed = Settings(origins=("https://a.example", "https://b.example:8443"))
    allowed.check()
    policy = headers_for(allowed)["content-security-policy"]
    assert policy.endswith("frame-ancestors https://a.example https://b.example:8443")
    for origin in ("https://a.example/path", "https://a.example; script-src *", "a.example", "null"):
        with pytest.raises(InputError, match="--cors takes an origin"):
            Settings(origins=(origin,)).check()


def test_the_package_carries_the_page():
    text = Path(unclip_jax.__file__).parents[1].joinpath("setup.py").read_text(encoding="utf-8")
    assert "serve/page/*" in text


@needs_browser
def test_draws_shows_and_keeps_pictures_with_their_settings(open_page, side):
    page = open_page()
    assert page.locator("#empty").is_visible()
    card = draw(page, n=3)
    assert card.locator("img").count() == 3
    assert page.locator("#empty").is_hidden()
    about = card.locator(".run-about").inner_text()
    assert "seed 7" in about and "steps" in about and "guidance" in about
    # A second visit finds the history and the form as they were.
    page.reload()
    card = page.locator(".run").first
    assert card.locator("h2").inner_text() == PROMPT
    assert card.locator(".run-about").inner_text() == about
    assert page.input_value("#prompt") == PROMPT and page.input_value("#seed") == "7"
    open_picture(page, 2)
    facts = dict(
        zip(page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts())
    )
    assert facts["Prompt"] == PROMPT and facts["Seed"] == "7" and facts["Steps"].isdigit()
    assert page.locator("#shown").evaluate("image => image.naturalWidth") == side


@needs_browser
def test_a_downloaded_picture_carries_its_settings_and_gives_them_back(open_page):
    page = open_page()
    draw(page, n=2, seed=11)
    open_picture(page, 1)
    name, image = saved_file(page, lambda: page.get_by_role("button", name="Download").click())
    assert name == "a-red-apple-11-2.png"
    said = json.loads(image.text["unclip"])
    assert said["prompt"] == PROMPT and said["seed"] == 11 and said["picture"] == 1
    assert {"model", "steps", "guidance_scale", "n"} <= set(said)
    # Another browser opens the file, and draws the same picture with its settings.
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=text_of(image))
    other = open_page()
    other.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": data.getvalue()})
    other.get_by_role("button", name="Use these settings").click()
    assert other.input_value("#prompt") == PROMPT and other.input_value("#seed") == "11"
    other.click("#draw")
    other.locator(".run:not([aria-busy])").nth(1).wait_for()
    open_picture(other, 1)
    _, again = saved_file(other, lambda: other.get_by_role("button", name="Download").click())
    assert np.abs(pixels(again).astype(int) - pixels(image)).max() <= 1


def text_of(image):
    info = PngInfo()
    info.add_itxt("unclip", image.text["unclip"])
    return info


@needs_browser
def test_keys(open_page):
    page = open_page()
    page.locator("body").click(position={"x": 5, "y": 400})
    page.keyboard.press("?")
    assert "Undo" in page.locator("#help[open]").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.keyboard.press("s")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("a pear?")
    assert page.input_value("#prompt") == "a pear?"
    page.keyboard.press("Enter")
    page.locator(".run:not([aria-busy]) .tile").nth(3).wait_for()
    page.locator(".run .tile").first.focus()
    page.keyboard.press("Enter")
    first = page.locator("#shown").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert page.locator("#strip [aria-current=true]").get_attribute("aria-label") == "Picture 2"
    assert page.locator("#shown").get_attribute("src") != first
    page.keyboard.press("Escape")
    # The focus returns to where it was.
    assert page.locator(".run .tile").first.evaluate("node => node === document.activeElement")


@needs_browser
@pytest.mark.parametrize(
    "status, headers, words",
    [
        (429, {"retry-after": "7"}, "The server is busy. Try again in 7 s."),
        (503, {}, "The server is not ready. Try again in a moment."),
        (400, {}, "steps is out of range"),
        (500, {}, "The server failed. Its log says why."),
        (None, {}, "The server does not answer."),
    ],
)
def test_errors_in_words(open_page, status, headers, words):
    page = open_page()
    message = "steps is out of range" if status == 400 else ""
    error = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})

    def answer(route):
        if status is None:
            return route.abort()
        return route.fulfill(status=status, headers=headers, body=error, content_type="application/json")

    page.route("**/v1/images/generations", answer)
    page.fill("#prompt", PROMPT)
    page.click("#draw")
    page.get_by_text(words).wait_for()
    assert page.locator(".run").count() == 0
    page.unroute("**/v1/images/generations")
    page.get_by_role("button", name="Try again").click()
    page.locator(".run:not([aria-busy]) .tile").first.wait_for()
    # The browser itself logs failed requests.
    page.complaints[:] = [said for said in page.complaints if "Failed to load resource" not in said]


@needs_browser
def test_a_server_that_is_not_ready_says_so(open_page):
    page = open_page()
    page.route("**/healthz", lambda route: route.fulfill(status=503, json={"status": "compiling"}))
    page.reload()
    page.get_by_text("The server prepares its programs").wait_for()
    # Its bundles are there already.
    page.locator("#model option").first.wait_for(state="attached")
    page.unroute("**/healthz")
    page.locator("#banner").wait_for(state="hidden")
    page.complaints[:] = [said for said in page.complaints if "503" not in said]


@needs_browser
def test_a_key_is_asked_for(open_page, address):
    page = open_page(wait=False)
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
    page.reload()
    page.locator("#connection[open]").wait_for()
    page.unroute("**/v1/models")
    page.fill("#key", "a secret key")
    with page.expect_request("**/v1/models") as asked:
        page.get_by_role("button", name="Use this key").click()
    assert asked.value.headers["authorization"] == "Bearer a secret key"
    page.complaints[:] = [said for said in page.complaints if "401" not in said]


@needs_browser
def test_chunks_and_masks_by_their_definition(open_page):
    page = open_page()
    data = bytes(range(256)) * 3
    found = page.evaluate(
        """async (data) => (await import("./png.js")).crc32(new Uint8Array(data))""", list(data)
    )
    assert found == zlib.crc32(data)
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    settings = {"prompt": "naïve 🍐", "seed": 4294967295}
    twice = page.evaluate(
        """async ([data, first, settings]) => {
            const { readSettings, writeSettings } = await import("./png.js");
            const bytes = writeSettings(writeSettings(new Uint8Array(data), first), settings);
            return [[...bytes], readSettings(bytes), readSettings(new Uint8Array([1, 2, 3]))];
        }""",
        [list(file.getvalue()), {"prompt": "old"}, settings],
    )
    image = Image.open(io.BytesIO(bytes(twice[0])))
    image.load()
    assert json.loads(image.text["unclip"]) == settings == twice[1] and twice[2] is None
    assert bytes(twice[0]).count(b"unclip\0") == 1
    height, width, (ax, ay), (bx, by), radius = 20, 30, (4.0, 5.5), (25.0, 12.0), 3.2
    mask = page.evaluate(
        """async ([w, h, a, b, r]) => {
            const mask = new Uint8Array(w * h), point = ([x, y]) => ({ x, y });
            (await import("./sheet.js")).paintLine(mask, w, h, point(a), point(b), r, 1);
            return [...mask];
        }""",
        [width, height, (ax, ay), (bx, by), radius],
    )
    y, x = np.mgrid[:height, :width] + 0.5
    along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
    far = np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay))
    np.testing.assert_array_equal(np.reshape(mask, (height, width)) == 1, far <= radius)


@needs_browser
@pytest.mark.parametrize("width", [375, 768, 1280])
def test_every_width_in_both_colours(open_page, tmp_path, width):
    # The pictures are for the eye: set UNCLIP_SCREENSHOTS to a folder to keep them.
    folder = Path(os.environ.get("UNCLIP_SCREENSHOTS", tmp_path))
    page = open_page(width=width, height=800)
    draw(page, n=4)
    backs = set()

    def look(name, scheme):
        page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
        over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 0, f"{name} is wider than {width} pixels"

    for scheme in ("light", "dark"):
        dark = page.locator("#switch-theme").get_attribute("aria-pressed") == "true"
        if dark != (scheme == "dark"):
            page.click("#switch-theme")
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        look("feed", scheme)
        open_picture(page)
        look("viewer", scheme)
        open_editor(page)
        look("editor", scheme)
        boxes = [tool.bounding_box() for tool in page.locator("#toolbar button, #editor-draw").all()]
        assert all(0 <= box["x"] and box["x"] + box["width"] <= width for box in boxes)
        page.keyboard.press("Escape")
        page.locator("#editor").wait_for(state="hidden")
    assert len(backs) == 2
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
