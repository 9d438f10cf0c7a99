"""The page in a real browser: Chromium without a window, beside ``horizonplan serve`` with a worker.

Whatever a test does, nothing may appear on the browser's console, and nothing may be blocked by the security policy.
"""

import itertools
import json
import re

import pytest
from api_jobs import TINY
from browsing import PHONE, REFUSED, WIDE, choice, choice_of, chromium, posted, set_slider, stored, visits
from playwright.sync_api import expect
from served import served
from test_api_plans import ASKED

import horizonplan as hp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, address):
    with visits(browser, address) as opened:
        yield opened


def test_measurements_that_are_pasted_become_a_plan(open_page):
    page = open_page()
    page.get_by_label("Blocks T of the network").fill("12")
    rows = zip(ASKED["horizons"], ASKED["memory_bytes"], ASKED["cosine"], strict=True)
    text = "\n".join("\t".join(map(str, row)) for row in rows)
    page.get_by_label("Horizon, row 1").evaluate(
        """(cell, text) => {
            const data = new DataTransfer();
            data.setData("text", text);
            cell.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        text,
    )
    page.get_by_role("button", name="Make the plan").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("A plan for 12 blocks")
    plan = page.request.get(f"/v1/plans/{page.url.rpartition('/')[2]}").json()
    expect(choice(page)).to_have_text(choice_of(plan))
    assert page.locator(".chart canvas").count() == 5


def test_sliders_move_the_choice_at_once_to_where_the_api_s_replan_is(open_page):
    page = open_page()
    plan = stored(page)
    page.goto(f"/plans/{plan['id']}")
    moves = [("epsilon", e, {"kind": "accuracy", "epsilon": e}) for e in (0.05, 0.3, 0.6, 0.9)]
    for name, position, objective in moves:
        set_slider(page, name, position)
        asked = {"objective": objective, "cost": ASKED["cost"]}
        wanted = posted(page, f"/v1/plans/{plan['id']}/replan", asked)
        expect(choice(page)).to_have_text(choice_of(wanted))
        expect(page).to_have_url(re.compile(f"epsilon={position}&"))
    page.get_by_role("radio", name="Weighed").check()
    expect(page.locator("#d-lam")).to_be_visible()
    expect(page.locator("#d-epsilon")).to_be_hidden()
    set_slider(page, "lam", 10)  # 2^10: memory is all that counts
    expect(choice(page)).to_have_text("h = 1, stride 1")
    set_slider(page, "price", -10)  # and now it costs next to nothing
    set_slider(page, "lam", -10)
    expect(choice(page)).to_have_text(re.compile("BP"))
    page.get_by_role("radio", name="Memory limit").check()
    page.locator("#d-limit").fill("15MB")
    expect(choice(page)).to_have_text("h = 5, stride 1")
    page.get_by_role("radio", name="Whole nodes").check()
    page.locator("#d-price").fill("1")
    page.locator("#d-node").fill("5MB")
    expect(page.locator("#choice .facts")).to_contain_text("3.000")  # 15 MB are three nodes of 5
    page.locator("#d-node").fill("5 parsecs")
    expect(page.locator("#e-d-node")).to_contain_text("Give a size")
    page.locator("#d-node").fill("5MB")
    expect(page.locator("#e-d-node")).to_have_text("")
    page.get_by_role("button", name="Keep as a new plan").click()
    expect(page.get_by_text("replanned from")).to_be_visible()
    kept = page.request.get(f"/v1/plans/{page.url.rpartition('/')[2]}").json()
    row = hp.Plan.from_dict(kept).row
    assert (row.horizon, row.cost, kept["parent"]) == (5, 3.0, plan["id"])


def test_what_nothing_meets_is_said(open_page):
    page = open_page()
    page.goto(f"/plans/{stored(page)['id']}")
    page.get_by_role("radio", name="Memory limit").check()
    page.locator("#d-limit").fill("1MB")
    expect(page.locator("#choice .over")).to_have_text("Nothing meets that. The nearest is")
    expect(page.get_by_role("link", name="Download JSON")).to_have_count(0)
    page.get_by_role("link", name="Back to what was asked").click()
    expect(page.locator("#choice .over")).to_have_text("Train with")


def test_the_download_is_the_plan_on_the_page(open_page):
    page = open_page()
    plan = stored(page)
    page.goto(f"/plans/{plan['id']}")
    set_slider(page, "epsilon", 0.6)
    expect(choice(page)).not_to_have_text(choice_of(plan))
    with page.expect_download() as downloaded:
        page.get_by_role("link", name="Download JSON").click()
    found = json.loads(downloaded.value.path().read_text())
    assert choice_of(found) == choice(page).text_content()
    command = page.locator("pre").first.text_content()
    assert f"/plans/{plan['id']}/plan.json" in command
    assert "epsilon=0.6" in command


def test_a_network_is_measured_live_until_its_plan(open_page):
    page = open_page()
    sizes = TINY["architecture"]
    for name in ("in_features", "width", "classes", "depth"):
        page.locator(f"[id='j-architecture.{name}']").fill(str(sizes[name]))
    page.locator("#j-batch_size").fill("4")
    page.get_by_role("button", name="Measure it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Residual MLP")
    expect(page.locator("#job-events")).to_contain_text("progress", timeout=60_000)
    expect(page.get_by_role("heading", level=1)).to_have_text("A plan for 3 blocks", timeout=60_000)
    expect(page.locator("#exact")).to_contain_text("BP")


def test_a_job_is_cancelled(open_page):
    page = open_page()
    page.get_by_label("Network", exact=True).select_option("transformer")
    expect(page.locator("[id='j-architecture.heads']")).to_be_visible()
    page.locator("[id='j-architecture.depth']").fill("48")
    page.get_by_role("button", name="Measure it").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-state")).to_have_text("cancelled", timeout=30_000)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_a_job_that_fails_says_why(open_page):
    page = open_page()
    asked = TINY | {"objective": {"kind": "memory", "limit_bytes": 1}}
    page.goto(f"/jobs/{posted(page, '/v1/jobs', asked)['id']}")
    expect(page.locator("#job-state")).to_have_text("failed", timeout=60_000)
    expect(page.locator("#job")).to_contain_text("infeasible")
    expect(page.locator("#job")).to_contain_text("No candidate is feasible")


def test_two_plans_beside_each_other(open_page):
    page = open_page()
    first, second = stored(page), stored(page, objective={"kind": "accuracy", "epsilon": 0.6})
    page.goto(f"/plans/{second['id']}")
    page.get_by_label("The other plan").select_option(first["id"])
    page.get_by_role("button", name="Compare").click()
    for one in (first, second):
        expect(page.get_by_role("main")).to_contain_text(choice_of(one))
    expect(page.locator(".chart canvas")).to_have_count(2)  # waits for the script


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    walked = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => {
                const element = document.activeElement, style = getComputedStyle(element);
                const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
                return [element.id || element.name || element.textContent.trim(), ring || style.boxShadow !== "none"];
            }"""
        )
        walked.append(seen[0])
        assert seen[1], f"{seen[0]}: the focus cannot be seen"
        if seen[0] == "Measure it":
            break
    assert walked.index("m-depth") < walked.index("m-horizon-0") < walked.index("Make the plan")
    assert walked.index("Make the plan") < walked.index("j-architecture") < walked.index("Measure it")
    page.goto(f"/plans/{stored(page)['id']}")
    before = choice(page).text_content()
    page.locator("#d-epsilon-slider").focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    expect(choice(page)).not_to_have_text(before)
    assert page.evaluate("document.activeElement.id") == "d-epsilon-slider"
    expect(page.get_by_role("status").first).to_contain_text(re.compile("rate"))


def every_page(page):
    """The addresses of all kinds of pages, with something on them."""
    first, second = stored(page), stored(page, depth=40, horizons=[1, 12, 24, 40])
    job = posted(page, "/v1/jobs", TINY)["id"]
    page.request.post(f"/v1/jobs/{job}/cancel")
    plan = f"/plans/{first['id']}"
    compared = f"/compare?a={first['id']}&b={second['id']}"
    long = f"/plans/{second['id']}"
    refused = [f"{plan}?kind=memory&limit=1B", f"{plan}?epsilon=2&price=none", "/plans/none"]
    return ["/", "/?example=true", "/?architecture=GPT2Config", plan, long, "/history", "/compare", compared,
            f"/jobs/{job}", *refused]  # fmt: skip


@pytest.mark.parametrize("viewport", [PHONE, WIDE], ids=["phone", "wide"])
def test_no_page_is_wider_than_the_window(open_page, viewport):
    page = open_page(viewport=viewport, ignored=REFUSED)
    for path in every_page(page):
        page.goto(path)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_page, scheme):
    """WCAG 2.2: a contrast of 4.5 between a text and what is behind it, 3 where it is large."""
    page = open_page(color_scheme=scheme, ignored=REFUSED)
    for path in every_page(page):
        page.goto(path)
        low = page.evaluate(CONTRASTS)
        assert low == [], (path, low)
    dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor || getComputedStyle(document.documentElement).backgroundColor"
    )
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 64) == (scheme == "dark"), dark


def test_every_control_has_a_name_and_headings_are_in_order(open_page):
    page = open_page(ignored=REFUSED)
    for path in every_page(page):
        page.goto(path)
        assert page.evaluate(NAMELESS) == [], path
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1, path
        assert levels.count(1) == 1, path
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), (path, levels)
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(ids) == len(set(ids)), path
        for target in page.evaluate(
            "[...document.querySelectorAll('[aria-describedby]')].map((e) => e.getAttribute('aria-describedby'))"
        ):
            assert set(target.split()) <= set(ids), (path, target)


def test_the_page_works_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    page.goto("/?example=true")
    page.get_by_role("button", name="Make the plan").first.click()
    before = choice(page).text_content()
    page.locator("#d-epsilon").fill("0.6")
    page.get_by_role("button", name="Choose again").click()
    assert choice(page).text_content() != before
    page.get_by_role("button", name="Keep as a new plan").click()
    expect(page.get_by_text("replanned from")).to_be_visible()


CONTRASTS = """() => {
    const rgb = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
    const light = (c) => {
        const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        let found = [];
        for (let e = element; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c[3] > 0) found.push(c);
            if (c[3] === 1) break;
        }
        let at = [255, 255, 255];
        for (const c of found.reverse()) at = at.map((v, i) => c[i] * c[3] + v * (1 - c[3]));
        return at;
    };
    const low = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        const box = element.getBoundingClientRect();
        if (!text || !box.width || box.width <= 1 || getComputedStyle(element).visibility === "hidden") continue;
        if (!element.checkVisibility()) continue;
        const style = getComputedStyle(element), size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        const [a, b] = [light(rgb(style.color).slice(0, 3)), light(behind(element))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < (large ? 3 : 4.5)) low.push([text.slice(0, 30), Number(ratio.toFixed(2))]);
    }
    return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button, a, progress, [role=img]")]
    .filter((e) => e.type !== "hidden")
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
    .map((e) => e.outerHTML.slice(0, 80))"""
