"""What has to be installed: declared, bounded, optional where it can be, and never fetched later."""

from __future__ import annotations

import ast
import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import offline
import pytest
from conftest import optional
from packaging.version import Version

from stnerp import film, report
from stnerp.baselines.pair import peer
from stnerp.errors import MissingDependencyError

# Warnings are errors, but for that of SimpleITK 2.5.0 when it is imported, which crashes where it is one.
STRICT = ("-W", "error", "-W", "ignore:builtin type:DeprecationWarning")
ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# What the name of a package isn't imported by.
PACKAGES = {
    "hydra": "hydra-core",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "omegaconf": "hydra-core",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "yaml": "PyYAML",
}
PEERS = {"ants": "antspyx", "itk": "itk-elastix", "picsl_greedy": "picsl-greedy", "convexadam": "convexadam"}
# Module -> extra: everything without which `import stnerp`, a fit and its answers must do.
OPTIONAL = {
    "hydra": "scripts",
    "omegaconf": "scripts",
    "matplotlib": "scripts",
    "imageio_ffmpeg": "film",
    "joblib": "cohort",
    "submitit": "cohort",
    "tensorboard": "tensorboard",
    **dict.fromkeys(PEERS, "peers"),
}


def listed(name: str) -> dict[str, str]:
    """Package -> what follows its name, in one list of pyproject.toml; a version without its sign."""
    (text,) = re.findall(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    return {package: rest.removeprefix(">=") for package, rest in re.findall(r'"([\w.-]+)([^"]*)"', text)}


def pinned(file: str) -> dict[str, str]:
    """Package in small letters -> version, of a file of constraints."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)}


CORE = listed("dependencies")
EXTRAS = {extra: listed(extra) for extra in ("scripts", "film", "cohort", "tensorboard", "peers")}
TESTED = {**CORE, **EXTRAS["scripts"], **EXTRAS["film"], **EXTRAS["cohort"]}


# -- bounds


def test_every_dependency_has_a_lower_bound_and_no_upper_one() -> None:
    assert {"torch", "numpy", "hydra-core", "submitit"} <= set(TESTED)
    for package, bound in {**TESTED, **EXTRAS["tensorboard"], **EXTRAS["peers"]}.items():
        assert re.fullmatch(r"\d+(\.\d+)+", bound), f"{package}{bound}"


def test_the_lowest_versions_are_the_bounds() -> None:
    lowest = pinned("constraints-lowest.txt")
    assert set(lowest) == {package.lower() for package in TESTED}
    for package, bound in TESTED.items():
        assert Version(lowest[package.lower()]) == Version(bound), package


def test_the_newest_versions_keep_to_the_bounds() -> None:
    newest = pinned("constraints.txt")
    for package, bound in TESTED.items():
        assert Version(newest[package.lower()]) > Version(bound), package


def test_the_table_says_both() -> None:
    table = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (.+) \|$",
        (ROOT / "docs" / "installation.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    lowest, newest = pinned("constraints-lowest.txt"), pinned("constraints.txt")
    assert {package.lower() for package, *_ in table} == set(lowest)
    for package, low, new, _ in table:
        name = package.lower()
        assert low == lowest[name], package
        assert new == newest[name], package


# -- what is imported is declared


def imported(path: Path, everywhere: bool) -> set[str]:
    """Packages of others that a file imports, in functions too or at its top level alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
    own = {"stnerp", *(file.stem for file in (ROOT / "scripts").glob("*.py"))}
    return {name.partition(".")[0] for name in found} - own - set(sys.stdlib_module_names)


def packages(files: list[Path], everywhere: bool) -> set[str]:
    names = set[str]().union(*(imported(path, everywhere) for path in files))
    return {PACKAGES.get(name, name) for name in names}


LIBRARY, SCRIPTS = sorted((ROOT / "stnerp").rglob("*.py")), sorted((ROOT / "scripts").glob("*.py"))


def test_the_library_needs_what_it_declares() -> None:
    assert packages(LIBRARY, everywhere=False) == set(CORE)
    # And by name, with a message, the peers (`stnerp.baselines.pair.peer`).
    assert packages(LIBRARY, everywhere=True) == {*CORE, "matplotlib", "imageio-ffmpeg"}


def test_the_scripts_need_what_they_declare() -> None:
    assert packages(SCRIPTS, everywhere=False) <= {*CORE, "hydra-core"}
    assert packages(SCRIPTS, everywhere=True) <= {*CORE, "hydra-core", *EXTRAS["cohort"]}


def test_every_optional_module_has_its_extra() -> None:
    for module, extra in OPTIONAL.items():
        assert {**PACKAGES, **PEERS}.get(module, module) in EXTRAS[extra], module


# -- what is missing is named


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_scripts_without_hydra_name_the_extra() -> None:
    """Every script, in one process of its own, which has loaded nothing of Hydra yet."""
    scripts = [path for path in SCRIPTS if "launch(main)" in path.read_text(encoding="utf-8")]
    assert len(scripts) > 12
    code = """if True:
        import runpy, sys
        for module in ("hydra", "omegaconf"):
            sys.modules[module] = None
        for path in sys.argv[1:]:
            sys.path[0] = path.rpartition("/")[0]  # as Python itself sets it
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                print(path, end.code)
    """
    done = python(code, *map(str, scripts))
    assert done.stdout.splitlines() == [f"{path} 2" for path in scripts]
    line = "error: scripts need Hydra; install it with: pip install 'stnerp[scripts]'"
    assert done.stderr.splitlines() == [line] * len(scripts)


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("joblib", "with_joblib", ({}, 1, [])),
        ("submitit", "with_submitit", ({}, "slurm", 1, [], {})),
        ("tensorboard", "write_tensorboard", (Path("nowhere"), [])),
    ],
)
def test_cohorts_without_it_name_the_extra(
    module: str, function: str, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    cohort = importlib.import_module("cohort_table" if module == "tensorboard" else "cohort")
    without(monkeypatch, module, "torch.utils.tensorboard")
    with pytest.raises(MissingDependencyError, match=rf"pip install 'stnerp\[{OPTIONAL[module]}\]'") as error:
        list(getattr(cohort, function)(*arguments))
    assert len(str(error.value).splitlines()) == 1


def test_pictures_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib", "matplotlib.figure")
    with pytest.raises(MissingDependencyError, match=r"pip install 'stnerp\[scripts\]'"):
        report.loss_curve(tmp_path / "loss.png", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    assert list(tmp_path.iterdir()) == []


def test_mp4_without_ffmpeg_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "imageio_ffmpeg")
    with pytest.raises(MissingDependencyError, match=r"pip install 'stnerp\[film\]'"):
        film.write_mp4([np.zeros((16, 16, 3), np.uint8)] * 2, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", PEERS)
def test_peers_that_are_missing_name_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, module)
    with pytest.raises(MissingDependencyError, match=rf"{PEERS[module]} .* pip install 'stnerp\[peers\]'"):
        peer(module, PEERS[module])


# -- nothing is fetched


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; a failure shows what it said."""
    done = subprocess.run(
        [sys.executable, *STRICT, "-c", code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_guard_guards() -> None:
    with pytest.raises(offline.NetworkError, match=r"getaddrinfo: pypi\.org"):
        socket.create_connection(("pypi.org", 443), timeout=1)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        pytest.raises(offline.NetworkError, match="connect"),
    ):
        udp.connect(("192.0.2.1", 9))  # an address of nobody
    assert socket.getaddrinfo("localhost", 80)


LIFE = """if True:
    import importlib, pkgutil, sys
    import offline
    import stnerp
    optional = set(sys.argv[2:])
    assert not optional & set(sys.modules), optional & set(sys.modules)
    for module in pkgutil.walk_packages(stnerp.__path__, "stnerp."):
        importlib.import_module(module.name)
    assert not optional & set(sys.modules), optional & set(sys.modules)

    # A patient's way through the library with nothing but the core installed.
    for module in optional:
        sys.modules[module] = None
    from pathlib import Path
    from stnerp import html_report
    from stnerp.film import frame, write_gif
    from stnerp.phantom import LABELS, Phantom
    from stnerp.io.image import write_image
    import SimpleITK as sitk

    folder = Path(sys.argv[1])
    phantom = Phantom(size=(24, 19, 12), spacing_mm=15.0)
    for t in (0, 1, 2):
        write_image(phantom.image(t / 4), folder / f"{t}.nii.gz")
    series = stnerp.load_series(str(folder / "?.nii.gz"), [0, 1, 2], period=4.0)
    ref_net = stnerp.fit_reference(series, iterations=3)
    stnerp.fit_deformation(series, ref_net, levels=[(15, 30, 2)]).save(folder / "model.pt")
    model = stnerp.STNeRP.load(folder / "model.pt")
    heart = sitk.Cast(phantom.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    model.propagate(heart, 1.5)
    slices = sitk.GetArrayFromImage(model.image(1.5))
    write_gif([frame(values, model.window) for values in slices[5:7]], folder / "film.gif")
    html_report.FRAMES, html_report.CURVE_POINTS = 4, 3  # fewer times than usual, to save the time
    structures = [html_report.Structure("heart", heart)]
    page = html_report.write_html_report(folder / "report.html", model, structures=structures)
    assert page.stat().st_size > 10_000
"""


def test_a_fit_needs_the_core_alone_and_no_network(tmp_path: Path) -> None:
    python(LIFE, str(tmp_path), *OPTIONAL)


def test_scripts_are_imported_without_a_network() -> None:
    optional("hydra", "scripts")
    code = """if True:
        import importlib, sys
        import offline
        sys.path.insert(0, sys.argv[1])
        for script in sys.argv[2:]:
            importlib.import_module(script)
    """
    python(code, str(ROOT / "scripts"), *(path.stem for path in SCRIPTS))
