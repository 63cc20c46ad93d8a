"""The wheel is whole: built from the sources, it holds every module, and each is imported from it alone."""

import email.parser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("engine", "kernels", "parallel")
IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted(root.glob("glm_rlhf/**/*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__) == path, f"{name} was imported from {module.__file__}"
print(len([name for name in sys.modules if name.startswith("glm_rlhf.")]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the sources, built by setuptools in a copy: a build leaves files, and takes old ones up."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / floor, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


def modules_of_the_sources() -> set[str]:
    return {
        f"glm_rlhf/{path.relative_to(ROOT).as_posix()}"
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }


def test_it_holds_every_module_and_the_markers_of_types(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules_of_the_sources() | {f"glm_rlhf/{floor}/py.typed" for floor in FLOORS}


def test_it_holds_the_metadata(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = email.parser.Parser().parsestr(archive.read(metadata).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (fields["Name"], fields["Version"]) == ("glm-rlhf", project["version"])
    assert set(fields["Requires-Python"].split(",")) == {">=3.11", "<3.13"}
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_payload().startswith("# glm-rlhf\n")
    required = {Requirement(text) for text in fields.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == {Requirement(text) for text in project["dependencies"]}
    assert set(fields.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "glm-rlhf = glm_rlhf.engine.cli:main" in scripts


@pytest.mark.timeout(600)  # five seconds of one core, on a loaded machine minutes
def test_every_module_is_imported_from_it_alone(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    folder = str(tmp_path / "installed")
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, folder],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) >= len(modules_of_the_sources())


def test_no_module_is_hidden_from_git():
    """A rule of .gitignore that fits a folder of ours would keep it out of every clone."""
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", *FLOORS]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert [name for name in listed.stdout.splitlines() if name.endswith((".py", ".typed"))] == []
