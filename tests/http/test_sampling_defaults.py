"""How tokens are drawn where a request does not say: as settings, pool or OpenAI have it, in that order."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from loramux.server.errors import StartError
from loramux.server.pool.manifest import PoolError, read_pool
from loramux.server.settings import load_settings
from tests.http.serving import Served, serving
from tests.kit import DEMO_POOL

POOL = {"temperature": 0.2, "top_p": 0.9, "top_k": 40}
SETTINGS = {"top_p": 0.7, "repetition_penalty": 1.1}


def drawn(served: Served) -> tuple[float, float, int, float, float]:
    """Of the last sequence: temperature, top-p, top-k, min-p, repetition penalty."""
    last = served.engine.works[-1].sampling
    return last.temperature, last.top_p, last.top_k, last.min_p, last.repetition_penalty


def test_a_request_comes_before_the_settings_and_those_before_the_pool(tmp_path: Path) -> None:
    with serving(tmp_path, pool_sampling=POOL, sampling=SETTINGS) as served:
        served.chat()
        assert drawn(served) == (0.2, 0.7, 40, 0.0, 1.1)
        served.chat(temperature=1, extra_body={"top_k": 0, "min_p": None})
        assert drawn(served) == (1.0, 0.7, 0, 0.0, 1.1)
        served.chat(extra_body={"temperature": None})
        assert drawn(served)[0] == 0.2
        served.client.completions.create(model="auto", prompt="hello", top_p=1)
        assert drawn(served) == (0.2, 1.0, 40, 0.0, 1.1)
        response = served.client.responses.create(model="auto", input="hello")
        assert drawn(served) == (0.2, 0.7, 40, 0.0, 1.1)
        assert (response.temperature, response.top_p) == (0.2, 0.7)  # what was used is what is told


def test_with_nothing_said_anywhere_it_is_openais(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.chat()
        assert drawn(served) == (1.0, 1.0, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": 1e-9}, "must be 0, or at least"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 1}, "seed"),
    ],
    ids=str,
)
def test_a_default_that_no_request_could_have_stops_the_start(
    tmp_path: Path, given: Mapping[str, float], named: str
) -> None:
    with pytest.raises(StartError, match=named):
        load_settings(flags={"sampling": given})
    pool = json.loads((DEMO_POOL / "pool.json").read_text())
    (tmp_path / "pool.json").write_text(json.dumps({**pool, "sampling": given}))
    with pytest.raises(PoolError, match=named):
        read_pool(tmp_path)
