"""Every code block of the README and the documentation runs, in order, page by page.

A page gets a folder of its own with stand-ins of the files that pages name: a small phantom as NIfTI, DICOM and
RTSTRUCT, in the layouts of 4D-Lung, DIR-Lab and the test data. There

- ```python blocks run as they stand, in one namespace per page;
- ```sh blocks, and those without a language, run line by line: scripts of this repository in this process, of the
  programs in `ONLY_CHECKED` the arguments are checked, anything else is started as it stands.

Blocks in `FOR_THE_EYE` (```console, ```text) are not run: what another machine did and printed. So that a
page takes seconds, `quick` makes phantoms coarse and fits short; all settings are checked before they are cut.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import composed, optional

from stnerp import Grid, fit_deformation, load_series
from stnerp.io.dicom import write_dicom_series
from stnerp.io.landmarks import write_landmarks
from stnerp.io.nifti_4d import write_nifti_4d
from stnerp.io.rtstruct import write_rtstruct
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, LABELS, Phantom
from stnerp.presets import Level

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
FOR_THE_EYE = ("console", "text", "yaml", "json")
PEERS = ("ants", "itk")  # of the extra `peers`: blocks that import one run where it is installed
DAYS = {"day0": 0.0, "day5": 5.0, "day12": 12.0, "day21": 21.0, "day30": 30.0, "day37": 37.0}
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "fourier_width": 8}  # networks
# In tables of methods: those that take no time.
QUICK_METHODS = ("no_motion", "stnerp_fast")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it starts, its language, its code."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[3].strip(), textwrap.dedent(found[4]))
        for found in FENCE.finditer(text)
    ]


def commands(code: str) -> list[str]:
    """The command lines of a shell block, continued ones in one piece, without comments."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def inline_commands(page: Path) -> list[str]:
    """Commands between backticks in the text, in tables say."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"`((?:python|make|pip) [^`\n]+)`", text)
    return [command for command in found if "..." not in command]


# -- stand-ins


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files under the names that pages use: one thorax that breathes out from day 0 to day 30."""
    folder = tmp_path_factory.mktemp("patient")
    phantom = Phantom((26, 20, 13), 14.0, Breathing(*BOX_MM, period=60.0), n_landmarks=20)
    images = {name: phantom.image(t) for name, t in DAYS.items()}
    for name, t in DAYS.items():
        sitk.WriteImage(images[name], str(folder / f"{name}.nii.gz"))
        sitk.WriteImage(heart_of(phantom, t), str(folder / ("gtv.nii.gz" if t == 0 else f"gtv_{name}.nii.gz")))
        write_landmarks(phantom.landmarks(t), folder / f"{name}.csv")
    for copy, name in {"reference": "day0", "ct": "day0"}.items():
        shutil.copy(folder / f"{name}.nii.gz", folder / f"{copy}.nii.gz")
    sitk.WriteImage(phantom.labels(0.0), str(folder / "organs.nii.gz"))
    sitk.WriteImage(
        Grid.of(images["day0"]).image(np.zeros((*phantom.grid.shape, 3))), str(folder / "day30_to_day0.nii.gz")
    )
    (folder / "fiducials.fcsv").write_text("# CoordinateSystem = LPS\n# columns = id,x,y,z\n1,10,-20,35\n")
    (folder / "points.csv").write_text("x,y,z,t\n10,-20,35,0\n", encoding="utf-8")
    (folder / "points.txt").write_text("point\n1\n10 -20 35\n", encoding="utf-8")
    (folder / "phases").mkdir()
    for phase in range(5):
        sitk.WriteImage(phantom.image(12.0 * phase), str(folder / "phases" / f"t{phase}.mha"))
    (folder / "p5").mkdir()
    (folder / "p5" / "series.yaml").write_text("images: [../day0.nii.gz, ../day12.nii.gz]\ntimes: [0, 12]\n")
    scan = write_dicom_series(images["day0"], folder / "ct_plan", patient_id="p1", date="20240102")
    write_dicom_series(images["day21"], folder / "ct_day21", patient_id="p1", date="20240123")
    write_rtstruct(heart_of(phantom, 0.0), {1: "GTV"}, scan, folder / "plan.dcm")
    write_test_data(folder / "data", phantom)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        write_4d_lung(folder / "4D-Lung", patch)
        small_dirlab(patch)
        write_dirlab(folder / "dirlab")
    return folder


def heart_of(phantom: Phantom, t: float) -> sitk.Image:
    return sitk.Cast(phantom.labels(t) == LABELS["heart"], sitk.sitkUInt8)


def write_test_data(folder: Path, phantom: Phantom) -> None:
    """What `STNERP_DATA` names."""
    for name in ("lung_followup", "cine_mr", "thorax_4dct", "chest_ct"):
        (folder / name).mkdir(parents=True)
    sitk.WriteImage(phantom.image(0.0), str(folder / "chest_ct" / "ct.nii.gz"))
    sitk.WriteImage(heart_of(phantom, 0.0), str(folder / "chest_ct" / "heart.nii.gz"))
    for phase in (0, 5):
        sitk.WriteImage(phantom.image(6.0 * phase), str(folder / "thorax_4dct" / f"t{phase}.mha"))
    for name, t in {"baseline": 0.0, "followup": 30.0}.items():
        stem = folder / "lung_followup" / f"3DCT_lung_{name}"
        sitk.WriteImage(phantom.image(t), f"{stem}.mha")
        sitk.WriteImage(sitk.Cast(phantom.labels(t) == LABELS["lung"], sitk.sitkUInt8), f"{stem}_mask.mha")
        write_landmarks(phantom.landmarks(t), folder / "lung_followup" / f"{name}_landmarks.txt")
    times = [35.0 * k for k in range(25)]
    breath = [phantom.image(12.0 * phase) for phase in range(5)]
    write_nifti_4d((breath[k // 5] for k in range(25)), times, folder / "cine_mr" / "cine.nii.gz")


def write_4d_lung(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A patient with a 4D CT and later scans, another with scans alone; their hearts are called tumours."""
    made = importlib.import_module("four_d_lung_data")
    patch.setattr(made, "ROIS", {"heart": "Tumor"})
    patch.setattr(made, "_write_others", lambda *images: None)
    section = {"days": [0, 7, 14, 21], "phases": made.PHASES[::2], "amplitude_si_mm": 15, "tumour_scale": 0.7}
    section |= {"shift_mm": 4, "size": [18, 14, 9], "spacing_mm": 20, "noise_hu": 20, "seed": 0}
    phantom = made.phantom_of(section)
    organs = phantom.labels
    phantom.labels = lambda t: LABELS["heart"] * (organs(t) == LABELS["heart"])
    for name, phases, days in (
        ("100_HM10395", section["phases"], [0]),
        ("100_HM10395", [0], section["days"][1:]),
        ("101_HM10395", [0], section["days"]),
    ):
        patch.setattr(made, "PATIENT", name)
        made.write_collection(folder, phantom, days, phases)


def small_dirlab(patch: pytest.MonkeyPatch) -> None:
    """DIR-Lab's grids in voxels of three times the size."""
    grids = importlib.import_module("stnerp.io.dirlab").GRIDS
    for number, grid in grids.items():
        (x, y, z), (sx, sy, sz) = (tuple(n // 3 for n in grid.size), tuple(3 * s for s in grid.spacing_mm))
        patch.setitem(grids, number, replace(grid, size=(x, y, z), spacing_mm=(sx, sy, sz)))


def write_dirlab(folder: Path) -> None:
    dirlab = importlib.import_module("stnerp.io.dirlab")
    grid = dirlab.GRIDS[1]
    image = grid.image(np.random.default_rng(0).integers(-900, 100, grid.shape).astype(np.int16))
    points = grid.index_to_world(np.full((dirlab.LANDMARKS, 3), 5.0))
    folder.mkdir()
    sampled = dict.fromkeys(dirlab.SAMPLED_PHASES, points[: dirlab.SAMPLED_LANDMARKS])
    dirlab.write_case(folder, 1, {0: image, 50: image}, {0: points, 50: points}, sampled)


@pytest.fixture(scope="module")
def fitted(patient: Path) -> Path:
    """A model of days 0, 12 and 30 for pages that start from a finished run."""
    images = [str(patient / f"{name}.nii.gz") for name in ("day0", "day12", "day30")]
    series = load_series(images, [0, 12, 30])
    model = fit_deformation(series, None, levels=[(14, 28, 4)], **SMALL, progress=False, device="cpu")
    return model.save(patient / "patient.pt")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse phantoms, a handful of steps: what comes out is no good, but it comes out in a second."""
    optional("matplotlib", "scripts")
    fit, ref_net = importlib.import_module("stnerp.fit"), importlib.import_module("stnerp.ref_net")
    few = {"levels": (Level(14, 28, 3),), **SMALL}

    def cut(checked: Callable[..., Any], changes: dict[str, Any], settings: Any, asked: dict[str, Any]) -> Any:
        return replace(checked(settings, asked), **changes)

    monkeypatch.setattr(fit, "with_changes", partial(cut, fit.with_changes, few))
    monkeypatch.setattr(ref_net, "with_changes", partial(cut, ref_net.with_changes, {"iterations": 5, **SMALL}))
    appearance = importlib.import_module("stnerp.appearance")
    flow = replace(appearance.FLOW, levels=(Level(14, 28, 2),))
    monkeypatch.setattr(appearance, "fit_flow", partial(appearance.fit_flow, settings=flow))
    monkeypatch.setattr(fit, "fit_flow", partial(fit.fit_flow, settings=flow))
    phantom = importlib.import_module("stnerp.phantom")
    drawn = phantom._centred_grid

    def coarse(size: tuple[int, int, int], spacing_mm: Any) -> Grid:
        grid: Grid = drawn(size, spacing_mm)
        return grid.with_spacing(14.0)

    monkeypatch.setattr(phantom, "_centred_grid", coarse)
    small_dirlab(monkeypatch)
    monkeypatch.setattr("stnerp.agreement.WORK_MM", 14.0)
    # Painting takes a second a picture; what is to be painted has been put together by then.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: Path(path).write_bytes(b""))


@pytest.fixture
def here(
    request: pytest.FixtureRequest, patient: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The page's folder. It holds a finished run, unless the page itself makes it."""
    page: Path = request.param
    for found in patient.iterdir():
        (tmp_path / found.name).symlink_to(found)
    if "train_def.py out=runs/p1" not in page.read_text(encoding="utf-8"):
        run = tmp_path / "runs" / "p1"
        run.mkdir(parents=True)
        shutil.copy(fitted, run / "model.pt")
        (run / "train_def.yaml").write_text(
            "data: {kind: files, images: [day0.nii.gz, day12.nii.gz, day30.nii.gz], times: [0, 12, 30], "
            "period: null, reference: 0, window: auto, masks: gtv.nii.gz, landmarks: null, "
            "label_names: {1: gtv}, contours: null}\n"
        )
    if 'save("patient.pt")' in page.read_text(encoding="utf-8"):
        (tmp_path / "patient.pt").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STNERP_DATA", "data")
    monkeypatch.setenv("STNERP_4DLUNG", "4D-Lung")
    monkeypatch.setenv("STNERP_DIRLAB", "dirlab")
    for folder in ("scripts", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return tmp_path


# -- commands


def run_script(script: str, overrides: list[str]) -> None:
    """A script of ours as from the command line, in this process."""
    given = [override.partition("=")[0] for override in overrides]
    config = composed(script, *overrides)
    more = {"progress": "false", "device": "cpu"}
    few = {"max_pictures": 1, "curve_points": 3, "refits": 2, "pixels": 64, "frames": 3}
    more |= {name: str(number) for name, number in few.items() if name in config}
    if isinstance(config.get("held_out"), optional("omegaconf", "scripts").ListConfig) and "methods" in config:
        more["held_out"] = f"[{config.held_out[0]}]"
    if config.get("methods") is not None:
        more["methods"] = f"[{','.join(name for name in config.methods if name in QUICK_METHODS)}]"
    if script == "eval_dirlab" and "cases" not in given:
        more["cases"] = "[1]"
    if isinstance(config.get("grid"), int | float):
        more["grid"] = "14"
    if script == "trust" and config.times is None:
        more["times"] = "[12]"
    if config.get("data", {}).get("kind") in ("phantom", "simulated"):
        more["data.phases"] = "4"
    module = importlib.import_module(script)
    before, sys.argv = sys.argv, [f"{script}.py", *overrides, *map("=".join, more.items())]
    try:
        importlib.import_module("run_directory").launch(module.main)
    finally:
        sys.argv = before


def check_benchmark(script: str, arguments: list[str]) -> None:
    """Its arguments are settings of it, and cases and methods that they name exist."""
    optional("hydra", "scripts")
    module, run = importlib.import_module(script), importlib.import_module("run")
    settings = run.settings_of(module.Settings(), arguments)
    if script == "run":
        run.chosen(settings.cases, list(run.PLANS), "cases")
        run.chosen(settings.methods, list(run.METHODS), "methods")
        run.whole_numbers(settings.seeds, "seeds")


def check_make(arguments: list[str]) -> None:
    """The target exists, and what BENCH hands on is understood."""
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert arguments[0] in targets, f"make has no target {arguments[0]}"
    for argument in arguments[1:]:
        name, _, value = argument.partition("=")
        assert name == "BENCH"
        check_benchmark("run", shlex.split(value))


def check_pip(arguments: list[str]) -> None:
    """Extras and files that are named exist. Nothing is installed."""
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert arguments[0] == "install"
    for extras in re.findall(r"(?:stnerp|^\.)\[([\w,]+)\]", "\n".join(arguments), re.MULTILINE):
        assert set(extras.split(",")) <= set(known), f"no extra {extras}"
    for file in (after for option, after in pairwise(arguments) if option == "-c"):
        assert (ROOT / file).is_file(), file


def check_files(arguments: list[str]) -> None:
    """Files that come from elsewhere exist. What the tool does with them: tests/test_transforms.py."""
    outputs = {"-o", "-out"}
    for option, word in zip(["", *arguments], arguments, strict=False):
        if re.search(r"\.(nii\.gz|h5|txt|csv)$", word) and option not in outputs and word != "drawn.nii.gz":
            assert Path(word).is_file(), f"{word}: no page before made it, and it is no stand-in"


ONLY_CHECKED: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,  # installs, and starts all tests
    "pip": check_pip,  # installs
    "pytest": lambda arguments: None,  # starts this test
    # Other people's programs, in tests/test_transforms.py where they are installed:
    "antsApplyTransforms": check_files,
    "antsApplyTransformsToPoints": check_files,
    "transformix": check_files,
    "greedy": check_files,
}


def run_command(line: str) -> None:
    """One command line; AssertionError where it fails."""
    for part in line.split(" && "):
        words = shlex.split(os.path.expandvars(part), comments=True)
        match words:
            case ["python", script, *arguments] if script.startswith("scripts/"):
                assert (ROOT / script).is_file(), script
                run_script(Path(script).stem, arguments)
            case ["python", script, *arguments] if script.startswith("benchmarks/"):
                check_benchmark(Path(script).stem, arguments)
            case ["python", "-m", "venv", *_] | [".", _]:
                pass  # makes and enters what `make` made
            case [program, *arguments] if Path(program).name in ONLY_CHECKED:
                ONLY_CHECKED[Path(program).name](arguments)
            case _:
                subprocess.run(part, shell=True, check=True)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """A block in the page's namespace; lines of a traceback are the page's."""
    tree = ast.parse("\n" * block.line + block.code, str(block.page))
    needed = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    if any(name in needed and importlib.util.find_spec(name) is None for name in PEERS):
        return
    with warnings.catch_warnings():
        if "itk" in needed:  # loads its parts when they are first used, and warns
            warnings.simplefilter("ignore")
        exec(compile(tree, str(block.page), "exec"), names)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("page", "here"),
    [pytest.param(page, page, id=str(page.relative_to(ROOT))) for page in PAGES],
    indirect=["here"],
)
def test_every_block_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        try:
            if block.language == "python":
                run_python(block, names)
            elif block.language in ("", "sh"):
                for line in commands(block.code):
                    run_command(line)
            else:
                assert block.language in FOR_THE_EYE or block.language.startswith("{"), block.language
        except SystemExit:
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
            pytest.fail(f"{block.where}: {' '.join(said)}")
        except Exception as error:
            raise AssertionError(f"{block.where}: {error}") from error
    if page.name == "README.md":
        check_readme(names)


def check_readme(names: dict[str, Any]) -> None:
    """What its blocks leave is what the text says."""
    model, day12 = names["model"], names["day12"]
    assert model.times == (0, 12, 30)
    sitk.DisplacementFieldTransform(names["displacement_mm"])
    assert Grid.of(names["gtv"]).is_close(Grid.of(day12))
    assert sitk.GetArrayViewFromImage(names["gtv"]).any()
    assert names["there_mm"].shape == (1, 3)
    assert names["jacobian"].GetSize() == model.grid.size
    assert names["follow_up"].times == (0, 12, 30, 37)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("python scripts/train_ref.py out=x data.imagse=a", "imagse"),
        ("python scripts/train_reef.py out=x", "train_reef"),
        ("python benchmarks/run.py cases=phantome", "unknown phantome"),
        ("python benchmarks/floors.py colour=red", "colour"),
        ("make tea", "no target tea"),
        ('make bench BENCH="methods=elastics"', "unknown elastics"),
        ("pip install 'stnerp[extras]'", "no extra extras"),
        ("pip install -c constrains.txt -e .", "constrains.txt"),
        ("transformix -in no.nii.gz -tp no.txt -out drawn", "no.nii.gz"),
        ("false", "non-zero exit status"),  # anything else is started
        ("stnerp-is-no-program", "non-zero exit status"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    with pytest.raises((Exception, SystemExit), match=says):
        run_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("scripts", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for line in inline_commands(page):
        match shlex.split(line, comments=True):
            case ["python", script, *arguments] if script.startswith("scripts/"):
                given = {argument.partition("=")[0] for argument in arguments}
                composed(Path(script).stem, *arguments, *([] if "out" in given else ["out=x"]))
            case ["python", script, *arguments] if script.startswith("benchmarks/"):
                check_benchmark(Path(script).stem, arguments)
            case ["python", "-c", code]:
                compile(code, line, "exec")
            case ["python", script]:
                assert (ROOT / script).is_file(), script
            case [program, *arguments] if program in ONLY_CHECKED:
                ONLY_CHECKED[program](arguments)
            case _:
                pytest.fail(f"{page.name}: `{line}`: no such command")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_linked_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text(encoding="utf-8")))
    files = [link for link in links if "://" not in link]
    assert [file for file in files if not (page.parent / file).exists()] == []


@pytest.mark.usefixtures("quick")
def test_pictures_are_those_that_the_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    importlib.import_module("draw_pictures").main(tmp_path)
    there = {path.name for path in (DOCS / "pictures").iterdir()}
    assert there == {path.name for path in tmp_path.iterdir()} | {"first_fit.png"}  # of the tutorial's run
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in there:
        assert f"pictures/{name}" in shown
        assert (DOCS / "pictures" / name).stat().st_size < 100_000
