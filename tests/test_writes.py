"""No product code writes a file in place under its final name: a full disk would leave half of it there."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "parallel")
WRITING_MODES = set("wax+")
WRITING_CALLS = {
    *("write_text", "write_bytes", "tofile", "savefig", "save_file", "copyfile", "copy", "copy2", "copytree"),
    *("SummaryWriter", "truncate"),
}
IN_PLACE = {
    "parallel/storage/durable_io.py": "the helpers themselves",
    "parallel/storage/folder_writer.py": "into a hidden folder that is renamed when it is complete",
    "parallel/checkpoint/save.py": "into a hidden folder that is renamed when it is complete",
    "engine/data/store/build_cache.py": "a lock file, which has no content",
    "engine/data/store/token_writer.py": "into a partial folder that is renamed when it is complete",
    "engine/data/records/jsonl_writer.py": "into <name>.partial, which is renamed when it is complete",
    "engine/observe/best_effort.py": "files that grow while a run lasts, and end with a complete line",
    "engine/observe/calibration.py": "a picture into memory",
    "engine/observe/metrics.py": "TensorBoard's own files",
    "engine/observe/tensorboard_files.py": "TensorBoard's own files, cut after a whole event",
    "engine/exit_report.py": "torchrun's file of an error, in its own folder, as the process ends",
    "parallel/storage/writer_lock.py": "a lock file, whose content names its holder",
    "engine/bench/memory.py": "/proc of Linux",
    "engine/bench/parts/checkpoint.py": "a peer that is measured",
}
"""Files that write in another way, and why nothing incomplete gets a final name."""


def writes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each call that writes a file in place."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        modes = [
            value.value
            for value in (*node.args, *(keyword.value for keyword in node.keywords))
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        ]
        is_open = name == "open" and any(WRITING_MODES & set(m) and len(m) <= 3 for m in modes)
        is_descriptor = owner == "os" and name == "open" and "O_RDONLY" not in ast.unparse(node)
        is_dump = name == "dump" and owner in ("json", "pickle", "np", "numpy")
        is_save = name in ("save", "savez") and owner in ("torch", "np", "numpy")
        is_call = name in WRITING_CALLS and owner not in ("copy", "dataclasses")
        if name == "copy" and owner != "shutil":  # of a value
            is_call = False
        if is_open or is_descriptor or is_dump or is_save or is_call:
            yield node.lineno, ast.unparse(node)[:80]


def test_every_file_is_written_through_a_helper_or_says_why_not():
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = [f"{line}: {text}" for line, text in writes(ast.parse(path.read_text("utf-8")))]
            if lines:
                found[str(path.relative_to(ROOT))] = lines
    assert {name: lines for name, lines in found.items() if name not in IN_PLACE} == {}
    assert set(IN_PLACE) <= set(found), "an exception that is none any more"


@pytest.mark.parametrize(
    "statement",
    [
        "path.write_text(text)",
        "open(path, 'w')",
        "path.open('ab')",
        "path.open(mode='r+b')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "json.dump(values, file)",
        "torch.save(values, path)",
        "array.tofile(path)",
        "shutil.copyfile(a, b)",
    ],
)
def test_a_write_is_seen(statement):
    assert list(writes(ast.parse(statement)))


@pytest.mark.parametrize(
    "statement",
    [
        "path.open()",
        "path.open('rb')",
        "open(path, encoding='utf-8')",
        "values.copy()",
        "os.open(p, os.O_RDONLY)",
    ],
)
def test_a_read_is_none(statement):
    assert not list(writes(ast.parse(statement)))
