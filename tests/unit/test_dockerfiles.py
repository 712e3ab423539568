"""What the images promise, as far as their recipes show it; `make image` builds one and looks inside."""

import re
import tomllib

import pytest

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
