"""The structure, checked: who may import whom, no circles, no grab-bag modules, files of one noun."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("kernels", "router", "adapters", "server")
ALLOWED: dict[str, frozenset[str]] = {
    "kernels": frozenset(),
    "router": frozenset(),
    "adapters": frozenset({"kernels"}),
    "server/engine": frozenset({"adapters", "kernels"}),
    "server": frozenset({"adapters", "kernels", "router", "server/engine"}),
}
LINES = 400


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def zone(path: Path) -> str:
    """The unit of the import rule that a file or module belongs to."""
    parts = path.parts
    return "server/engine" if parts[:2] == ("server", "engine") else parts[0]


def ours(path: Path) -> Iterator[Path]:
    """Every module of ours that a file imports, at its head or inside a function, relative to the root."""
    place = path.relative_to(ROOT)
    package = ("loramux", *place.parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from package import module` names the module only in the alias.
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "loramux" and rest:
                yield Path(*rest)


@pytest.mark.parametrize("path", sources(*TOP), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    home = zone(path.relative_to(ROOT))
    for module in ours(path):
        target = zone(module)
        assert target == home or target in ALLOWED[home], f"{path.relative_to(ROOT)} imports {module}"


def test_bare_names_are_not_imported() -> None:
    for path in sources(*TOP, "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(TOP), f"{path.relative_to(ROOT)}: {names}"


def module_of(path: Path) -> Path:
    return path.parent if path.name == "__init__.py" else path.with_suffix("")


def test_no_module_imports_itself_in_a_circle() -> None:
    known = {module_of(path.relative_to(ROOT)): path for path in sources(*TOP)}
    graph: dict[Path, set[Path]] = {}
    for module, path in known.items():
        targets = {target if target in known else target.parent for target in ours(path)}
        # A package's head gathers its own modules; that is no circle.
        apart = {target for target in targets if module not in target.parents}
        graph[module] = {target for target in apart & set(known) if target not in (module, *module.parents)}
    done: set[Path] = set()

    def visit(module: Path, trail: tuple[Path, ...]) -> None:
        assert module not in trail, " imports ".join(map(str, [*trail[trail.index(module) :], module]))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("path", sources(*TOP), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_about_one_noun(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES
    assert not {"utils", "util", "common", "helpers", "misc"} & set(path.relative_to(ROOT).parts[:-1])


def test_every_package_is_installed() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(("loramux", *path.parent.relative_to(ROOT).parts)) for path in sources(*TOP)}
    assert set(listed) == found


def test_the_rule_finds_what_it_forbids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.test_imports.ROOT", tmp_path)
    bad = tmp_path / "kernels" / "op" / "fast.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ...adapters import lora\n    import loramux.server.app\n")
    assert set(ours(bad)) == {Path("adapters/lora"), Path("server/app")}
