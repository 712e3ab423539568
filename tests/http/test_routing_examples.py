"""An adapter that comes with example texts is routed to until it goes; the router is the demo pool's."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import ReadOptions
from loramux.router.classifier import LinearClassifier
from loramux.router.router import Router
from loramux.router.service import RoutingService
from loramux.router.store import load_router
from tests.http import serving as kit
from tests.http.serving import Served, serving
from tests.kit import DEMO_POOL

ADMIN = {"authorization": "Bearer admin"}
POEMS = [
    "Write a poem about the autumn rain",
    "Compose a short poem on the lonely sea",
    "A haiku about cherry blossoms, please",
    "Write a sonnet for my love, with rhymes",
    "Give me four lines of verse about winter stars",
]
CHEMISTRY = [
    "Balance the equation of sodium and chlorine",
    "Which acid reacts with zinc to give hydrogen gas?",
    "How many protons are in a carbon atom?",
    "Name the product when copper oxide is heated with hydrogen",
]
POEM, SHELL = "Compose a poem on old mountains and rhymes", "Find all .log files in /var and delete them"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The experts of the demo pool, and folders to load: three adapters, a broken one, a sparse model."""
    root = tmp_path / "adapters"
    for name in ("poems", "chemistry", "files-find"):
        (root / name).mkdir(parents=True)
        (root / name / "ok").touch()
    (root / "broken").mkdir()
    (root / "mixture").mkdir()
    (root / "mixture" / "sparse").touch()
    router = RoutingService(load_router(DEMO_POOL / "router"))
    with serving(tmp_path, router=router, admin_key="admin") as running:
        yield running


def post(served: Served, action: str, **body: Any) -> httpx.Response:
    return served.http.post(f"/v1/{action}_lora_adapter", json=body, headers=ADMIN)


def load(served: Served, name: str, path: str, examples: Any = None) -> httpx.Response:
    given = {} if examples is None else {"routing_examples": examples}
    return post(served, "load", lora_name=name, lora_path=path, **given)


def route(served: Served, text: str) -> dict[str, Any]:
    answer = served.http.post("/v1/route", json={"input": text})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def cards(served: Served) -> dict[str, Any]:
    return {card["id"]: card.get("loramux") for card in served.http.get("/v1/models").json()["data"]}


def listed(served: Served) -> dict[str, Any]:
    data = served.http.get("/v1/lora_adapters", headers=ADMIN).json()["data"]
    return {entry["id"]: entry for entry in data}


def routable(served: Served) -> float:
    """The gauge, as a scrape sees it."""
    lines = served.http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("loramux_routable_experts ")).split()[1])


def state(served: Served) -> tuple[Any, ...]:
    """What a load that fails must leave as it was."""
    return (served.parts.router.router, route(served, POEM), cards(served), listed(served), routable(served))  # type: ignore[attr-defined]


def test_a_loaded_adapter_is_routed_to_until_it_goes(served: Served) -> None:
    before = {text: route(served, text) for text in (POEM, SHELL)}
    assert len(before[POEM]["candidates"]) == routable(served) == 12
    start = time.perf_counter()
    answer = load(served, "poems", "poems", POEMS).json()
    assert time.perf_counter() - start < 1
    assert (answer["routable"], answer["route_from"], answer["truncated_examples"]) == (True, "examples", 0)
    shown = route(served, POEM)
    assert shown["experts"][0]["id"] == "poems"
    assert len(shown["candidates"]) == routable(served) == 13
    assert shown["reason"].endswith(f"best is poems with score {shown['experts'][0]['score']:.3f}")
    used = served.chat(POEM).model_dump()["loramux"]["route"]["experts"][0]
    assert (used["id"], used["score"]) == ("poems", shown["experts"][0]["score"])
    assert served.engine.works[-1].adapter is not None
    assert route(served, SHELL)["experts"][0]["id"] == before[SHELL]["experts"][0]["id"] == "files-find"
    fields = {"routable": True, "route_from": "examples"}
    assert cards(served)["poems"] == fields
    assert fields.items() <= listed(served)["poems"].items()
    assert cards(served)["files-find"] == {"routable": True, "route_from": "pool"}
    post(served, "unload", lora_name="poems")
    assert {text: route(served, text) for text in (POEM, SHELL)} == before
    assert served.chat(POEM).model_dump()["loramux"]["route"]["experts"][0]["id"] != "poems"
    assert routable(served) == 12
    again = load(served, "poems", "poems").json()
    assert again["routable"] is False
    assert not {"route_from", "truncated_examples"} & set(again)
    assert cards(served)["poems"] == {"routable": False}
    assert route(served, POEM) == before[POEM]
    assert served.chat("a", model="poems").choices


def test_a_name_of_the_pool_may_come_back_with_another_content(served: Served) -> None:
    post(served, "unload", lora_name="files-find")
    assert load(served, "files-find", "poems", POEMS).json()["route_from"] == "examples"
    assert route(served, POEM)["experts"][0]["id"] == "files-find"
    shell = route(served, SHELL)
    assert "files-find is not served; next is" in shell["reason"]
    assert routable(served) == 12
    # The pool's own content under another name has the pool's route; both are served side by side.
    assert load(served, "shell", "files-find").json()["route_from"] == "pool"
    assert route(served, SHELL)["experts"][0]["id"] == "shell"
    assert "best is shell" in route(served, SHELL)["reason"]
    assert routable(served) == 13
    served.chat(SHELL)
    served.chat(POEM)


def test_content_that_the_router_knows_keeps_its_route(served: Served) -> None:
    """Examples promise a route, not a new one: the fitted one is better."""
    fitted = served.parts.router.router  # type: ignore[attr-defined]
    post(served, "unload", lora_name="files-find")
    answer = load(served, "shell", "files-find", POEMS).json()
    assert (answer["routable"], answer["route_from"], answer["truncated_examples"]) == (True, "pool", 0)
    assert served.parts.router.router is fitted  # type: ignore[attr-defined]
    refused = load(served, "more", "files-find", POEMS)
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "routing_examples")
    assert "'shell' has the same content" in refused.json()["error"]["message"]
    assert "more" not in listed(served)


def test_examples_for_content_that_is_served_by_name_only_are_a_conflict(served: Served) -> None:
    """Else the route would go to the name that was there before, and not to the one that brought them."""
    load(served, "a-poems", "poems")
    before = state(served)
    refused = load(served, "b-poems", "poems", POEMS)
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "routing_examples")
    assert state(served) == before


def test_a_route_stays_while_its_content_is_served(served: Served) -> None:
    load(served, "z-poems", "poems", POEMS)
    second = load(served, "a-poems", "poems").json()
    assert second["routable"] is False
    assert route(served, POEM)["experts"][0]["id"] == "z-poems"
    assert load(served, "b-poems", "poems", POEMS).status_code == 409
    post(served, "unload", lora_name="z-poems")
    assert cards(served)["a-poems"] == {"routable": True, "route_from": "examples"}
    assert route(served, POEM)["experts"][0]["id"] == "a-poems"
    post(served, "unload", lora_name="a-poems")
    assert routable(served) == 12
    assert len(route(served, POEM)["candidates"]) == 12


@pytest.mark.parametrize(
    ("examples", "param", "message"),
    [
        ([], "routing_examples", "at least 1"),
        ("Write a poem", "routing_examples", "list"),
        (7, "routing_examples", "list"),
        (True, "routing_examples", "list"),
        ({"text": "Write a poem"}, "routing_examples", "list"),
        ([1], "routing_examples[0]", "string"),
        (["Write a poem", None], "routing_examples[1]", "string"),
        (["Write a poem", ["nested"]], "routing_examples[1]", "string"),
        ([{"text": "Write a poem"}], "routing_examples[0]", "string"),
        (["Write a poem", ""], "routing_examples[1]", "0 characters"),
        (["Write a poem", "x" * 8193], "routing_examples[1]", "8192"),
        (["Write a poem"] * 65, "routing_examples", "at most 64"),
        ([[]] * 10_000, "routing_examples", "at most 64"),
        (["Write a poem", " \n\t"], "routing_examples[1]", "blank"),
        (["Write a poem", "?! …"], "routing_examples[1]", "blank"),
        (["\u0000"], "routing_examples[0]", "blank"),
        (["🚢"], "routing_examples[0]", "blank"),
        (["Write a poem", "今天天气怎么样"], "routing_examples[1]", "encoder"),
        (["Write a poem", "9f8e7d6c5b4a 0x1f2e3d"], "routing_examples[1]", "encoder"),
    ],
)
def test_bad_examples_are_named_and_leave_nothing_behind(
    served: Served, examples: Any, param: str, message: str
) -> None:
    before = state(served)
    answer = load(served, "poems", "poems", examples)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert state(served) == before
    assert load(served, "poems", "poems", POEMS).json()["routable"] is True


@pytest.mark.parametrize(
    ("name", "path", "status", "param"),
    [
        ("poems", "broken", 400, "lora_path"),
        ("poems", "absent", 400, "lora_path"),
        ("poems", "../poems", 400, "lora_path"),
        ("Poems", "poems", 400, "lora_name"),
        ("auto", "poems", 409, "lora_name"),
        ("files-find", "poems", 409, "lora_name"),
        (kit.BASE, "poems", 409, "lora_name"),
        ("mixture", "mixture", 400, "routing_examples"),
    ],
)
def test_bad_adapters_with_good_examples_leave_nothing_behind(
    served: Served, name: str, path: str, status: int, param: str
) -> None:
    before = state(served)
    answer = load(served, name, path, POEMS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert state(served) == before


def test_an_adapter_that_never_fits_leaves_no_route(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by the residency, after its examples have been read."""

    def read(folder: Path, name: str, _: ReadOptions) -> LoraAdapter | SparseModel:
        return kit.expert(name, rank=100, content=folder.name)

    monkeypatch.setattr(served.parts.admin, "_read", read)
    before = state(served)
    answer = load(served, "poems", "poems", POEMS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
    assert "residency.rows" in answer.json()["error"]["message"]
    assert state(served) == before


def test_limits_can_be_set(tmp_path: Path) -> None:
    limits = {"max_routing_examples": 2, "max_routing_example_length": 20}
    with serving(tmp_path, admin_key="admin", limits=limits) as served:
        for examples, param in ((["a"] * 3, "routing_examples"), (["a", "b" * 21], "routing_examples[1]")):
            answer = load(served, "poems", "poems", examples)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_long_examples_are_cut_and_counted(served: Served) -> None:
    answer = load(served, "poems", "poems", [*POEMS, "poem " * 1500, "rhyme " * 1000]).json()
    assert (answer["routable"], answer["truncated_examples"]) == (True, 2)


def test_a_pool_whose_head_has_no_closed_form_says_so(tmp_path: Path) -> None:
    fitted = load_router(DEMO_POOL / "router")
    head = fitted.state.classifier
    assert head is not None
    other = LinearClassifier(head.weight + np.float32(1), head.bias)
    router = RoutingService(Router(replace(fitted.state, classifier=other), fitted.encoder))
    (tmp_path / "adapters" / "poems").mkdir(parents=True)
    (tmp_path / "adapters" / "poems" / "ok").touch()
    with serving(tmp_path, router=router, admin_key="admin") as served:
        error = load(served, "poems", "poems", POEMS).json()["error"]
        assert (error["param"], error["code"]) == ("routing_examples", "examples_refused")
        assert "fitted again" in error["message"]
        assert "poems" not in listed(served)
        assert load(served, "poems", "poems").json()["routable"] is False


def test_loads_at_the_same_time_are_all_right(served: Served) -> None:
    """Two adapters, and one name twice, come and go while texts are routed: no decision mixes two routers."""
    stop = threading.Event()
    seen: set[int] = set()

    def keep_routing() -> None:
        number = 0
        while not stop.is_set():
            shown = route(served, f"{POEM} {number % 7}")
            names = [one["id"] for one in shown["candidates"]]
            assert len(set(names)) == len(names)
            assert all(len(name) < 64 and not name.startswith("hash") for name in names)
            seen.add(len(names))
            answer = served.http.post("/v1/completions", json={"model": "auto", "prompt": POEM})
            assert answer.status_code == 200, answer.text
            number += 1

    with ThreadPoolExecutor(8) as pool:
        routing = [pool.submit(keep_routing) for _ in range(3)]
        for _ in range(5):
            loads = [
                pool.submit(load, served, "poems", "poems", POEMS),
                pool.submit(load, served, "chemistry", "chemistry", CHEMISTRY),
                pool.submit(load, served, "poems", "poems", POEMS),
            ]
            assert sorted(done.result().status_code for done in loads) == [200, 200, 409]
            assert route(served, POEM)["experts"][0]["id"] == "poems"
            acid = "Which acid reacts with copper to give hydrogen gas?"
            assert route(served, acid)["experts"][0]["id"] == "chemistry"
            assert routable(served) == 14
            goes = [pool.submit(post, served, "unload", lora_name=name) for name in ("poems", "chemistry")]
            assert [done.result().status_code for done in goes] == [200, 200]
        stop.set()
        for done in routing:
            done.result()
    assert seen <= {12, 13, 14}
    assert routable(served) == len(route(served, POEM)["candidates"]) == 12


def test_the_page_tells_how_many_experts_auto_has(served: Served) -> None:
    page = served.http.get("/").text
    assert "experts.filter(one => one.routable)" in page
    assert "by name only" in page
