"""Ahead-of-time compilation of every kernel for sm_80, sm_90 and sm_100, without a GPU, as a table.

python -m glm_rlhf.kernels.dispatch.aot_compile --out kernels_aot.md --json kernels_aot.json
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib
import io
import json
import os
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

from glm_rlhf.kernels.dispatch.launch import CompileCase, is_interpreting

# Compute capability → shared memory that one block may have, in bytes (CUDA's table of capabilities).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CAPABILITIES = tuple(SHARED_LIMIT_BYTES)

# Contraction of a · b + c into one instruction: Triton's default, pinned here because Triton 3.10 changes it.
FP_FUSION = True

# Beginnings of the environment variables that Triton's and LLVM's compilers read.
_COMPILER_SETTINGS = ("TRITON_", "LLVM_", "MLIR_", "DISABLE_", "PTXAS_", "NVPTX_")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledCase:
    """Resources of one compiled case on one target, or the compiler's error."""

    name: str
    """`<kernel>/<shape>/<dtype>`, as in `CompileCase`."""
    capability: int
    """80, 90 or 100: the target sm_<capability>."""
    num_warps: int
    num_stages: int
    registers: int = 0
    """32-bit registers per thread."""
    spill_bytes: int = 0
    """Bytes per thread that are stored to and loaded from local memory for lack of registers."""
    stack_bytes: int = 0
    """Stack frame of a thread."""
    shared_bytes: int = 0
    """Shared memory of a block."""
    compile_s: float = 0.0
    notes: str = ""
    """Devices on which the case is launched, if not all."""
    error: str = ""
    """Empty when the case compiled."""


def collect_cases() -> list[CompileCase]:
    """Return the cases of every module of `glm_rlhf.kernels` that defines `compile_cases`, sorted by name.

    Raises:
        ValueError: two cases have the same name.
    """
    package = importlib.import_module(__package__.rpartition(".")[0])
    cases: list[CompileCase] = []
    for module_info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module_info.name == f"{__package__}.{Path(__file__).stem}":
            continue
        module = importlib.import_module(module_info.name)
        compile_cases = getattr(module, "compile_cases", None)
        if compile_cases is not None and compile_cases.__module__ == module.__name__:
            cases.extend(compile_cases())
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"compile cases with the same name: {', '.join(twice)}; give each its own name")
    return sorted(cases, key=lambda case: case.name)


def compile_case(case: CompileCase, capability: int, *, cache: Path | None = None) -> CompiledCase:
    """Return the resources of `case` on sm_<capability>; a failure is returned in `error`, not raised.

    Args:
        case: the kernel and its shape.
        capability: 80, 90 or 100.
        cache: a folder that keeps what was compiled, from run to run. A case is compiled again when its
            kernel, a function that the kernel calls, the compiler or this file has changed; a failure always.

    Raises:
        ValueError: the process runs Triton's interpreter, which has no compiler.
    """
    if is_interpreting():
        raise ValueError("ahead-of-time compilation needs the compiler: unset TRITON_INTERPRET and restart")
    described: dict[str, Any] = {
        "name": case.name,
        "capability": capability,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "notes": case.notes,
    }
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": FP_FUSION}
    started = time.perf_counter()
    log = io.StringIO()
    try:
        source = ASTSource(
            fn=case.kernel,
            signature=_ordered_signature(case),
            constexprs=case.constexprs,
            attrs={
                (case.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
                for name in case.divisible_by_16
            },
        )
        kept = None if cache is None else cache / f"{_cache_key(source, target, options)}.json"
        if kept is not None and kept.exists():
            return CompiledCase(**described, **json.loads(kept.read_text(encoding="utf-8")))
        # Only the assembler's log tells spills from other stack use. This setting prints it, but not for a
        # cached binary.
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True
            compiled = triton.compile(source, target=target, options=options)
        resources = _assembler_resources(log.getvalue())
    except Exception as error:  # reported per case, so that one broken kernel does not hide the others
        return CompiledCase(**described, error=f"{type(error).__name__}: {error}")
    figures = {
        **resources,
        "shared_bytes": compiled.metadata.shared,
        "compile_s": round(time.perf_counter() - started, 2),
    }
    if kept is not None:
        _write_whole(kept, json.dumps(figures))
    return CompiledCase(**described, **figures)


def is_launchable(result: CompiledCase) -> bool:
    """Return whether the case compiled without spills and within the limit of shared memory."""
    fits = result.shared_bytes <= SHARED_LIMIT_BYTES[result.capability]
    return not result.error and fits and result.spill_bytes == 0


def _cache_key(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Return a hash of all that decides what the compiler makes of `source`, and of how it is read here.

    Triton's own key covers the kernel, the functions that it calls, Triton's files, the assembler's version,
    target, options and environment.
    """
    backend = make_backend(target)
    environment = {name: value for name, value in os.environ.items() if name.startswith(_COMPILER_SETTINGS)}
    environment.pop("TRITON_CACHE_DIR", None)
    key = get_cache_key(source, backend, backend.parse_options(options), environment)
    return hashlib.sha256(key.encode() + Path(__file__).read_bytes()).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _ordered_signature(case: CompileCase) -> dict[str, str]:
    types = dict.fromkeys(case.constexprs, "constexpr") | case.signature
    present, required = set(types), set(case.kernel.arg_names)
    if present != required:
        missing, unknown = sorted(required - present), sorted(present - required)
        raise ValueError(f"compile case {case.name}: arguments missing {missing}, unknown {unknown}")
    return {name: types[name] for name in case.kernel.arg_names}


def _assembler_resources(log: str) -> dict[str, int]:
    registers = re.findall(r"Used (\d+) registers", log)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not frames:
        raise ValueError(f"the assembler's log names no registers: {log[:200]!r}")
    return {
        "registers": max(map(int, registers)),
        "stack_bytes": max(int(stack) for stack, _, _ in frames),
        "spill_bytes": max(int(stores) + int(loads) for _, stores, loads in frames),
    }


def as_markdown(compiled: Iterable[CompiledCase], *, date: str) -> str:
    """Return the report: versions, then one row per case with its resources on each target."""
    results: dict[str, dict[int, CompiledCase]] = {}
    for result in compiled:
        results.setdefault(result.name, {})[result.capability] = result
    capabilities = sorted({capability for row in results.values() for capability in row})
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"{date}. Triton {triton.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, fp fusion {'on' if FP_FUSION else 'off'}. "
        "Compiled without a GPU: nothing here was timed.",
        "",
        "Each cell: registers per thread / spilled bytes per thread (stored and loaded) / shared memory of a "
        "block in bytes. None may spill; a cell is empty where the case is never launched.",
        "",
        "| Kernel / shape / dtype | warps | stages | "
        + " | ".join(f"sm_{capability}" for capability in capabilities)
        + " | Note |",
        "|---|---|---|" + "---|" * len(capabilities) + "---|",
    ]
    for name, row in sorted(results.items()):
        case = next(iter(row.values()))
        cells = " | ".join(_cell(row.get(capability)) for capability in capabilities)
        lines.append(f"| {name} | {case.num_warps} | {case.num_stages} | {cells} | {case.notes} |")
    return "\n".join(lines) + "\n"


def _cell(result: CompiledCase | None) -> str:
    if result is None:
        return ""
    if result.error:
        return "FAILED"
    return f"{result.registers} / {result.spill_bytes} / {result.shared_bytes}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write the reports and return the exit status: 1 if a case is not launchable or none match."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the Markdown table here")
    parser.add_argument("--json", type=Path, help="write the figures as JSON here")
    parser.add_argument("--only", default="", help="compile only the cases whose name contains this")
    parser.add_argument(
        "--capability",
        type=int,
        nargs="+",
        choices=CAPABILITIES,
        default=CAPABILITIES,
        help="targets, by default all",
    )
    parser.add_argument(
        "--cache", type=Path, help="keep figures in this folder; compile only what has changed since"
    )
    options = parser.parse_args(arguments)
    if is_interpreting():
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter has no compiler")

    compiled = []
    for case in collect_cases():
        if options.only in case.name:
            for capability in sorted({*options.capability} & {*case.launched_on}):
                result = compile_case(case, capability, cache=options.cache)
                print(f"{case.name} sm_{capability}: {result.error or _cell(result)}", flush=True)
                compiled.append(result)
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    if options.out is not None:
        options.out.write_text(as_markdown(compiled, date=date), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(
            json.dumps([asdict(result) for result in compiled], indent=1), encoding="utf-8"
        )
    return 0 if compiled and all(is_launchable(result) for result in compiled) else 1


if __name__ == "__main__":
    sys.exit(main())
