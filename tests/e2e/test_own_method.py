"""The example package, installed as a user would, found and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from tests.tiny import make_model, random_ids

calibration = CalibrationSet.of(random_ids([32, 20, 32, 32]), seqlen=32)
runtime = Runtime(progress=False, report_dir=sys.argv[2])

def run(**options):
    report = compress(make_model(), None, Recipe(method="wanda", **options), runtime, calibration)
    return {
        "key": report.key,
        "recipe": report.recipe,
        "digest": report.weights_digest,
        "layers": [[row.name, row.removed, row.asked] for row in report.layers],
        "warnings": report.warnings,
    }

whole = {"score": "kurtosis?power=2", "refine": "rescue", "allocation": "edges?less=0.2"}
print(json.dumps([
    run(sparsity=0.5),
    run(sparsity=0.5, score="kurtosis?power=2"),
    run(sparsity=0.5, score="kurtosis?power=2", refine="rescue"),
    run(sparsity=0.5, **whole),
    run(pattern="2:4", score="kurtosis", refine="rescue", update="obs"),
]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in it."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    example = str(ROOT / "examples" / "own_method")
    subprocess.run([*pip, *offline, "--target", str(folder), example], check=True)
    return folder


def python(site: Path, *arguments: str) -> str:
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_it_is_listed_with_its_package(site: Path) -> None:
    for kind, name in (("scores", "kurtosis"), ("refinements", "rescue"), ("allocations", "edges")):
        shown = python(site, "-m", "lm_calib_plugin", "ls", kind)
        assert name in shown
        assert "calib-own-method" in shown


def test_its_parts_change_what_they_should(site: Path, tmp_path: Path) -> None:
    plain, scored, rescued, whole, pattern = json.loads(
        python(site, "-c", USE, str(ROOT), str(tmp_path))
    )
    runs = [plain, scored, rescued, whole, pattern]
    assert len({run["key"] for run in runs}) == len({run["digest"] for run in runs}) == 5
    assert scored["recipe"]["score"] == "kurtosis?power=2.0"
    assert {removed for _, removed, _ in rescued["layers"]} == {0.5}
    assert {removed for _, removed, _ in pattern["layers"]} == {0.5}
    assert any("rescue moves nothing" in warning for warning in pattern["warnings"])
    shares = {name.split(".")[2]: asked for name, _, asked in whole["layers"]}
    assert shares["0"] == pytest.approx(shares["2"], abs=0.05)
    assert shares["1"] - shares["0"] == pytest.approx(0.2, abs=0.05)
