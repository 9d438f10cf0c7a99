"""The page as the server renders it: forms and their errors, dials without scripts, what is kept, who may look.

The oracle is the API: a plan on the page is the plan of ``/v1``.
"""

import html
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient
from test_api_plans import ASKED, EXTRA

import horizonplan as hp
from horizonplan.api import Settings, create_app, page_dials, security

FORM = {
    "depth": "12",
    "horizon": ["1", "4", "8", "12"],
    "memory": ["11000000", "14MB", "18000kB", "22MB"],
    "cosine": [repr(value) for value in ASKED["cosine"]],
    "kind": "accuracy",
    "epsilon": "0.1",
    "cost": "linear",
    "price": "1",
    "node": "",
}
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def plan_of(client, answer):
    """The id of the plan that an answer shows."""
    assert answer.status_code == 200, told(answer)
    return re.search(r"/plans/([0-9a-f]{32})$", str(answer.url)).group(1)


def told(answer):
    """The errors on a page."""
    return [html.unescape(text) for text in re.findall(r'class="error"[^>]*>([^<]+)<', answer.text)]


def fields_of(client, plan_id):
    """The plan as the API tells it, without what only the service adds."""
    stored = client.get(f"/v1/plans/{plan_id}").json()
    return {name: value for name, value in stored.items() if name not in EXTRA}


def test_measurements_in_the_form_are_the_api_s_plan(client):
    plan_id = plan_of(client, client.post("/plans", data=FORM))
    by_api = client.post("/v1/plans", json=ASKED).json()
    assert fields_of(client, plan_id) == {name: value for name, value in by_api.items() if name not in EXTRA}


def test_many_forms_at_once_are_all_answered(client):
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: client.post("/plans", data=FORM, follow_redirects=False), range(60)))
    assert [answer.status_code for answer in answers] == [303] * 60


def test_a_pasted_body_is_the_api_s_plan(client):
    plan_id = plan_of(client, client.post("/plans", data={"json": json.dumps(ASKED)}))
    by_api = client.post("/v1/plans", json=ASKED).json()
    assert fields_of(client, plan_id) == {name: value for name, value in by_api.items() if name not in EXTRA}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"depth": ""}, "e-m-depth"),
        ({"depth": "a dozen"}, "e-m-depth"),
        ({"horizon": ["1", "4", "4", "12"]}, "e-m-horizon-2"),
        ({"horizon": ["1", "4.5", "8", "12"]}, "e-m-horizon-1"),
        ({"horizon": ["1", "4", "8", "13"]}, "e-m-horizon-3"),
        ({"memory": ["11MB", "-14MB", "18MB", "22MB"]}, "e-m-memory-1"),
        ({"memory": ["11MB", "nan", "18MB", "22MB"]}, "e-m-memory-1"),
        ({"cosine": ["0.1", "0.2", "1.5", "1"]}, "e-m-cosine-2"),
        ({"cosine": ["0.1", "inf", "0.9", "1"]}, "e-m-cosine-1"),
        ({"epsilon": "1.5"}, "e-m-epsilon"),
        ({"kind": "weighted", "lam": "-1"}, "e-m-lam"),
        ({"kind": "memory", "limit": "much"}, "e-m-limit"),
        ({"kind": "fastest"}, "e-m-kind"),
        ({"price": "0"}, "e-m-price"),
        ({"node": "24 parsecs"}, "e-m-node"),
    ],
)
def test_an_error_stands_at_its_field_and_nothing_typed_is_lost(client, changes, place):
    answer = client.post("/plans", data=FORM | changes)
    assert answer.status_code == 422
    message = re.search(rf'id="{re.escape(place)}"[^>]*>([^<]+)<', answer.text)
    assert message, told(answer)
    described = rf'aria-invalid="true" aria-describedby="{re.escape(place)}'
    assert re.search(described, answer.text)
    for value in (FORM | changes)["horizon"]:
        assert f'value="{value}"' in answer.text
    assert client.get("/v1/plans").json()["items"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "This is no JSON"),
        ("[" * 100_000, "This is no JSON"),
        ("[]", "body"),
        (json.dumps(ASKED | {"depth": 0}), "depth"),
        (json.dumps(ASKED | {"horizons": [1, 4, 4, 12]}), "given before"),
        (json.dumps(ASKED | {"colour": "red"}), "colour"),
    ],
)
def test_a_pasted_body_is_refused_in_words(client, text, said):
    answer = client.post("/plans", data={"json": text})
    assert answer.status_code == 422
    assert any(said in message for message in told(answer)), told(answer)


def test_what_nothing_meets_is_said_and_kept_in_the_form(client):
    answer = client.post("/plans", data=FORM | {"kind": "memory", "limit": "1MB"})
    assert answer.status_code == 422
    assert any("No candidate is feasible" in message for message in told(answer))
    assert 'value="1MB"' in answer.text


def test_more_rows_keep_what_was_typed(client):
    answer = client.post("/plans", data=FORM | {"more": "1"})
    assert answer.status_code == 200
    assert answer.text.count('name="horizon"') > client.get("/").text.count('name="horizon"')
    assert all(f'value="{text}"' in answer.text for text in FORM["memory"])


@pytest.mark.parametrize(
    ("dials", "objective", "cost"),
    [
        ({"epsilon": "0.5"}, {"kind": "accuracy", "epsilon": 0.5}, None),
        ({"kind": "weighted", "lam": "0.25"}, {"kind": "weighted", "lam": 0.25}, None),
        ({"kind": "memory", "limit": "15MB"}, {"kind": "memory", "limit_bytes": 15_000_000}, None),
        (
            {"kind": "weighted", "lam": "1", "cost": "ladder", "price": "2", "node": "5MB"},
            {"kind": "weighted", "lam": 1.0},
            {"kind": "ladder", "unit_cost": 2.0, "node_memory_bytes": 5_000_000},
        ),
    ],
)
def test_dials_are_the_api_s_replan(client, dials, objective, cost):
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    wanted = client.post(f"/v1/plans/{plan_id}/replan", json={"objective": objective, "cost": cost or ASKED["cost"]})
    assert wanted.status_code == 201, wanted.text
    assert client.get(f"/plans/{plan_id}", params=dials).status_code == 200
    found = client.get(f"/plans/{plan_id}/plan.json", params=dials).json()
    assert found == {name: value for name, value in wanted.json().items() if name not in EXTRA}
    given = page_dials.texts_of(hp.Plan.from_dict(client.get(f"/v1/plans/{plan_id}").json()))
    kept = client.post(f"/plans/{plan_id}/keep", data=given | dials)
    again = client.get(f"/v1/plans/{plan_of(client, kept)}").json()
    assert again["parent"] == plan_id
    assert {name: value for name, value in again.items() if name not in EXTRA} == found


def test_htmx_gets_the_parts_that_change_only(client):
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    parts = client.get(f"/plans/{plan_id}", params={"epsilon": "0.9"}, headers={"HX-Request": "true"}).text
    whole = client.get(f"/plans/{plan_id}", params={"epsilon": "0.9"}).text
    assert "<html" in whole
    assert "<html" not in parts
    assert "<form id=" not in parts
    charts = re.search(r'data-charts="([^"]+)"', parts).group(1)
    assert charts in whole
    chosen = [mark for mark in json.loads(html.unescape(charts))["rate"]["marks"] if mark["chosen"]]
    assert [mark["x"] for mark in chosen] == [2]  # the first with a rate of .1


def test_the_charts_are_the_plan_s_numbers(client):
    stored = client.post("/v1/plans", json=ASKED).json()
    text = client.get(f"/plans/{stored['id']}").text
    charts = json.loads(html.unescape(re.search(r'data-charts="([^"]+)"', text).group(1)))
    plan = hp.Plan.from_dict(stored)
    for name in ("cosine", "rate", "objective"):
        found = {mark["x"]: mark["y"] for mark in charts[name]["marks"]}
        assert found == {row.horizon: getattr(row, name) for row in plan.rows}
        (chosen,) = (mark["x"] for mark in charts[name]["marks"] if mark["chosen"])
        assert chosen == plan.horizon
    measured = {mark["x"] for mark in charts["memory"]["marks"] if mark["filled"]}
    assert measured == set(ASKED["horizons"])
    assert charts["rate"]["rules"] == [1 - 0.1]


def test_a_wrong_dial_is_told_and_nothing_changes(client):
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    for name in ("epsilon", "lam", "price", "node", "limit"):
        kind = {"lam": "weighted", "limit": "memory"}.get(name, "accuracy")
        assert client.get(f"/plans/{plan_id}", params={"kind": kind, name: "9" * 400}).status_code == 422
    answer = client.get(f"/plans/{plan_id}", params={"epsilon": "2"})
    assert answer.status_code == 422
    assert re.search(r'id="e-d-epsilon"[^>]*>[^<]+<', answer.text)
    assert client.get(f"/plans/{plan_id}/plan.json", params={"epsilon": "2"}).status_code == 422
    kept = client.post(f"/plans/{plan_id}/keep", data={"epsilon": "2"})
    assert kept.status_code == 422
    assert len(client.get("/v1/plans").json()["items"]) == 1


def test_two_plans_side_by_side(client):
    first, second = (
        client.post("/v1/plans", json=ASKED | more).json() for more in ({}, {"memory_bytes": [1, 2, 3, 4]})
    )
    text = client.get("/compare", params={"a": first["id"], "b": second["id"]}).text
    for one in (first, second):
        assert one["id"] in text
    charts = json.loads(html.unescape(re.search(r'data-charts="([^"]+)"', text).group(1)))
    assert [line["label"] for line in charts["memory"]["lines"]] == ["A", "B"]
    assert client.get("/compare", params={"a": first["id"], "b": "0" * 32}).status_code == 404
    assert client.get("/compare").status_code == 200


def test_history_goes_on_where_it_was(client):
    ids = [client.post("/v1/plans", json=ASKED).json()["id"] for _ in range(30)]
    seen, address = [], "/history"
    while address:
        text = client.get(address).text
        seen += re.findall(r'<tr><td><a href="/plans/([0-9a-f]+)"', text)
        more = re.search(r'href="(/history\?cursor=[^"]+)"', text)
        address = more and html.unescape(more.group(1))
    assert seen == ids[::-1]


def test_every_kind_of_network_can_be_asked_for(client):
    text = client.get("/").text
    kinds = re.findall(r'<option value="([^"]+)"', text.partition('id="j-architecture"')[2].partition("</select>")[0])
    assert {"residual-mlp", "residual-cnn", "transformer", "character-gpt", "GPT2Config"} <= set(kinds)
    for kind in kinds:
        shown = client.get("/", params={"architecture": kind}).text
        form = shown.partition('id="j-form"')[2].partition("</form>")[0]
        inputs = re.findall(r'<input[^>]* name="([^"]+)" value="([^"]*)"', form)
        boxes = re.findall(r'type="checkbox" name="([^"]+)" value="on" checked', form)
        radios = dict(re.findall(r'type="radio" name="([^"]+)" value="([^"]+)" checked', form))
        data = dict(inputs) | dict.fromkeys(boxes, "on") | radios | {"architecture": kind}
        answer = client.post("/jobs", data=data)
        assert answer.status_code == 200, (kind, told(answer))
        assert client.get("/v1/jobs").json()["items"][0]["request"]["architecture"]["kind"] == kind


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("architecture.width", "0"),
        ("architecture.depth", "many"),
        ("batch_size", "-3"),
        ("device", "tpu"),
        ("seed", "x"),
    ],
)
def test_a_network_that_is_refused(client, name, text):
    answer = client.post("/jobs", data={"architecture": "residual-mlp", name: text})
    assert answer.status_code == 422
    assert re.search(rf'id="e-j-{re.escape(name)}"[^>]*>[^<]+<', answer.text), told(answer)
    assert f'value="{text}"' in answer.text
    assert client.get("/v1/jobs").json()["items"] == []


def test_a_job_and_its_cancel(client):
    job = client.post("/jobs", data={"architecture": "residual-mlp"})
    assert "waits for a worker" in job.text
    assert "data-live" in job.text
    over = client.post(str(job.url) + "/cancel")
    assert "cancelled" in over.text
    assert "data-live" not in over.text
    assert client.post(str(job.url) + "/cancel").status_code == 200


def test_what_is_not_there_is_a_page_that_says_so(client):
    for address in ("/plans/none", "/jobs/none", "/plans/" + "0" * 32, "/history?cursor=x"):
        answer = client.get(address)
        assert answer.status_code in (404, 422)
        assert "<h1>" in answer.text
    assert client.post("/plans", json=ASKED).status_code == 415


def test_nothing_typed_becomes_markup(client):
    hostile = FORM | {"depth": HOSTILE, "node": HOSTILE, "kind": HOSTILE, "horizon": [HOSTILE]}
    pages = [
        client.post("/plans", data=hostile),
        client.post("/plans", data={"json": HOSTILE}),
        client.post("/jobs", data={"architecture": "residual-mlp", "device": HOSTILE, "architecture.width": HOSTILE}),
        client.get("/", params={"architecture": HOSTILE}),
        client.get("/compare", params={"a": HOSTILE, "b": HOSTILE}),
    ]
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    pages.append(client.get(f"/plans/{plan_id}", params={"epsilon": HOSTILE, "kind": HOSTILE}))
    for answer in pages:
        assert "<script>alert" not in answer.text
        assert not re.search(r'value="[^"]*<', answer.text)


def test_pages_allow_no_inline_script_or_style(client):
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    for address in ("/", f"/plans/{plan_id}", "/history", "/compare"):
        answer = client.get(address)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", answer.text)
        for source in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
            assert client.get(source).status_code == 200


def test_forms_from_another_site_are_refused(client):
    plan_id = client.post("/v1/plans", json=ASKED).json()["id"]
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        for address in ("/plans", "/jobs", f"/plans/{plan_id}/keep", "/sign-out"):
            assert client.post(address, data=FORM, headers=headers).status_code == 403
    assert len(client.get("/v1/plans").json()["items"]) == 1


def test_a_key_opens_the_page(tmp_path):
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3", host="0.0.0.0"))
    with TestClient(app, base_url="http://plans.example") as client:
        shut = client.get("/")
        assert shut.status_code == 401
        assert 'name="key"' in shut.text
        assert client.post("/sign-in", data={"key": "hp_guess"}).status_code == 401
        key = security.new_key(app.state.database, "mine")
        opened = client.post("/sign-in", data={"key": f" {key} "}, follow_redirects=False)
        cookie = opened.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert client.get("/").status_code == 200
        assert client.get("/v1/plans").status_code == 200  # so the page's streams of events are open, too
        plan_id = plan_of(client, client.post("/plans", data=FORM))
        assert "$HORIZONPLAN_KEY" in client.get(f"/plans/{plan_id}").text
        assert key not in client.get(f"/plans/{plan_id}").text
        client.post("/sign-out")
        assert client.get("/").status_code == 401
