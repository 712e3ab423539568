"""The files of docker/ray, without Ray and without Kubernetes: names, arguments, that both say the same."""

import importlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from loramux.server.errors import StartError
from loramux.server.ray.app import application
from loramux.server.ray.options import RayOptions
from tests.kube_schema import resource, schema_of, touched

TESTS = Path(__file__).parents[3]
RAY = TESTS.parent / "docker" / "ray"
SCHEMA = json.loads((TESTS / "rayservice_schema.json").read_text())
CRD = "RAYSERVICE_CRD"


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY / "rayservice.yaml").read_text())
    return found


def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY / "serve.yaml").read_text())
    return found


def test_the_manifest_is_what_the_schema_allows() -> None:
    jsonschema.validate(manifest(), SCHEMA)


@pytest.mark.skipif(CRD not in os.environ, reason=f"{CRD} names no ray.io_rayservices.yaml of KubeRay")
def test_the_whole_schema_allows_it_and_the_part_here_is_of_it() -> None:
    whole = resource(schema_of(Path(os.environ[CRD]), "v1"))
    jsonschema.validate(manifest(), whole)
    part = touched(whole, manifest())
    assert {name: value for name, value in SCHEMA.items() if name != "$comment"} == part


def misspelt(spec: dict[str, Any]) -> None:
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 3


def wrong_type(spec: dict[str, Any]) -> None:
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["rayStartParams"] = {"num-gpus": 1}


def no_template(spec: dict[str, Any]) -> None:
    del spec["rayClusterConfig"]["headGroupSpec"]["template"]


@pytest.mark.parametrize("spoil", [misspelt, wrong_type, no_template])
def test_the_schema_finds_mistakes(spoil: Callable[[dict[str, Any]], None]) -> None:
    value = manifest()
    spoil(value["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, SCHEMA)


def test_the_manifest_deploys_what_the_config_file_says() -> None:
    assert yaml.safe_load(manifest()["spec"]["serveConfigV2"]) == config()


def test_the_import_path_is_a_builder_that_takes_the_arguments() -> None:
    (entry,) = config()["applications"]
    module, _, name = entry["import_path"].partition(":")
    builder = getattr(importlib.import_module(module), name)
    assert builder is application
    # What Ray Serve asks of a builder: one argument, a model of which it makes of `args`.
    assert [one.annotation for one in inspect.signature(builder).parameters.values()] == [RayOptions]
    options = RayOptions(**entry["args"])
    settings = options.load()
    assert settings.replicas == 3
    assert (settings.host, options.devices) == ("0.0.0.0", 1)  # noqa: S104


def test_the_machines_have_what_the_engines_reserve() -> None:
    args = config()["applications"][0]["args"]
    cluster = manifest()["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == args["gpus"] * args["per_machine"]
    # One CPU is left, which the edge takes on one of them.
    assert int(limits["cpu"]) == args["cpus"] * args["per_machine"] + 1
    assert group["replicas"] * args["per_machine"] == args["settings"]["replicas"]
    assert args["settings"]["pool"].startswith(container["volumeMounts"][0]["mountPath"])
    pins = (TESTS.parent / "pyproject.toml").read_text()
    assert f'"ray[serve]>={cluster["rayVersion"].rpartition(".")[0]},' in pins


@pytest.mark.parametrize(
    ("given", "devices"),
    [({}, None), ({"gpus": 1}, 1), ({"gpus": 1, "per_machine": 4}, 4), ({"gpus": 0.5, "per_machine": 4}, 2)],
)
def test_engines_of_a_machine_share_its_gpus(given: dict[str, Any], devices: int | None) -> None:
    assert RayOptions(**given).devices == devices


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "set replicas"),
        ({"replicas": 2, "backend": {"urls": ["http://127.0.0.1:1"]}}, "leave backend.urls out"),
        ({"replica": 2}, "unknown setting 'replica'"),
    ],
)
def test_settings_that_engines_cannot_have(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StartError, match=complaint):
        RayOptions(settings=settings).load()


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match="per_node"):
        RayOptions(per_node=2)  # type: ignore[call-arg]
