"""The house rules that a reader can check by looking: who imports whom, names, sizes, docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("engine", "kernels", "parallel")
FOLDERS = (*FLOORS, "examples", "benchmarks", "tests")
MAX_LINES = 400
PRIVATE_WITHOUT_OTHER_NAME = {"_cdata", "_exit"}
"""What examples and benchmarks may reach into, since it has no public name."""
VAGUE_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}

MAX_MODULES = 14
"""Modules of a sub-package, its `__init__` apart."""
MAX_ROOMS = {"engine": 18, "parallel": 11, "kernels": 8}
"""Sub-packages directly below a floor."""
# What the contracts of import-linter in pyproject.toml cannot say: parts of other packages, loose files.
MAY_NOT_IMPORT = {
    "glm_rlhf.kernels": ("torch.distributed", "examples", "benchmarks"),
    "glm_rlhf.parallel": ("examples", "benchmarks"),
    "glm_rlhf.parallel.spec": ("torch.distributed",),
    "glm_rlhf.parallel.storage": ("torch.distributed",),
    "glm_rlhf.engine": ("examples", "benchmarks"),
    "examples": ("megatron", "benchmarks"),
}


def violations(root: Path) -> list[str]:
    """Return every broken rule below `root` as `file:line: sentence`."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            found += [f"{path.relative_to(root)}:{line}: {text}" for line, text in _of_file(path, root)]
    return found


def crowded(root: Path) -> list[str]:
    """Return every broken rule on sub-packages below `root`, as `folder: sentence`."""
    found = []
    for floor in (*FLOORS, "benchmarks"):
        for folder in sorted({path.parent for path in (root / floor).rglob("*.py")}):
            found += [f"{folder.relative_to(root)}: {text}" for text in _of_room(folder)]
        num_rooms = len([path for path in (root / floor).glob("*/__init__.py")])
        if num_rooms > MAX_ROOMS.get(floor, num_rooms):
            found.append(f"{floor}: {num_rooms} sub-packages, at most {MAX_ROOMS[floor]}")
    return found


def _of_room(folder: Path) -> Iterator[str]:
    modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    if len(modules) > MAX_MODULES:
        yield f"{len(modules)} modules, at most {MAX_MODULES}: split it"
    if not (folder / "__init__.py").exists():
        yield "no __init__.py: say in it what the sub-package is, and what it may import"
    for path in modules:
        if path.stem == folder.name:
            yield f"{path.name} repeats the name of its folder"


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
        if isinstance(node, ast.Attribute) and node.attr not in PRIVATE_WITHOUT_OTHER_NAME:
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
    assert violations(ROOT) + crowded(ROOT) == []


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
        (
            "parallel/spec/a.py",
            "import torch.distributed",
            "glm_rlhf.parallel.spec imports torch.distributed",
        ),
        ("engine/a.py", "def f():\n    import benchmarks.a", "glm_rlhf.engine imports benchmarks.a"),
        (
            "engine/a.py",
            "import importlib\nimportlib.import_module('benchmarks.a')",
            "imports benchmarks.a",
        ),
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
        ("kernels/a.py", "import torch\nimport triton\nfrom .dispatch.launch import uses_triton"),
        ("parallel/a.py", "from megatron.core import parallel_state\nimport torch.distributed as dist"),
        ("parallel/a.py", "from glm_rlhf.kernels.layers.rmsnorm import rms_norm"),
        ("examples/a.py", "from glm_rlhf.engine import PPOEngine"),
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


def test_a_crowded_or_nameless_folder_is_found(tmp_path: Path):
    for number in range(MAX_MODULES + 1):
        _write(tmp_path / "kernels" / "layers" / f"op_{number}.py", '"""Docstring."""\n')
    _write(tmp_path / "parallel" / "model" / "model.py", '"""Docstring."""\n')
    _write(tmp_path / "parallel" / "model" / "__init__.py", '"""Docstring."""\n')
    assert crowded(tmp_path) == [
        "kernels/layers: 15 modules, at most 14: split it",
        "kernels/layers: no __init__.py: say in it what the sub-package is, and what it may import",
        "parallel/model: model.py repeats the name of its folder",
    ]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
