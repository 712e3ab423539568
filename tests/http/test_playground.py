"""The page and the routes it reads, without a browser; with one it is tested in `tests/e2e`."""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser

import httpx
import pytest

from tests.http.serving import BASE, EXPERTS, Served, serving

KEY = "right-key"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool"), keys=(KEY,)) as running:
        running.http.headers["authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(scope="module")
def page(served: Served) -> httpx.Response:
    """As a browser gets it first: without a key."""
    return httpx.get(f"{served.url}/")


class Tags(HTMLParser):
    """The start tags with their attributes, and how deep each is in labels."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], bool]] = []
        self._labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._labels += tag == "label"
        self.tags.append((tag, dict(attrs), self._labels > 0))

    def handle_endtag(self, tag: str) -> None:
        self._labels -= tag == "label"


def test_it_is_served_without_a_key_and_holds_none(page: httpx.Response) -> None:
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert KEY not in page.text
    assert len(page.content) < 100_000


def test_the_policy_allows_the_page_itself_and_nothing_else(page: httpx.Response) -> None:
    parts = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    inline = {
        kind: f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
        for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", page.text, re.DOTALL)
    }
    assert parts == {
        "default-src": "'none'",
        "script-src": inline["script"],
        "style-src": inline["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_nothing_comes_from_elsewhere_or_runs_in_an_attribute(page: httpx.Response) -> None:
    assert "://" not in page.text
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\()", page.text)
    for tag, attributes, _ in Tags(page.text).tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/svg+xml,")), (tag, attributes)


def test_ids_are_unique_and_every_reference_has_its_element(page: httpx.Response) -> None:
    tags = Tags(page.text).tags
    ids = Counter(attributes["id"] for _, attributes, _ in tags if "id" in attributes)
    assert [id for id, count in ids.items() if count > 1] == []
    names = ("for", "aria-labelledby", "aria-describedby", "aria-controls")
    named = {
        word for _, attributes, _ in tags for name in names for word in (attributes.get(name) or "").split()
    }
    named |= {(attributes.get("href") or "")[1:] for tag, attributes, _ in tags if tag == "use"}
    named |= set(re.findall(r'\bat\("([\w-]+)"\)', page.text))
    assert named - set(ids) == set()
    assert {id[2:] for id in ids if str(id).startswith("i-")} >= set(
        re.findall(r'\b(?:icon|tool)\("([a-z]+)"', page.text)
    )


def test_every_field_has_a_label_and_errors_are_alerts(page: httpx.Response) -> None:
    tags = Tags(page.text).tags
    labelled = {attributes.get("for") for tag, attributes, _ in tags if tag == "label"}
    for tag, attributes, inside in tags:
        if tag in ("input", "select", "textarea"):
            assert inside or attributes.get("id") in labelled or attributes.get("aria-label"), attributes
    roles = {attributes.get("id"): attributes.get("role") for _, attributes, _ in tags}
    assert roles["alert"] == "alert"
    assert roles["status"] == "status"


def test_experts_are_listed_with_what_is_known(served: Served) -> None:
    body = served.http.get("/v1/experts").json()
    assert body["base"] == BASE
    assert [one["id"] for one in body["data"]] == sorted(EXPERTS)
    assert {one["routable"] for one in body["data"]} == {True}
    assert body["data"][0]["gain"] is None
    assert {point["id"] for point in body["map"]["experts"]} == set(EXPERTS)
    assert "prompt" not in body["map"]


def test_a_route_has_the_map_when_it_is_asked_for(served: Served) -> None:
    assert "map" not in served.http.post("/v1/route", json={"input": "law"}).json()
    found = served.http.post("/v1/route", json={"input": "law", "map": True}).json()["map"]
    projection = served.router.projection
    places = [(point["id"], [point["x"], point["y"]]) for point in found["experts"]]
    assert places == list(zip(EXPERTS, projection.positions.tolist(), strict=True))
    assert (found["prompt"]["x"], found["prompt"]["y"]) == projection.place([0.5] * 3)
    wrong = served.http.post("/v1/route", json={"input": "law", "map": "yes"})
    assert wrong.json()["error"]["param"] == "map"


def test_the_map_has_who_can_be_routed_to_and_facts_belong_to_content(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with serving(tmp_path_factory.mktemp("pool"), admin_key="admin") as served:
        admin = {"authorization": "Bearer admin"}
        served.http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}, headers=admin)
        folder = served.parts.admin._root / "other"
        folder.mkdir(parents=True)
        (folder / "ok").touch()
        loaded = {"lora_name": "law", "lora_path": "other"}
        assert served.http.post("/v1/load_lora_adapter", json=loaded, headers=admin).status_code == 200
        body = served.http.get("/v1/experts").json()
        assert {point["id"] for point in body["map"]["experts"]} == {"code", "math"}
        assert [one["id"] for one in body["data"] if one["routable"]] == ["code", "math"]
        answer = served.http.post("/v1/route", json={"input": "law math", "map": True}).json()
        assert {point["id"] for point in answer["map"]["experts"]} == {"code", "math"}
        assert "prompt" in answer["map"]
