"""Chromium without a window, and what its tests share."""

import json
import shutil
from contextlib import contextmanager

from playwright.sync_api import sync_playwright
from test_api_plans import ASKED

import horizonplan as hp

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
REFUSED = "Failed to load resource: the server responded with a status of 4"  # what a browser says of an error page


@contextmanager
def chromium():
    """The system's browser. There must be one: the page is tested nowhere else."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "the page is tested in Chromium: install it (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visits(browser, address):
    """A function that opens pages of a service; at the end nothing may have appeared on their consoles.

    Its argument ``ignored`` is how messages begin that are part of the test.
    """
    complaints, contexts = [], []

    def opened(path="/", ignored=None, **options):
        def complain(text):
            if ignored is None or not text.startswith(ignored):
                complaints.append(text)

        context = browser.new_context(base_url=address, viewport=options.pop("viewport", WIDE), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.goto(path)
        return page

    try:
        yield opened
    finally:
        for context in contexts:
            context.close()
    assert not complaints, complaints


def posted(page, path, body):
    """What the API answers to a body, asked with the browser's cookies."""
    answer = page.request.post(path, data=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status in (201, 202), answer.text()
    return answer.json()


def stored(page, **changes):
    """A plan made over the API."""
    return posted(page, "/v1/plans", ASKED | changes)


def choice_of(plan):
    """What the page calls the choice of a plan, of which ``h`` is not the depth."""
    row = hp.Plan.from_dict(plan).row
    return f"h = {row.horizon}, stride {row.stride}"


def choice(page):
    """Where the page says what to train with."""
    return page.locator("#choice-title")


def set_slider(page, name, *positions):
    """As dragging does: an event at each position, one after another without a pause."""
    page.locator(f"#d-{name}-slider").evaluate(
        """(slider, positions) => positions.forEach((at) => {
            slider.value = at;
            slider.dispatchEvent(new Event("input", {bubbles: true}));
        })""",
        positions,
    )
