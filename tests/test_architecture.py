"""Dependencies point one way; read from the source, so that nothing has to be imported."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stnerp"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Every module that a module imports, in functions too; names of this package to the module."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                parent = ".".join([*base, parent] if parent else base)
            children = {f"{parent}.{alias.name}" for alias in node.names}
            modules = children & set(FILES)
            found |= modules
            if len(modules) < len(children):
                found.add(parent)
    return found


def own(name: str) -> set[str]:
    """Modules of this package that a module imports, without the package's name."""
    return {found.removeprefix("stnerp.") for found in imports(name) if found == "stnerp" or found in FILES}


def everything_below(name: str) -> set[str]:
    """All modules of this package that a module needs, directly or not."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for found in own(waiting.pop()):
            full = f"stnerp.{found}"
            if full not in seen and full in FILES:
                seen.add(full)
                waiting.append(full)
    return {found.removeprefix("stnerp.") for found in seen}


def test_the_reader_of_imports_reads() -> None:
    assert {"fit", "model", "geometry"} <= own("stnerp")
    assert own("stnerp.fit") >= {"losses", "velocity"}  # `from stnerp import losses` is a module
    assert "torch" in imports("stnerp.warp")
    assert len(FILES) > 20


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", set()),
        ("geometry", {"errors"}),
        ("warp", {"geometry", "errors"}),
        ("velocity", {"warp", "geometry", "errors"}),
        ("losses", set()),
        ("metrics", {"geometry", "errors"}),
        ("time_basis", {"errors"}),
        ("window", {"errors"}),
        ("device", {"errors"}),
        ("atomic", {"errors"}),
        ("checkpoint", {"atomic", "errors"}),
        ("resume", {"checkpoint", "atomic", "errors"}),
        ("watch", {"errors"}),
        ("memory", {"presets", "geometry", "errors"}),
    ],
)
def test_foundations_import_only_what_is_below_them(name: str, allowed: set[str]) -> None:
    assert own(f"stnerp.{name}") <= allowed


def test_the_chain_of_the_method_points_one_way() -> None:
    # geometry ← warp ← velocity ← def_net ← fit ← model in meaning; a fit returns a model, so it imports it.
    order = ["geometry", "warp", "velocity", "def_net", "model", "fit"]
    for i, name in enumerate(order):
        assert not everything_below(f"stnerp.{name}") & set(order[i + 1 :]), name
    assert {"geometry", "warp", "velocity", "def_net"} <= everything_below("stnerp.model")
    assert "model" in own("stnerp.fit")


def test_metrics_know_no_network() -> None:
    assert everything_below("stnerp.metrics") <= {"geometry", "errors"}
    networks = {"networks", "ref_net", "def_net", "model", "fit"}
    for name in FILES:
        if name == "stnerp.baselines.st_nerp":  # ST-NeRP behind the baselines' interface
            continue
        if name.startswith("stnerp.baselines") or name in ("stnerp.phantom", "stnerp.motion", "stnerp.series"):
            assert not everything_below(name) & networks, name


def test_only_the_report_draws_and_only_scripts_are_configured() -> None:
    for name in FILES:
        top = {found.partition(".")[0] for found in imports(name)}
        assert not top & {"hydra", "omegaconf"}, name
        assert not top & {"scripts", "benchmarks", "tests", "conftest"}, name
        if name != "stnerp.report":
            assert "matplotlib" not in top, name


def test_importing_the_package_draws_nothing() -> None:
    # matplotlib belongs to an extra: without it, everything but pictures works.
    assert "report" not in everything_below("stnerp")
    tree = ast.parse(FILES["stnerp.report"].read_text(encoding="utf-8"))
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("matplotlib" in ast.unparse(node) for node in top_level)


def test_no_cycles() -> None:
    graph = {name: {found for found in imports(name) if found in FILES and found != name} for name in FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(FILES)
    assert order[-1] != "stnerp.errors"
    # Nothing inside imports the package's front door.
    assert not any("stnerp" in found for found in graph.values())


def test_no_utils() -> None:
    for name in FILES:
        assert name.rpartition(".")[2] not in {"utils", "util", "helpers", "common", "misc", "tools"}


def borrowed_from_nobody(source: str) -> list[int]:
    """Lines where an array view is taken of an image that nothing keeps."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("GetArrayViewFromImage")
        and any(isinstance(part, ast.Call | ast.BinOp) for part in ast.walk(node.args[0]))
    ]


def test_no_view_outlives_its_image() -> None:
    # A view doesn't keep its image: one of a call's result reads memory that is free, and is mostly right.
    assert borrowed_from_nobody("view = sitk.GetArrayViewFromImage(model.image(t))") == [1]
    assert borrowed_from_nobody("view = sitk.GetArrayViewFromImage(images[0])") == []
    for folder in ("stnerp", "scripts", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not borrowed_from_nobody(path.read_text(encoding="utf-8")), path


def test_files_take_their_place_in_one_way() -> None:
    # A writer of its own would forget the disk, what killed processes left, or the user's one line.
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert ("os.replace(" in text) == (name == "stnerp.atomic"), name
