"""Sparse models and arrow over HTTP: listed, named, loaded, unloaded, refused; the engine is scripted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loramux.adapters.sparse.model import Kind
from tests.http.serving import BASE, EXPERTS, Served, Tray, serving, sparse_model
from tests.http.test_routes import listed, post, samples

COE, MIX = "coe", "mix"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = (sparse_model(MIX, Kind.MIXLORA), sparse_model(COE, Kind.LORACOE))
    with serving(tmp_path_factory.mktemp("pool"), admin_key="admin", sparse=models) as running:
        yield running


def loramux(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_dump()["loramux"]
    return found


def test_sparse_models_are_listed_with_their_kind(served: Served) -> None:
    cards = {card.id: card.model_dump() for card in served.client.models.list()}
    assert list(cards) == ["auto", BASE, *EXPERTS, COE, MIX]
    assert (cards[MIX]["root"], cards[MIX]["parent"]) == (MIX, BASE)
    assert cards[MIX]["loramux"] == {"kind": "mixlora", "experts": 2, "rank": 4}
    assert cards["math"]["loramux"] == {"routable": True, "route_from": "pool"}
    assert served.client.models.retrieve(COE).model_dump() == cards[COE]


@pytest.mark.parametrize(("model", "kind"), [(MIX, "mixlora"), (COE, "loracoe")])
def test_a_sparse_model_answers_by_its_name(served: Served, model: str, kind: str) -> None:
    raw = served.client.completions.with_raw_response.create(model=model, prompt="math")
    assert raw.headers["x-loramux-experts"] == f"{model}=1"
    answer = raw.parse()
    assert answer.model == model
    assert loramux(answer)["route"]["strategy"] == "named"
    assert [expert["id"] for expert in loramux(answer)["route"]["experts"]] == [model]
    blend = loramux(answer)["blend"]
    assert (blend["method"], blend["rank"], blend["relative_error"]) == (kind, 4, 0.0)
    adapter: Any = served.engine.works[-1].adapter
    assert adapter.key == blend["key"]
    assert adapter.slot.model.id == model


def test_a_sparse_model_streams(served: Served) -> None:
    chunks = list(served.chat("a", model=MIX, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello, world."
    assert loramux(chunks[0])["blend"]["method"] == "mixlora"


def test_keys_tell_models_apart_and_never_meet_a_blends(served: Served) -> None:
    keys = [loramux(served.chat("a", model=model))["blend"]["key"] for model in (MIX, COE, "math", MIX)]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"lora": [{"id": "math"}]}, "lora"),
        ({"routing": {"top_m": 1}}, "routing"),
        ({"routing": {"strategy": "arrow"}}, "routing"),
    ],
)
def test_a_sparse_model_is_not_mixed_or_routed(served: Served, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat("a", model=MIX, extra_body=extra)
    assert caught.value.param == param


def test_a_sparse_model_is_no_expert(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.chat("a", extra_body={"lora": [{"id": MIX}]})
    assert caught.value.param == "lora[0].id"


def test_unknown_models_are_told_what_there_is(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.chat("a", model="nobody")
    assert all(name in caught.value.message for name in ("auto", BASE, *EXPERTS, COE, MIX))


def test_load_and_entropy_are_in_the_metrics(served: Served) -> None:
    found = samples(served)
    assert found[f"loramux_sparse_expert_tokens_total|expert=0|model={MIX}"] == 5
    assert found[f"loramux_sparse_expert_tokens_total|expert=1|model={MIX}"] == 3
    assert found[f"loramux_sparse_router_entropy_nats|model={COE}"] == 0.25
    assert found["loramux_sparse_bytes|what=models"] == 2000


def test_a_sparse_model_is_loaded_used_and_unloaded_while_it_streams(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "late"
    folder.mkdir(parents=True)
    (folder / "sparse").touch()
    with serving(tmp_path, admin_key="admin") as served:
        described = post(served, "load", lora_name="late", lora_path="late").json()
        assert (described["id"], described["kind"], described["bytes"]) == ("late", "loracoe", 1000)
        assert listed(served) == [*EXPERTS, "late"]
        assert post(served, "load", lora_name="late", lora_path="late").status_code == 409
        served.hold()
        body = {"model": "late", "prompt": "a", "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as last:
            served.wait_for(lambda: served.engine.running == 1)
            slot: Any = served.engine.works[-1].adapter
            tray: Tray = slot.slot
            assert post(served, "unload", lora_name="late").json() == {"id": "late", "unloaded": True}
            assert listed(served) == list(EXPERTS)
            assert post(served, "load", lora_name="late", lora_path="late").status_code == 200
            assert post(served, "unload", lora_name="late").status_code == 200
            assert not tray.released
            assert samples(served)["loramux_sparse_bytes|what=models"] == 1000
            served.release()
            assert "[DONE]" in last.read().decode()
        served.wait_for(lambda: tray.released)
        found = samples(served)
        assert found["loramux_sparse_bytes|what=models"] == 0
        assert not any("late" in name for name in found if "sparse" in name)
        assert served.http.post("/v1/completions", json={"model": "late", "prompt": "a"}).status_code == 404
        assert post(served, "unload", lora_name="late").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", [MIX, COE])
def test_a_sparse_models_name_is_taken(served: Served, name: str) -> None:
    assert post(served, "load", lora_name=name, lora_path="x").status_code == 409


@pytest.mark.parametrize("strategy", ["arrow", "spectr"])
def test_tokens_choose_from_every_expert_and_no_router_is_asked(served: Served, strategy: str) -> None:
    asked = len(served.router.asked)
    raw = served.client.chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": "law"}],
        extra_body={"routing": {"strategy": strategy, "top_m": 2, "temperature": 0.5}},
    )
    assert len(served.router.asked) == asked
    assert raw.headers["x-loramux-experts"] == "*"
    answer = loramux(raw.parse())
    assert answer["route"]["strategy"] == strategy
    assert not answer["route"]["fallback"]
    assert [(e["id"], e["weight"]) for e in answer["route"]["experts"]] == [(id, None) for id in EXPERTS]
    assert (answer["blend"]["method"], answer["blend"]["rank"]) == (strategy, 12)
    adapter: Any = served.engine.works[-1].adapter
    quiver, top_k, temperature = adapter.slot
    assert quiver.method == strategy
    assert {expert.id for expert in quiver.experts} == set(EXPERTS)
    assert (top_k, temperature) == (2, 0.5)
    assert samples(served)[f"loramux_sparse_bytes|what={strategy}"] == 500
    assert samples(served)[f"loramux_route_decisions_total|outcome={strategy}"] >= 1


def test_arrow_is_made_ready_once_and_shares_slots_between_equal_requests(served: Served) -> None:
    def ask(**fields: Any) -> Any:
        answer = served.chat("a", extra_body={"routing": {"strategy": "arrow", **fields}})
        return loramux(answer)["blend"], served.engine.works[-1].adapter

    (first, one), (second, two), (other, three) = ask(), ask(), ask(top_m=1)
    assert one is two
    assert first["key"] == second["key"] != other["key"]
    assert second["cached"]
    assert other["cached"]
    assert one.slot[0] is three.slot[0]
    assert one.slot[1:] == (3, 1.0)


def test_arrow_takes_experts_that_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "poems"
    folder.mkdir(parents=True)
    (folder / "ok").touch()
    arrow = {"routing": {"strategy": "arrow", "top_m": 16}}
    with serving(tmp_path, admin_key="admin") as served:
        post(served, "load", lora_name="poems", lora_path="poems")
        ids = [e["id"] for e in loramux(served.chat("a", extra_body=arrow))["route"]["experts"]]
        assert ids == [*EXPERTS, "poems"]
        for name in ids:
            post(served, "unload", lora_name=name)
        bare = loramux(served.chat("a", extra_body=arrow))
        assert bare["route"]["fallback"]
        assert bare["route"]["experts"] == []
        assert served.engine.works[-1].adapter is None


@pytest.mark.parametrize(
    ("field", "value"), [("policy", "softmax"), ("threshold", 0.5), ("merge", "exact"), ("merge", "svd")]
)
def test_what_arrow_cannot_use_is_refused_by_name(served: Served, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat("a", extra_body={"routing": {"strategy": "arrow", field: value}})
    assert caught.value.param == f"routing.{field}"
    assert "arrow" in caught.value.message


def test_arrow_has_no_decision_to_show(served: Served) -> None:
    answer = served.http.post("/v1/route", json={"input": "a", "routing": {"strategy": "arrow"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "routing.strategy"
