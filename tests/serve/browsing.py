"""A browser that opens the page of the test server, and what tests do with it."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROMPT = "a red apple"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium, then run this again"
)


@pytest.fixture(scope="session")
def address(server):
    """The address of the page."""
    return f"{server[0]}/"


@pytest.fixture(scope="session")
def side(server):
    """The side in pixels of the pictures that the server draws."""
    return server[1].models.first.sizes[-1]


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers run as root, where the sandbox does not work, and have little shared memory.
        args = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Returns a function that opens the page in a browser that knows nothing of earlier visits."""
    contexts, complaints = [], []

    def open_page(width=1280, height=860, scheme="light", wait=True, touch=False):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=touch,
        )
        contexts.append(context)
        # The browser does not tell playwright what files a form holds, so the page keeps its forms.
        context.add_init_script(
            """window.sentForms = [];
            const send = window.fetch;
            window.fetch = (address, options) => {
                if (options?.body instanceof FormData) window.sentForms.push(options.body);
                return send(address, options);
            };"""
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: outside(asked.url))
        page.complaints = complaints
        page.goto(address)
        if wait:
            page.locator("#model option").first.wait_for(state="attached")
        return page

    def outside(url):
        if not url.startswith((address, "blob:", "data:")):
            complaints.append(f"asked {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def draw(page, prompt=PROMPT, n=2, seed=7):
    """Draws with the form, and returns the card of the finished run."""
    before = page.locator(".run:not([aria-busy])").count()
    page.fill("#prompt", prompt)
    if not page.locator("#settings").is_visible():
        page.click("#toggle-settings")
    page.fill("#seed", str(seed))
    while not page.locator("#number-shown").inner_text().startswith(f"{n} "):
        page.click("#fewer" if int(page.locator("#number-shown").inner_text().split()[0]) > n else "#more")
    page.click("#draw")
    finished = page.locator(".run:not([aria-busy])")
    finished.nth(before).wait_for()
    return finished.first


def open_picture(page, index=0):
    page.locator(".run .tile").nth(index).click()
    page.locator("#viewer[open]").wait_for()


def open_editor(page):
    page.get_by_role("button", name="Edit").click()
    page.locator("#editor[open] canvas").wait_for()


def paint(page, start, end):
    """Paints a stroke; points are shares of the frame, which fills the picture of a fresh editor."""
    box = page.locator("#sheet-holder canvas").bounding_box()
    side = min(box["width"], box["height"]) - 2 * min(48, box["width"] / 12)
    left = box["x"] + (box["width"] - side) / 2
    top = box["y"] + (box["height"] - side) / 2
    page.mouse.move(left + side * start[0], top + side * start[1])
    page.mouse.down()
    page.mouse.move(left + side * end[0], top + side * end[1], steps=6)
    page.mouse.up()


def edit_request(page):
    """Presses Draw in the editor and returns the uploaded (image, mask) as arrays."""
    with page.expect_request("**/v1/images/edits"):
        page.click("#editor-draw")
    files = page.evaluate(
        """async () => {
            const sent = ["image", "mask"].map((name) => window.sentForms.at(-1).get(name));
            return Promise.all(sent.map(async (file) => [...new Uint8Array(await file.arrayBuffer())]));
        }"""
    )
    return (np.asarray(Image.open(io.BytesIO(bytes(file)))) for file in files)


def saved_file(page, press):
    with page.expect_download() as started:
        press()
    data = Path(started.value.path()).read_bytes()
    return started.value.suggested_filename, Image.open(io.BytesIO(data))


def pixels(image):
    return np.asarray(image.convert("RGB"))
