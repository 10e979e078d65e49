"""What `pip install .` would install: the wheel, built here by the backend that pyproject.toml names, without a network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the wheel by path."""
    pytest.importorskip("hatchling", reason="hatchling is not installed (requirements/build.in)")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def in_metadata(wheel: dict[str, bytes], file: str) -> str:
    (found,) = [data for name, data in wheel.items() if name.endswith(f".dist-info/{file}")]
    return found.decode()


def test_the_command_is_installed(wheel: dict[str, bytes]) -> None:
    assert "shoal = shoal.cli.main:main" in in_metadata(wheel, "entry_points.txt").splitlines()


def test_the_types_the_licence_and_every_module_come_along(wheel: dict[str, bytes]) -> None:
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "shoal").rglob("*.py")}

    assert modules <= wheel.keys()
    assert "shoal/py.typed" in wheel
    assert in_metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in in_metadata(wheel, "METADATA").splitlines()


def test_nothing_but_the_package_is_installed(wheel: dict[str, bytes]) -> None:
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"shoal"}
