"""The page in a real browser: masks, the frame, variations, paths, dropped files, and accessibility."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.serve.browsing import (
    draw,
    edit_request,
    needs_browser,
    open_editor,
    open_picture,
    paint,
    pixels,
    saved_file,
)


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def drop(page, name, kind, content):
    """Drops a file onto the page."""
    page.evaluate(
        """([name, type, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            document.body.dispatchEvent(
                new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [name, kind, list(content)],
    )


@needs_browser
def test_a_painted_part_is_drawn_anew_and_the_rest_stays(open_page, side):
    page = open_page()
    draw(page, n=1)
    open_picture(page)
    _, before = saved_file(page, lambda: page.get_by_role("button", name="Download").click())
    open_editor(page)
    page.fill("#editor-prompt", "a green apple")
    # Without paint nothing is sent.
    page.click("#editor-draw")
    page.get_by_text("Nothing is to be drawn yet").wait_for()
    page.locator("#editor .notice button").click()
    paint(page, (0.25, 0.5), (0.75, 0.5))
    undo, redo = (page.get_by_role("button", name=name) for name in ("Undo", "Redo"))
    undo.click()
    page.click("#editor-draw")
    page.get_by_text("Nothing is to be drawn yet").wait_for()
    assert undo.is_disabled()
    redo.click()
    image, mask = edit_request(page)
    assert image.shape[:2] == mask.shape[:2] == (side, side)
    np.testing.assert_array_equal(image[..., :3], pixels(before))
    anew = mask[..., 3] == 0
    assert anew[side // 2, side // 4 : 3 * side // 4].all()
    assert not anew[: side // 3].any() and not anew[2 * side // 3 :].any() and 0.02 < anew.mean() < 0.3
    page.get_by_text("Use this one").wait_for()
    assert page.locator("#candidates .tile").count() == 4
    page.keyboard.press("ArrowRight")
    assert page.locator("#candidates .tile").nth(1).get_attribute("aria-pressed") == "true"
    page.get_by_text("Use this one").click()
    name, after = saved_file(page, lambda: page.locator("#editor-actions button").last.click())
    changed = (pixels(after) != pixels(before)).any(-1)
    assert changed[anew].mean() > 0.5 and not changed[~anew].any()
    said = json.loads(after.text["unclip"])
    assert said["edits"][0]["prompt"] == "a green apple" and said["edits"][0]["picture"] == 1
    # The edit is undone like a stroke.
    undo.click()
    _, undone = saved_file(page, lambda: page.locator("#editor-actions button").last.click())
    np.testing.assert_array_equal(pixels(undone), pixels(before))


@needs_browser
def test_the_frame_moves_past_the_edge_and_the_picture_grows(open_page, side):
    page = open_page()
    draw(page, n=1)
    open_picture(page)
    page.keyboard.press("e")
    page.locator("#editor[open] canvas").wait_for()
    page.keyboard.press("f")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    page.select_option("#editor-count", "2")
    image, mask = edit_request(page)
    anew = mask[..., 3] == 0
    right, up = 3 * side // 8, side // 8
    expected = np.zeros((side, side), bool)
    expected[:up] = expected[:, side - right :] = True
    np.testing.assert_array_equal(anew, expected)
    page.get_by_text("Use this one").wait_for()
    assert page.locator("#candidates .tile").count() == 2
    page.get_by_text("Use this one").click()
    page.keyboard.press("Escape")
    page.locator("#editor").wait_for(state="hidden")
    sheet = page.locator(".run").first
    assert "Edited sheet" in sheet.locator(".run-about").inner_text()
    sheet.locator(".tile").click()
    _, grown = saved_file(page, lambda: page.get_by_role("button", name="Download").click())
    assert grown.size == (side + right, side + up)


@needs_browser
def test_the_brush_works_by_keys_and_the_eraser_takes_paint_away(open_page):
    page = open_page()
    draw(page, n=1)
    open_picture(page)
    open_editor(page)
    page.locator("#sheet-holder canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    clear = page.get_by_role("button", name="Take all paint away")
    assert clear.is_enabled()
    page.keyboard.press("e")
    page.keyboard.press("]")
    page.keyboard.press("Space")
    assert clear.is_disabled(), "the eraser left paint"
    page.keyboard.press("Control+z")
    assert clear.is_enabled()
    zoom = page.locator("#toolbar output").inner_text()
    page.keyboard.press("+")
    assert page.locator("#toolbar output").inner_text() != zoom
    page.keyboard.press("0")
    assert page.locator("#toolbar output").inner_text() == zoom


@needs_browser
def test_one_finger_paints_and_two_zoom(open_page):
    page = open_page(width=375, height=760, touch=True)
    drop(page, "teal.png", "image/png", encoded(Image.new("RGB", (64, 64), "teal"), "PNG"))
    page.locator("#viewer[open]").wait_for()
    open_editor(page)
    box = page.locator("#sheet-holder canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [{"x": x + dx, "y": y + dy, "id": i} for i, (dx, dy) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    undo, zoom = page.get_by_role("button", name="Undo"), page.locator("#toolbar output")
    before = int(zoom.inner_text().split()[0])
    # The first finger's dot is taken back when the second one comes.
    touch("touchStart", (-30, 0))
    touch("touchStart", (-30, 0), (30, 0))
    touch("touchMove", (-60, 0), (60, 0))
    touch("touchEnd")
    page.wait_for_timeout(100)
    assert undo.is_disabled() and int(zoom.inner_text().split()[0]) == pytest.approx(2 * before, abs=2)
    touch("touchStart", (0, 0))
    touch("touchMove", (20, 10))
    touch("touchEnd")
    page.wait_for_timeout(100)
    assert undo.is_enabled() and page.get_by_role("button", name="Take all paint away").is_enabled()


@needs_browser
def test_a_run_goes_on_when_the_viewer_looks_elsewhere(open_page):
    page = open_page()
    draw(page, n=2)
    held = []
    page.route("**/v1/images/variations", lambda route: held.append(route), times=1)
    open_picture(page, 1)
    shown = page.locator("#shown").get_attribute("src")
    page.keyboard.press("v")
    page.get_by_role("button", name="Draw variations").click()
    page.locator("#stage .progress").wait_for()
    page.click("#tab-text_diff")
    page.get_by_label("As it should become").wait_for()
    assert page.locator("#strip .tile").count() == 2 and page.locator("#stage .progress").count() == 0
    assert page.locator("#shown").get_attribute("src") == shown
    page.keyboard.press("Escape")
    assert page.locator(".run[aria-busy]").count() == 1
    held[0].continue_()
    page.locator(".run:not([aria-busy])").nth(1).wait_for()
    assert page.locator(".run").first.locator(".tile").count() == 4
    # Stop ends a run for good. The server must not be faster.
    page.route("**/v1/images/variations", lambda route: held.append(route), times=1)
    open_picture(page)
    page.click("#tab-variation")
    page.get_by_role("button", name="Draw variations").click()
    page.get_by_role("button", name="Stop").last.click()
    page.get_by_role("button", name="Draw variations").wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".run").count() == 2


@needs_browser
def test_variations_interpolation_and_text_diff(open_page):
    page = open_page()
    draw(page, n=2)
    streamed = []
    page.on(
        "response",
        lambda answer: (
            "event-stream" in answer.headers.get("content-type", "") and streamed.append(answer.url)
        ),
    )
    open_picture(page)
    page.keyboard.press("v")
    page.get_by_role("button", name="Draw variations").click()
    page.locator("#strip .tile").nth(3).wait_for()
    page.get_by_role("button", name="Draw variations").wait_for()
    page.keyboard.press("i")
    page.locator(".chooser .tile").last.click()
    page.get_by_role("button", name="Draw the path").click()
    page.get_by_role("button", name="Draw the path").wait_for()
    slider, theta = page.get_by_label("Theta"), page.locator("#slide output")
    slider.focus()
    shown = []
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        shown.append((theta.inner_text(), page.locator("#shown").get_attribute("src")))
    assert shown[-1][0] == "θ 1.00" and len({src for _, src in shown}) == 6
    page.keyboard.press("Escape")
    open_picture(page)
    page.keyboard.press("t")
    page.get_by_label("As it should become").fill("a green pear")
    page.get_by_role("button", name="Draw the change").click()
    page.get_by_role("button", name="Draw the change").wait_for()
    assert page.locator("#strip .tile").count() == 6
    # All three are asked to show their pictures as they clear up.
    assert [url.rsplit("/", 1)[1] for url in streamed] == ["variations", "interpolate", "text_diff"]
    page.keyboard.press("Escape")
    kinds = [text.split(" · ")[0] for text in page.locator(".run-about").all_inner_texts()]
    assert kinds == ["Text diff", "Interpolation", "Variations", "Prompt"]
    # All of it is there after a reload, and what is deleted comes back by Undo alone.
    page.reload()
    page.locator(".run").nth(3).wait_for()
    page.locator(".run").first.get_by_role("button", name="Delete").click()
    page.locator(".run").nth(3).wait_for(state="detached")
    page.get_by_role("button", name="Undo").click()
    page.locator(".run").nth(3).wait_for()


@needs_browser
def test_a_dropped_file_is_opened_and_what_is_no_picture_is_refused_in_words(open_page, side):
    page = open_page()
    drop(page, "a drawing.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    page.get_by_text("a drawing.svg is no picture that can be read").wait_for()
    drop(page, "broken.png", "image/png", b"\x89PNG\r\n\x1a\nnothing")
    page.get_by_text("broken.png is damaged").wait_for()
    drop(page, "teal.jpg", "image/jpeg", encoded(Image.new("RGB", (300, 200), "teal"), "JPEG"))
    page.locator("#viewer[open]").wait_for()
    assert page.locator("#viewer-title").inner_text() == "teal"
    # Edited, its short side becomes the frame's, and what is left over lies outside.
    open_editor(page)
    page.fill("#editor-prompt", "a sea")
    paint(page, (0.5, 0.5), (0.5, 0.6))
    image, _ = edit_request(page)
    assert image.shape[:2] == (side, side)
    page.get_by_text("Use this one").wait_for()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    # What the colours do not change is looked at once.
    axe, rules = Axe(), {"runOnly": ["color-contrast"]} if scheme == "dark" else {}

    def check(page, where):
        found = axe.run(page, options=rules).response["violations"]
        told = [(one["id"], node["html"][:120]) for one in found for node in one["nodes"]]
        assert not told, f"{where}: {told}"

    page = open_page(scheme=scheme)
    check(page, "empty")
    page.click("#toggle-settings")
    draw(page, n=2)
    page.wait_for_timeout(200)
    check(page, "history and settings")
    page.click("#open-help")
    check(page, "help")
    page.keyboard.press("Escape")
    page.click("#open-connection")
    check(page, "connection")
    page.keyboard.press("Escape")
    open_picture(page)
    for tab in ("about", "variation", "interpolate", "text_diff"):
        page.click(f"#tab-{tab}")
        check(page, tab)
    open_editor(page)
    paint(page, (0.3, 0.5), (0.7, 0.5))
    check(page, "editor")
    page.click("#editor-draw")
    page.get_by_text("Use this one").wait_for()
    check(page, "candidates")
