"""The house rules that a reader can check by looking: who imports whom, names, sizes, docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("engine", "kernels", "parallel")
FOLDERS = (*FLOORS, "examples", "benchmarks", "tests")
MAX_LINES = 400
PRIVATE_OF_TORCH = {"_cdata"}
"""What examples and benchmarks may reach into, since it has no public name."""
VAGUE_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}

MAY_NOT_IMPORT = {
    "glm_rlhf.kernels": (
        "torch.distributed",
        "megatron",
        "glm_rlhf.parallel",
        "glm_rlhf.engine",
        "examples",
        "benchmarks",
    ),
    "glm_rlhf.parallel": ("glm_rlhf.engine", "examples", "benchmarks"),
    "glm_rlhf.engine": ("megatron", "triton", "examples", "benchmarks"),
    "examples": ("megatron", "benchmarks"),
}
# Of glm_rlhf, or of the named part of it, these modules may import only what is listed.
MAY_ONLY_IMPORT = {
    "glm_rlhf.engine.types": ("glm_rlhf", ()),
    "glm_rlhf.engine.config": ("glm_rlhf", ("glm_rlhf.engine.config",)),
    "glm_rlhf.engine.objectives": (
        "glm_rlhf.engine",
        ("glm_rlhf.engine.objectives", "glm_rlhf.engine.types", "glm_rlhf.engine.config"),
    ),
}


def violations(root: Path) -> list[str]:
    """Return every broken rule below `root` as `file:line: sentence`."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            found += [f"{path.relative_to(root)}:{line}: {text}" for line, text in _of_file(path, root)]
    return found


def _of_file(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    relative = path.relative_to(root)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    for part in (*relative.parts[:-1], relative.stem):
        if part in VAGUE_NAMES:
            yield 1, f"the name {part} says nothing: name the idea"
    num_lines = len(source.splitlines())
    if num_lines > MAX_LINES:
        yield num_lines, f"{num_lines} lines, at most {MAX_LINES}: split at the seam"
    if not ast.get_docstring(tree):
        yield 1, "no module docstring"
    module = _module_name(relative)
    for line, name in _imports(tree, module, is_package=relative.stem == "__init__"):
        for problem in _of_import(module, name):
            yield line, problem
    if relative.parts[0] in ("examples", "benchmarks"):
        yield from _of_attributes(tree)


def _of_attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Examples and benchmarks show what a user can do: they use nothing private but their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in PRIVATE_OF_TORCH:
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if is_private and ast.unparse(node.value) not in ("self", "cls"):
                yield node.lineno, f"{ast.unparse(node)} is private"


def _of_import(module: str, name: str) -> Iterator[str]:
    for floor in FLOORS:
        if _is_within(name, floor):
            yield f"imports {name} by its bare name: write glm_rlhf.{name}"
    for owner, forbidden in MAY_NOT_IMPORT.items():
        if _is_within(module, owner):
            yield from (f"{owner} imports {name}" for prefix in forbidden if _is_within(name, prefix))
    for owner, (scope, allowed) in MAY_ONLY_IMPORT.items():
        # `config` is a leaf of several files: config.py, config_file.py, …
        is_owner = _is_within(module, owner) or module.startswith(f"{owner}_")
        is_allowed = any(_is_within(name, prefix) or name.startswith(f"{prefix}_") for prefix in allowed)
        if is_owner and _is_within(name, scope) and not is_allowed:
            yield f"{owner} imports {name}"


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of everything a module imports, wherever in it."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node.lineno, "torch.distributed"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def _module_name(relative: Path) -> str:
    parts = [*relative.parts[:-1], *([] if relative.stem == "__init__" else [relative.stem])]
    return ".".join(["glm_rlhf", *parts] if parts[0] in FLOORS else parts)


def _is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def test_the_repository_keeps_its_rules():
    assert violations(ROOT) == []


def test_the_check_sees_every_floor():
    for floor in FLOORS:
        assert list((ROOT / floor).rglob("*.py")), (
            f"no source below {floor}/: the check above looks at nothing"
        )


@pytest.mark.parametrize(
    ("path", "statement", "expected"),
    [
        ("kernels/a.py", "import torch.distributed as dist", "glm_rlhf.kernels imports torch.distributed"),
        ("kernels/a.py", "from torch import distributed", "glm_rlhf.kernels imports torch.distributed"),
        ("kernels/a.py", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("kernels/a.py", "from megatron.core import mpu", "glm_rlhf.kernels imports megatron.core.mpu"),
        ("kernels/a.py", "from glm_rlhf import parallel", "glm_rlhf.kernels imports glm_rlhf.parallel"),
        ("kernels/reference/a.py", "from ...engine import types", "imports glm_rlhf.engine.types"),
        ("parallel/a.py", "from glm_rlhf.engine.types import B", "glm_rlhf.parallel imports glm_rlhf.engine"),
        ("engine/data/a.py", "import triton", "glm_rlhf.engine imports triton"),
        ("engine/a.py", "def f():\n    import megatron.core", "glm_rlhf.engine imports megatron.core"),
        (
            "engine/a.py",
            "import importlib\nimportlib.import_module('megatron.core')",
            "imports megatron.core",
        ),
        (
            "engine/types.py",
            "from .data import records",
            "glm_rlhf.engine.types imports glm_rlhf.engine.data",
        ),
        (
            "engine/config.py",
            "from .types import B",
            "glm_rlhf.engine.config imports glm_rlhf.engine.types.B",
        ),
        (
            "engine/config_file.py",
            "from . import data",
            "glm_rlhf.engine.config imports glm_rlhf.engine.data",
        ),
        (
            "engine/objectives/a.py",
            "from ..stages import ppo",
            "objectives imports glm_rlhf.engine.stages.ppo",
        ),
        ("engine/objectives/a.py", "from ..cli import main", "objectives imports glm_rlhf.engine.cli.main"),
        ("tests/a.py", "import kernels", "imports kernels by its bare name"),
        ("benchmarks/a.py", "from engine.cli import main", "imports engine.cli.main by its bare name"),
        ("examples/a.py", "import megatron.core", "examples imports megatron.core"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, statement: str, expected: str):
    _write(tmp_path / path, f'"""Docstring."""\n{statement}\n')
    (violation,) = violations(tmp_path)
    assert violation.startswith(f"{path}:")
    assert expected in violation


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("kernels/a.py", "import torch\nimport triton\nfrom .launch import uses_triton"),
        ("parallel/a.py", "from megatron.core import parallel_state\nimport torch.distributed as dist"),
        ("parallel/a.py", "from glm_rlhf.kernels.rmsnorm import rms_norm"),
        ("engine/config.py", "from .config_file import load_config\nimport pydantic"),
        ("engine/objectives/a.py", "from ..types import Rollout\nfrom . import losses\nimport torch"),
        ("engine/stages/a.py", "from glm_rlhf.parallel import topology\nfrom ..objectives import losses"),
        ("engine/__init__.py", "from .config import ScoreConfig"),
        ("tests/a.py", "import megatron.core"),
    ],
)
def test_an_allowed_import_is_left_alone(tmp_path: Path, path: str, statement: str):
    _write(tmp_path / path, f'"""Docstring."""\n{statement}\n')
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("engine/utils.py", '"""Docstring."""\n', "the name utils says nothing"),
        ("parallel/helpers/a.py", '"""Docstring."""\n', "the name helpers says nothing"),
        ("kernels/a.py", "x = 1\n", "no module docstring"),
        ("engine/a.py", '"""Docstring."""\n' + "x = 1\n" * MAX_LINES, "401 lines, at most 400"),
        ("examples/a.py", '"""Docstring."""\nengine.writer._staged.wait()\n', "writer._staged is private"),
    ],
)
def test_a_bad_name_or_form_is_found(tmp_path: Path, path: str, text: str, expected: str):
    _write(tmp_path / path, text)
    (violation,) = violations(tmp_path)
    assert expected in violation


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
