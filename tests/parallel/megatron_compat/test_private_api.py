"""Only `parallel/megatron_compat` assigns into foreign modules and uses private names of others."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from upstream import names_in

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("engine", "kernels", "parallel")
ROOM = Path("parallel/megatron_compat")

EXCEPTIONS = {
    ("engine/process.py", "os._exit"): "documented; without what the interpreter does at its end",
    ("engine/rewards/in_process.py", "os._exit"): "documented; a call that never returns holds the thread",
    ("engine/workers/child.py", "os._exit"): "documented; a user's thread may never end",
    ("parallel/runtime/orphans.py", "os._exit"): "documented; from a thread, whatever the main one waits for",
    ("engine/workers/child.py", "sys.argv"): "documented; in a process of our own, what its parent has",
    (
        "engine/observe/metrics.py",
        "threading.excepthook",
    ): "a documented hook; a thread of TensorBoard's writer",
    ("engine/health/watchdog.py", "os._exit"): "Python's documented way to end at once",
    ("engine/health/watchdog.py", "sys._current_frames"): "Python's documented way to other threads' stacks",
    (
        "kernels/dispatch/aot_compile.py",
        "triton.knobs.nvidia.dump_ptxas_log",
    ): "Triton's settings, in a scope",
    (
        "kernels/dispatch/aot_compile.py",
        "triton.knobs.compilation.always_compile",
    ): "Triton's settings, in a scope",
    ("parallel/runtime/spans.py", "error._spans"): "our own mark on an exception of any class",
}
"""(file, expression) → why it may stay."""

UNDOCUMENTED = {
    "bias_dropout_add_exec_handler",
    "chained_optimizers",
    "expert_parallel_buffers",
    "gbuf_ranges",
    "grad_accs",
    "grad_data",
    "is_stub_optimizer",
    "model_float16_groups",
    "model_fp32_groups",
    "model_param_gbuf_map",
    "param_data",
    "remove_forward_pre_hook_handles",
    "shard_fp32_from_float16_groups",
    "shard_fp32_groups",
}
"""What Megatron-core names without an underscore and promises nowhere; no attribute of ours is called so."""


def violations(root: Path) -> list[tuple[str, str, str]]:
    """Return (file, expression, `line: sentence`) of every use in the three layers, exceptions included."""
    found = []
    for floor in LAYERS:
        for path in sorted((root / floor).rglob("*.py")):
            relative = path.relative_to(root)
            if ROOM not in relative.parents:
                tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
                found += [
                    (str(relative), expression, f"{line}: {sentence}")
                    for line, expression, sentence in _Module(tree).violations()
                ]
    return found


class _Module:
    """What a module's text tells of where its names come from."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._nodes = list(ast.walk(tree))
        self._foreign: dict[str, str] = {}
        """Names bound to what others have, with dotted names."""
        for node in self._nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._foreign.update(_imported(node))
        for node in self._nodes:  # world = dist.distributed_c10d; random = importlib.import_module("…")
            if (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                name = self._dotted(node.value) or _module_by_name(node.value)
                if name is not None:
                    self._foreign[node.targets[0].id] = name
        self._defined = set(_defined(self._nodes))

    def violations(self) -> Iterator[tuple[int, str, str]]:
        """Yield line, expression, sentence."""
        for node in self._nodes:
            yield from ((node.lineno, *found) for found in self._of(node))
        yield from self._filters(self._tree, is_inside=False)

    def _of(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Attribute):
            yield from self._of_attribute(node)
        elif isinstance(node, ast.Import):
            yield from (_private_import(alias.name) for alias in node.names if _is_private_path(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level and not _is_ours(node.module):
            for alias in node.names:
                if _is_private_path(f"{node.module}.{alias.name}"):
                    yield _private_import(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call):
            yield from self._of_call(node)
        elif isinstance(node, ast.ClassDef):
            yield from self._of_class(node)

    def _of_attribute(self, node: ast.Attribute) -> Iterator[tuple[str, str]]:
        expression, dotted = ast.unparse(node), self._dotted(node)
        if dotted is not None and not isinstance(node.ctx, ast.Load):
            yield expression, f"assigns into {dotted}"
        elif _is_private(node.attr) and (dotted is not None or node.attr not in self._defined):
            yield expression, f"{dotted or expression} is private to others"
        elif node.attr in UNDOCUMENTED:
            yield expression, f"{expression} is an undocumented attribute of Megatron-core"
        elif dotted == "sys.meta_path":
            yield expression, "changes how modules are imported"

    def _of_call(self, node: ast.Call) -> Iterator[tuple[str, str]]:
        function, expression = ast.unparse(node.func), ast.unparse(node)
        if function in ("setattr", "delattr") and self._dotted(node.args[0]) is not None:
            yield expression, f"assigns into {self._dotted(node.args[0])}"
        elif function in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(name.value) and name.value not in self._defined:
                if ast.unparse(node.args[0]) + "." + name.value not in _stored(self._nodes):
                    yield expression, f"{name.value} is private to others"
        elif (module := _module_by_name(node)) is not None and _is_private_path(module):
            yield _private_import(module)

    def _of_class(self, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
        """Private methods and attributes that a foreign base class has too, under the same name."""
        for base in node.bases:
            dotted = self._dotted(base)
            if dotted is None:
                continue
            kind = _resolve(dotted)
            foreign = {name for name in dir(kind) if _is_private(name)} | set(names_in(kind))
            for name in sorted(set(_defined(list(ast.walk(node)))) & foreign):
                yield f"{node.name}.{name}", f"{node.name}.{name} is a private name of {dotted} too"

    def _filters(self, node: ast.AST, *, is_inside: bool) -> Iterator[tuple[int, str, str]]:
        """Yield calls that change the warning filters of the whole process, `catch_warnings` apart."""
        if isinstance(node, ast.With):
            is_inside |= any("catch_warnings" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and not is_inside:
            if self._dotted(node.func) in ("warnings.filterwarnings", "warnings.simplefilter"):
                yield node.lineno, ast.unparse(node), "filters the warnings of the whole process"
        for child in ast.iter_child_nodes(node):
            yield from self._filters(child, is_inside=is_inside)

    def _dotted(self, node: ast.AST) -> str | None:
        """Return the dotted name of what an expression of names gives, where others have it."""
        if isinstance(node, ast.Name):
            return self._foreign.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield what an import statement binds of others: name and dotted name."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            top = alias.name.partition(".")[0]
            if not _is_ours(alias.name):
                yield alias.asname or top, alias.name if alias.asname else top
        elif not node.level and not _is_ours(node.module):
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _module_by_name(node: ast.AST) -> str | None:
    """Return the name of others' module in `import_module("…")`, `__import__("…")`, `sys.modules["…"]`."""
    name = None
    if isinstance(node, ast.Call) and node.args:
        if ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            name = node.args[0]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
        name = node.slice
    if isinstance(name, ast.Constant) and not _is_ours(name.value):
        return name.value
    return None


def _defined(nodes: list[ast.AST]) -> Iterator[str]:
    """Yield the private names that classes and functions of a module define, `self._name` included."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and _is_private(node.name):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (name for statement in node.body for name in _class_level(statement))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_private(node.attr):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def _class_level(statement: ast.stmt) -> Iterator[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (one.id for one in targets if isinstance(one, ast.Name) and _is_private(one.id))


def _stored(nodes: list[ast.AST]) -> set[str]:
    return {
        ast.unparse(one) for one in nodes if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)
    }


def _resolve(dotted: str) -> type:
    """Return the class of a dotted name."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(_resolve(module), name)


def _private_import(name: str) -> tuple[str, str]:
    return name, f"{name} is private to others"


def _is_private_path(name: str) -> bool:
    return not _is_ours(name) and any(map(_is_private, name.split(".")))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "glm_rlhf"


def test_only_megatron_compat_reaches_into_others():
    found = violations(ROOT)
    assert [
        f"{file}:{sentence}" for file, expression, sentence in found if (file, expression) not in EXCEPTIONS
    ] == []
    assert EXCEPTIONS.keys() <= {(file, expression) for file, expression, _ in found}, "an exception is over"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ntorch.Tensor.type = print", "assigns into torch.Tensor.type"),
        ("import torch.distributed as dist\ndel dist.Work.wait", "assigns into torch.distributed.Work.wait"),
        ("from torch.distributed import Work\nWork.wait = print", "into torch.distributed.Work.wait"),
        ("from torch.distributed import Work as W\ndef f():\n    a, W.wait = 1, 2", "Work.wait"),
        ("from megatron.core import parallel_state\nsetattr(parallel_state, 'a', 1)", "parallel_state"),
        ("import importlib\nm = importlib.import_module('megatron.core')\nm.a = 1", "into megatron.core.a"),
        ("import sys\nm = sys.modules['torch']\nm.a = 1", "assigns into torch.a"),
        ("import torch\nc = torch.cuda\nc.a += 1", "assigns into torch.cuda.a"),
        ("import torch\ntorch.cuda._sleep(1)", "torch.cuda._sleep is private"),
        (
            "import torch.distributed as dist\ndist.distributed_c10d._world",
            "distributed_c10d._world is private",
        ),
        ("from megatron.core import parallel_state as s\ns._A", "megatron.core.parallel_state._A is private"),
        ("import torch\ng = getattr(torch, '_g')", "_g is private"),
        (
            "def f(group):\n    group._get_sequence_number_for_group()",
            "_get_sequence_number_for_group is private",
        ),
        ("class A:\n    def f(self):\n        return self._optimizer._main", "self._optimizer is private"),
        (
            "def f(layer):\n    layer.bias_dropout_add_exec_handler = 1",
            "handler is an undocumented attribute",
        ),
        ("from torch._C import a", "torch._C.a is private"),
        ("from torch.utils import _pytree", "torch.utils._pytree is private"),
        ("def f():\n    import torch._dynamo", "torch._dynamo is private"),
        ("import importlib\nimportlib.import_module('torch._inductor')", "torch._inductor is private"),
        (
            "import torch\nclass A(torch.nn.Module):\n    def _apply(self): ...",
            "A._apply is a private name of",
        ),
        (
            "from torch.nn import Module\nclass A(Module):\n    def f(self):\n        self._buffers = 1",
            "A._buffers is a private name of torch.nn.Module too",
        ),
        (
            "from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator\n"
            "class A(P2PCommunicator):\n    def _communicate_shapes(self): ...",
            "A._communicate_shapes is a private name of megatron",
        ),
        ("import warnings\nwarnings.filterwarnings('ignore')", "filters the warnings"),
        ("import sys\nsys.meta_path.insert(0, 1)", "changes how modules are imported"),
    ],
)
def test_a_patch_or_a_private_name_is_found(tmp_path: Path, text: str, expected: str):
    _write(tmp_path, "parallel/runtime/a.py", text)
    assert any(expected in sentence for _, _, sentence in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def f(self):\n        self._a = 1\n        return self._a\ndef f(a: A):\n    a._a",
        "class A:\n    _a: int\n    def f(self, other):\n        return other._a",
        "class A:\n    def _f(self): ...\ndef f(me):\n    me()._f()",
        "import torch\nclass A(torch.nn.Module):\n    def _glm_own(self): ...",
        "from glm_rlhf.parallel.spec import layout\nlayout.a = 1",
        "import os\nos.environ['A'] = 'b'",
        "import torch\nleaf = torch.ones(())\nleaf.grad = None",
        "import warnings\nwith warnings.catch_warnings():\n    warnings.simplefilter('ignore')",
    ],
)
def test_what_is_ones_own_is_left_alone(tmp_path: Path, text: str):
    _write(tmp_path, "engine/a.py", text)
    assert violations(tmp_path) == []


def test_megatron_compat_itself_may(tmp_path: Path):
    _write(tmp_path, "parallel/megatron_compat/a.py", "import torch\ntorch.Tensor.type = print")
    assert violations(tmp_path) == []


def test_the_names_of_a_class_are_those_of_its_bases_too():
    class Base:
        def f(self) -> None:
            self._of_base = 1

    class Derived(Base): ...

    assert "_of_base" in names_in(Derived)
    assert inspect.isclass(_resolve("torch.autograd.graph.Node"))


def _write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")
