"""The page against those who mean harm: posts from other sites' pages, names that are markup, addresses that lead away.

And what it shows of networks and curves, where the numbers of ``/v1`` are the oracle.
"""

import html
import json
import re
from dataclasses import replace

import pytest
from api_jobs import PLAN
from starlette.testclient import TestClient
from test_api_plans import ASKED

import horizonplan as hp
from horizonplan.api import Settings, create_app, plans, security
from horizonplan.api.page_charts import frontier
from horizonplan.api.page_view import network_in_words
from horizonplan.measured import Strided, plan_from_measurements
from horizonplan.rows import Row

HOST = "http://localhost:8000"
HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def client(app):
    with TestClient(app, base_url=HOST) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),  # a program
        ({"Origin": HOST}, True),  # an old browser, or one that does not trust the connection
        ({"Origin": HOST, "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://proxied.example", "Sec-Fetch-Site": "same-origin"}, True),  # the browser has the last word
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "http://localhost:9000"}, False),  # another service on this machine
        ({"Origin": "http://other.example"}, False),
        ({"Origin": "null"}, False),  # a sandboxed frame
        ({"Origin": HOST, "Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": HOST, "Sec-Fetch-Site": "cross-site"}, False),
    ],
)
@pytest.mark.parametrize("path", ["/plans", "/v1/plans"])
def test_a_post_passes_from_our_own_pages_and_from_programs(client, path, headers, passes):
    body = {"json": ASKED} if path.startswith("/v1") else {"data": {"json": json.dumps(ASKED)}}
    made = 201 if path.startswith("/v1") else 303
    answer = client.post(path, headers=headers, follow_redirects=False, **body)
    assert answer.status_code == (made if passes else 403), answer.text
    assert len(client.get("/v1/plans").json()["items"]) == passes


def test_the_browser_is_told_to_name_the_origin_to_ourselves_only(client):
    assert client.get("/").headers["referrer-policy"] == "same-origin"


def test_a_hostile_card_is_text_wherever_it_is_shown(client):
    cards = [{"name": HOSTILE, "memory_bytes": 10**9, "price": 2.0}]
    plan = client.post("/v1/plans", json=ASKED | {"cards": cards}).json()
    for address in (f"/plans/{plan['id']}", "/history", "/", f"/compare?a={plan['id']}&b={plan['id']}"):
        text = client.get(address).text
        assert "<script>alert" not in text
    assert (
        html.escape(HOSTILE, quote=False).replace('"', "&#34;").replace("'", "&#39;")
        in client.get(f"/plans/{plan['id']}").text
    )


@pytest.fixture
def guarded(tmp_path):
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3", require_keys=True))
    with TestClient(app, base_url="https://plans.example") as client:
        yield client, security.new_key(app.state.database, "mine")


@pytest.mark.parametrize(
    ("path", "fields", "summary"),
    [
        ("/plans", {"depth": "x"}, "Blocks: Give a number."),
        ("/plans", {"depth": "12", "horizon": ["1", "z"]}, "Horizon, row 2: Give a number."),
        ("/plans", {"node": "wide"}, "Memory of a node: Give a size, such as 24GiB or 512MB."),
        ("/jobs", {"architecture": "residual-mlp", "architecture.in_features": "x"}, "In features: Give a number."),
        ("/jobs", {"architecture": "residual-mlp", "batch_size": "x"}, "Batch size: Give a number."),
    ],
)
def test_the_list_of_errors_names_fields_and_leads_to_them(client, path, fields, summary):
    text = client.post(path, data=fields).text
    shown = text.partition('role="alert"')[2].partition("</div>")[0]
    told = {words: target for target, words in re.findall(r'<a href="#([^"]+)">([^<]+)</a>', shown)}
    assert summary in told
    assert f'id="{told[summary]}"' in text


@pytest.mark.parametrize("wanted", ["/history", "/plans/a?epsilon=0.3&kind=accuracy", "/"])
def test_signing_in_leads_to_where_somebody_wanted_to_go(guarded, wanted):
    client, key = guarded
    asked = client.get(wanted)
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"] == "Bearer"
    assert "Sign out" not in asked.text
    kept = html.unescape(re.search(r'name="wanted" value="([^"]*)"', asked.text).group(1))
    opened = client.post("/sign-in", data={"key": key, "wanted": kept}, follow_redirects=False)
    assert (opened.status_code, opened.headers["location"]) == (303, wanted)
    assert "; secure" in opened.headers["set-cookie"].lower()


ELSEWHERE = ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "/\t/evil.example", ""]


@pytest.mark.parametrize("wanted", ELSEWHERE)
def test_signing_in_leads_nowhere_else(guarded, wanted):
    client, key = guarded
    opened = client.post("/sign-in", data={"key": key, "wanted": wanted}, follow_redirects=False)
    assert (opened.status_code, opened.headers["location"]) == (303, "/")


def test_nobody_signs_somebody_in_from_another_site(guarded):
    client, key = guarded
    answer = client.post("/sign-in", data={"key": key}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert client.get("/").status_code == 401


def test_a_name_that_is_given_twice_is_refused_as_by_the_api(client):
    text = json.dumps(ASKED)[:-1] + ', "depth": 12}'
    by_api = client.post("/v1/plans", content=text, headers={"content-type": "application/json"})
    answer = client.post("/plans", data={"json": text})
    assert by_api.status_code == answer.status_code == 422
    assert by_api.json()["detail"] in html.unescape(answer.text)
    assert html.escape(text) in answer.text.replace("&#34;", "&quot;")


def test_the_frontier_is_of_what_may_be_chosen():
    strided = [Strided(4, 4, 13_000_000, rate=0.85), Strided(8, 2, 12_000_000, rate=0.2)]
    points = (ASKED["depth"], ASKED["horizons"], ASKED["memory_bytes"], ASKED["cosine"])
    rows = plan_from_measurements(*points, strided=strided).rows
    found = frontier(rows)
    beaten = {
        row
        for row in rows
        for other in rows
        if (other.memory_bytes, -other.rate) < (row.memory_bytes, -row.rate) and other.rate >= row.rate
    }
    assert set(found) == set(rows) - beaten
    assert [row.memory_bytes for row in found] == sorted(row.memory_bytes for row in found)
    assert any(row.stride == 4 for row in found)
    for_nothing = replace(found[0], rate=1.0, reference=True)
    assert frontier([for_nothing, *rows]) == found


def test_the_curves_of_two_plans_are_in_a_table_too(client):
    first = client.post("/v1/plans", json=ASKED).json()
    second = client.post("/v1/plans", json=ASKED | {"depth": 16, "horizons": [1, 4, 8, 16]}).json()
    text = client.get("/compare", params={"a": first["id"], "b": second["id"]}).text
    table = text.partition('<table class="curves">')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr>")[2:]]
    both = [hp.Plan.from_dict(plan) for plan in (first, second)]
    assert [row[0] for row in rows] == [str(h) for h in range(1, 17)]
    for row in rows:
        known = [{one.horizon: one for one in plan.rows} for plan in both]
        rates = [f"{table[int(row[0])].rate:.3f}" if int(row[0]) in table else "–" for table in known]
        assert row[3:] == rates


def test_columns_without_a_number_are_left_out(client):
    def headings(**more):
        plan = client.post("/v1/plans", json=ASKED | more).json()
        text = client.get(f"/plans/{plan['id']}").text.partition('<table class="rows">')[2]
        return re.findall(r"<th scope=\"col\"[^>]*>([^<]+)<", text.partition("</thead>")[0])

    assert "Time a step" not in headings()
    assert "Time a step" in headings(step_seconds=[0.1, None, None, 0.4])


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"kind": "residual-mlp", "in_features": 4, "width": 8}, "in features 4, width 8"),
        ({"kind": "GPT2Config", "numbers": {"n_embd": 8, "n_layer": 2}, "length": 4}, "n_embd 8, n_layer 2, length 4"),
        ({"kind": "residual-cnn", "image": [1, 8, 8]}, "image 1, 8, 8"),
        ({"kind": "registered", "id": "ranker"}, "id ranker"),
    ],
)
def test_a_network_in_words(architecture, words):
    assert network_in_words(architecture) == words


def test_exact_alternatives_stand_beside_the_frontier(app, client):
    """Triangles in the picture, above the line that none of them is on; and a table of their memory and time."""
    thrifty = Row(
        horizon=4, stride=1, recompute=2, memory_bytes=15 * 2**20, memory_source="predicted", cosine=1.0,
        cosine_source="derived", rate=1.0, step_seconds=0.25, step_seconds_source="predicted", reference=True,
    )  # fmt: skip
    with app.state.database.write() as connection:
        plan_id = plans.store(connection, replace(PLAN, rows=(*PLAN.rows, thrifty)))
    text = client.get(f"/plans/{plan_id}").text
    exact = text.partition('<div id="exact"')[2].partition("</div>")[0]
    ways = [re.sub("<[^>]+>", " ", row).split() for row in exact.split("<tr")[2:]]
    assert [" ".join(way) for way in ways] == [f"> BP (back-propagation) 40 B m {chr(8211)}",
                                               "> BP, checkpoint every 2 15.0 MiB p 250.0 ms p"]  # fmt: skip
    chart = json.loads(html.unescape(re.search(r'data-charts="([^"]+)"', text).group(1)))["frontier"]
    triangles = [(mark["x"], mark["y"]) for mark in chart["marks"] if mark["shape"] == "triangle"]
    assert triangles == [(15.0, 1.0)]
    assert 15.0 not in chart["x"]
