"""The page in a real browser, beyond its walk: keys, other sites' pages, what dragging asks for, the code it shows.

One test is fast, so that every run of the fast tests has seen the page in Chromium.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from api_jobs import TINY, settings_for, wait_for, working
from browsing import REFUSED, choice, choice_of, chromium, posted, set_slider, stored, visits
from playwright.sync_api import expect
from test_api_plans import ASKED

import horizonplan as hp
from horizonplan.api import create_app, security, worker

HOSTILE = "<script>alert(1)</script>"
USER = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])

def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(0, 4, (8,))) for _ in range(2)]
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def running(settings):
    """Application and address of a service in a thread."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        app.state.stopping.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def service(tmp_path):
    with running(settings_for(tmp_path)) as (app, address):
        yield app, address


def pictures(page):
    """The charts as PNG, in text."""
    return page.locator(".chart canvas").evaluate_all("(all) => all.map((canvas) => canvas.toDataURL())")


def test_a_plan_in_the_browser(browser, service):
    """A plan, its curves, and the first move of a dial."""
    with visits(browser, service[1]) as opened:
        page = opened("/?example=true")
        page.get_by_role("button", name="Make the plan").first.click()
        plan = page.request.get(f"/v1/plans/{page.url.rpartition('/')[2]}").json()
        expect(choice(page)).to_have_text(choice_of(plan))
        blank = page.evaluate("""() => {
            const canvas = document.querySelector(".chart canvas").cloneNode();
            return canvas.toDataURL();
        }""")
        wait_for(lambda: len(set(pictures(page))) == 5)
        assert blank not in pictures(page)
        set_slider(page, "epsilon", 0.6)
        asked = {"objective": {"kind": "accuracy", "epsilon": 0.6}}
        wanted = posted(page, f"/v1/plans/{plan['id']}/replan", asked)
        expect(choice(page)).to_have_text(choice_of(wanted))
        assert choice_of(wanted) != choice_of(plan)


@pytest.mark.slow
def test_dragging_ends_at_the_last_position_however_fast_it_was(browser, service):
    with visits(browser, service[1]) as opened:
        page = opened()
        plan = stored(page)
        page.goto(f"/plans/{plan['id']}")
        under_way, most = set(), 0

        def sent(request):
            nonlocal most
            under_way.add(request)
            most = max(most, len(under_way))

        page.on("request", sent)
        for end in ("requestfinished", "requestfailed"):
            page.on(end, lambda request: under_way.discard(request))
        set_slider(page, "epsilon", *[0.9 - i / 100 for i in range(60)], 0.6)
        wanted = posted(page, f"/v1/plans/{plan['id']}/replan", {"objective": {"kind": "accuracy", "epsilon": 0.6}})
        expect(choice(page)).to_have_text(choice_of(wanted))
        expect(page).to_have_url(re.compile("epsilon=0.6&"))
        assert choice(page).text_content() == choice_of(wanted)
        assert most <= 2, "requests wait for each other, or replace each other"
        page.reload()
        expect(choice(page)).to_have_text(choice_of(wanted))


@pytest.mark.slow
def test_the_pictures_follow_the_scheme_and_the_width(browser, service):
    with visits(browser, service[1]) as opened:
        page = opened(color_scheme="light")
        page.goto(f"/plans/{stored(page)['id']}")
        light = pictures(page)
        page.emulate_media(color_scheme="dark")
        wait_for(lambda: not set(light) & set(pictures(page)))
        page.set_viewport_size({"width": 360, "height": 740})
        page.wait_for_function("document.querySelector('.chart canvas').clientWidth < 340")


@pytest.mark.slow
def test_with_keys_somebody_signs_in_and_follows_a_job(browser, tmp_path):
    settings = settings_for(tmp_path).model_copy(update={"require_keys": True})
    with running(settings) as (app, address), visits(browser, address) as opened:
        key = security.new_key(app.state.database, "mine")
        page = opened("/history", ignored=REFUSED)
        page.get_by_label("Key").fill("hp_guess")
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("#e-key")).to_have_text("This key is not known here.")
        page.get_by_label("Key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{address}/history")
        assert page.evaluate("document.cookie") == ""
        job = posted(page, "/v1/jobs", TINY)["id"]
        page.goto(f"/jobs/{job}")
        expect(page.locator("#job-state")).to_have_text("queued")
        with working(app.state.database, settings, worker.PROGRAM):
            expect(page.get_by_role("heading", level=1)).to_have_text("A plan for 3 blocks", timeout=60_000)
        page.get_by_role("button", name="Sign out").click()
        page.goto(f"/jobs/{job}")
        expect(page.get_by_label("Key")).to_be_visible()


@pytest.mark.slow
def test_a_page_of_another_site_can_post_nothing(browser, service):
    form = '<form method="post" action="{}/plans"><textarea name="json">{}</textarea><button>Win</button></form>'
    with visits(browser, service[1]) as opened:
        page = opened(ignored=REFUSED)
        body = form.format(service[1], json.dumps(ASKED))
        page.route("http://other.example/", lambda route: route.fulfill(body=body, content_type="text/html"))
        page.goto("http://other.example/")
        with page.expect_response(f"{service[1]}/plans") as answer:
            page.get_by_role("button").click()
        assert answer.value.status == 403
        assert page.request.get("/v1/plans").json()["items"] == []


@pytest.mark.slow
def test_a_hostile_name_is_text(browser, service):
    with visits(browser, service[1]) as opened:
        page = opened()
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        plan = stored(page, cards=[{"name": HOSTILE, "memory_bytes": 10**9, "price": 1.0}])
        page.goto(f"/plans/{plan['id']}")
        expect(page.get_by_text(HOSTILE, exact=True)).to_be_visible()
        page.goto(f"/compare?a={plan['id']}&b={plan['id']}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()


@pytest.mark.slow
def test_a_long_table_shows_the_choice(browser, service):
    with visits(browser, service[1]) as opened:
        page = opened()
        page.goto(f"/plans/{stored(page, depth=96, horizons=[1, 24, 48, 96])['id']}")

        def seen():
            table, row = page.locator(".tall").bounding_box(), page.locator("tr.chosen").first.bounding_box()
            return table["y"] < row["y"] < row["y"] + row["height"] < table["y"] + table["height"]

        page.locator(".tall").scroll_into_view_if_needed()
        assert seen()
        before = choice(page).text_content()
        set_slider(page, "epsilon", 0.02)
        expect(choice(page)).not_to_have_text(before)
        wait_for(seen)


@pytest.mark.slow
def test_a_service_that_goes_away_is_told_and_waited_for(browser, tmp_path):
    settings = settings_for(tmp_path)
    with running(settings) as (_, address):
        page = browser.new_context(base_url=address).new_page()
        page.goto("/")
        page.goto(f"/jobs/{posted(page, '/v1/jobs', TINY)['id']}")
        expect(page.locator("#job-lost")).to_have_text("")
    expect(page.locator("#job-lost")).to_contain_text("The service is away", timeout=20_000)
    page.context.close()


@pytest.mark.slow
def test_a_dial_that_is_not_answered_is_told(browser, service):
    with visits(browser, service[1]) as opened:
        page = opened(
            ignored=("Failed to load resource: the server responded with a status of 503", "Response Status Error")
        )
        page.goto(f"/plans/{stored(page)['id']}")
        before = choice(page).text_content()
        page.route("**/plans/*?*", lambda route: route.fulfill(status=503, body="away"))
        set_slider(page, "epsilon", 0.6)
        expect(page.locator("#dials-failed")).to_contain_text("The service did not answer")
        assert choice(page).text_content() == before
        page.unroute("**/plans/*?*")
        set_slider(page, "epsilon", 0.61)
        expect(page.locator("#dials-failed")).to_have_text("")
        expect(choice(page)).not_to_have_text(before)


@pytest.mark.slow
def test_a_job_that_ended_while_its_page_was_made_is_not_waited_for(browser, service):
    """Its page still says that it runs, and has its last event already."""
    with visits(browser, service[1]) as opened:
        page = opened()
        job = posted(page, "/v1/jobs", TINY)["id"]
        page.goto(f"/jobs/{job}")
        early = page.content().replace('data-last="1"', 'data-last="2"')
        assert 'data-last="2"' in early
        assert 'data-live="true"' in early
        page.goto("/")
        assert page.request.post(f"/v1/jobs/{job}/cancel").ok
        page.route(f"**/jobs/{job}", lambda route: route.fulfill(body=early, content_type="text/html"), times=1)
        page.goto(f"/jobs/{job}")
        expect(page.locator("#job-state")).to_have_text("cancelled")
        expect(page.locator("[data-live]")).to_have_count(0)


@pytest.mark.slow
def test_the_code_on_the_page_works_as_shown(browser, service, tmp_path):
    """The commands and the Python, copied, in a folder with ``my_module.py`` and nothing else."""
    with visits(browser, service[1]) as opened:
        page = opened()
        plan = stored(page)
        page.goto(f"/plans/{plan['id']}")
        stored_code = page.locator("#code-shell").text_content()
        set_slider(page, "epsilon", 0.6)
        expect(page.locator("#code-shell")).to_contain_text("epsilon=0.6")
        moved_code, python = page.locator("#code-shell").text_content(), page.locator("#code-python").text_content()
    found = []
    for name, code in (("as-stored", stored_code), ("moved", moved_code)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "my_module.py").write_text(USER)
        run(["bash", "-euc", code], folder)
        found.append(hp.Plan.load(folder / "plan.json"))
    assert found[0] == hp.Plan.from_dict(plan)
    assert found[1].horizon != found[0].horizon
    run([sys.executable, "-c", python], folder)


def run(command, folder):
    """A program, as a user's shell runs it."""
    root = str(Path(hp.__file__).parents[1])
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "horizonplan"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m horizonplan "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{folder}:{root}"}
    assert shutil.which("curl"), "the commands on the page use curl: install it (Debian: apt-get install curl)"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
