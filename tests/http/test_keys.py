"""Who may call what, over every route that the app has."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute

from loramux.server.app import ROUTE_GROUPS
from loramux.server.edge.keys import ADMIN_PATHS, OPEN_PATHS
from tests.http.serving import Served, serving

KEYS = ("first-key", "second-key")
ADMIN = "admin-key"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool"), keys=KEYS, admin_key=ADMIN) as running:
        yield running


def routes(served: Served) -> list[tuple[str, str]]:
    found = [
        (method, route.path.replace("{model:path}", "math"))
        for group in ROUTE_GROUPS
        for route in group(served.parts).routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]
    assert len(found) >= 13
    return found


def call(served: Served, method: str, path: str, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}".strip()}
    return served.http.request(method, path, headers=headers, json={} if method == "POST" else None)


@pytest.mark.parametrize("key", [None, "", "wrong", "first-ke", "first-keyx", "first-key,second-key"])
def test_every_route_but_the_probes_needs_a_key(served: Served, key: str | None) -> None:
    for method, path in routes(served):
        answer = call(served, method, path, key)
        if path in OPEN_PATHS:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_any_key_opens_the_api_and_only_the_admin_key_the_administration(served: Served) -> None:
    for method, path in routes(served):
        for key in KEYS:
            assert (call(served, method, path, key).status_code == 401) == (path in ADMIN_PATHS), path
        expected = path in ADMIN_PATHS or path in OPEN_PATHS
        assert (call(served, method, path, ADMIN).status_code != 401) == expected, path


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/models",
        "/v1/models/../models",
        "//health/../v1/models",
        "/ready/../v1/models",
        "/v1%2fmodels",
        "/health%2f..%2fv1/models",
        "/health;/v1/models",
        "/nothing",
    ],
)
def test_odd_paths_are_no_way_around(served: Served, path: str) -> None:
    request = served.http.build_request("GET", path)
    request.url = request.url.copy_with(raw_path=path.encode())
    assert served.http.send(request).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-prefix": "/health"},
        {"x-original-url": "/health"},
        {"x-forwarded-for": "127.0.0.1"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": "first-key"},
    ],
)
def test_no_header_but_the_right_one_counts(served: Served, headers: dict[str, str]) -> None:
    assert served.http.get("/v1/models", headers=headers).status_code in (400, 401)


@pytest.mark.parametrize("host", ["localhost/health", "/health?", "localhost@elsewhere"])
def test_a_strange_host_opens_nothing(served: Served, host: str) -> None:
    assert served.http.get("/v1/models", headers={"host": host}).status_code in (400, 401, 403)


def test_two_authorization_headers_are_none(served: Served) -> None:
    pair = [("authorization", "Bearer first-key"), ("authorization", "Bearer wrong")]
    assert served.http.get("/v1/models", headers=pair).status_code == 401


def test_metrics_may_be_opened_by_a_setting(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("pool"), keys=KEYS, metrics_need_key=False) as served:
        assert served.http.get("/metrics").status_code == 200
        assert served.http.get("/v1/models").status_code == 401


def test_without_an_admin_key_the_administration_is_off(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("pool")) as served:
        answer = served.http.get("/v1/lora_adapters")
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "admin_off"
