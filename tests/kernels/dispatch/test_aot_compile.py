"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, and none spills."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from glm_rlhf.kernels.dispatch import aot_compile
from glm_rlhf.kernels.dispatch.aot_compile import (
    CAPABILITIES,
    CompiledCase,
    as_markdown,
    collect_cases,
    is_launchable,
)
from glm_rlhf.kernels.dispatch.launch import is_interpreting

QUICK = 90
"""The capability that is compiled for with every change; `make slow` compiles for all."""
RESULT = CompiledCase(
    name="op_fwd/6B/bf16",
    capability=90,
    num_warps=4,
    num_stages=3,
    registers=64,
    shared_bytes=1024,
    notes="a note",
)


def run_module(folder, *arguments):
    """Run the command in a process whose Triton is the compiler, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "glm_rlhf.kernels.dispatch.aot_compile", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def cache(pytestconfig, tmp_path) -> str:
    """A folder that is kept between runs of the suite: kernels that have not changed compile once."""
    if not pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        return str(tmp_path / "figures")
    return str(pytestconfig.cache.mkdir("aot_compile"))


@pytest.mark.timeout(900)  # half a minute of compiling for a target; more where others need the cores too
@pytest.mark.parametrize(
    "capability",
    [pytest.param(one, marks=[] if one == QUICK else pytest.mark.slow) for one in CAPABILITIES],
)
def test_every_kernel_compiles_and_none_spills(tmp_path, cache, capability):
    report = tmp_path / "kernels.json"
    finished = run_module(tmp_path, "--json", str(report), "--capability", str(capability), "--cache", cache)
    assert report.exists(), finished.stderr[-3000:]
    results = [CompiledCase(**row) for row in json.loads(report.read_text(encoding="utf-8"))]
    assert {result.name for result in results} == {
        case.name for case in collect_cases() if capability in case.launched_on
    }
    assert {result.capability for result in results} == {capability}
    failed = {result.name: result.error[:500] for result in results if result.error}
    assert not failed
    bad = [result for result in results if not is_launchable(result)]
    assert not bad, "kernels that spill or want too much shared memory"
    assert all(result.registers > 0 for result in results)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_a_broken_case_is_reported_and_fails_the_command(tmp_path):
    """The real command, with one more module whose kernel does not compile and whose other one does."""
    program = tmp_path / "broken.py"
    program.write_text(
        "import sys, triton\n"
        "import triton.language as tl\n"
        "from glm_rlhf.kernels.dispatch import aot_compile\n"
        "from glm_rlhf.kernels.dispatch.launch import CompileCase\n"
        "@triton.jit\n"
        "def good_kernel(out_ptr):\n"
        "    tl.store(out_ptr, 1.0)\n"
        "@triton.jit\n"
        "def bad_kernel(out_ptr):\n"
        "    tl.store(out_ptr, no_such_name)\n"
        "signature = {'out_ptr': '*fp32'}\n"
        "cases = [CompileCase(name=k.__name__, kernel=k, signature=signature, constexprs={})\n"
        "         for k in (bad_kernel, good_kernel)]\n"
        "cases.append(CompileCase(name='missing', kernel=good_kernel, signature={}, constexprs={}))\n"
        "aot_compile.collect_cases = lambda: cases\n"
        "sys.exit(aot_compile.main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    table, report = tmp_path / "table.md", tmp_path / "table.json"
    finished = subprocess.run(
        [sys.executable, str(program), "--capability", "90", "--out", str(table), "--json", str(report)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1, finished.stderr
    rows = {row["name"]: row for row in json.loads(report.read_text(encoding="utf-8"))}
    assert "no_such_name" in rows["bad_kernel"]["error"]
    assert "arguments missing ['out_ptr']" in rows["missing"]["error"]
    assert rows["good_kernel"]["error"] == ""
    assert rows["good_kernel"]["registers"] > 0
    assert "| bad_kernel | 4 | 3 | FAILED |" in table.read_text(encoding="utf-8")


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def helper(value):
    return value + {number}

@triton.jit
def calling_kernel(out_ptr):
    tl.store(out_ptr, helper(1.0))

@triton.jit
def other_kernel(out_ptr):
    tl.store(out_ptr, 1.0)

@triton.jit
def bad_kernel(out_ptr):
    tl.store(out_ptr, no_such_name)
"""
COUNTED = """
import importlib.util, json, sys, triton
from pathlib import Path
from glm_rlhf.kernels.dispatch import aot_compile
from glm_rlhf.kernels.dispatch.launch import CompileCase

folder, compile_, names = Path(sys.argv[1]), triton.compile, []

def counting(source, **options):
    names.append(source.name)
    return compile_(source, **options)

def run(file, capability="90"):
    spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = [
        CompileCase(name=n, kernel=getattr(module, n), signature={"out_ptr": "*fp32"}, constexprs={})
        for n in ("calling_kernel", "other_kernel", "bad_kernel")
    ]
    aot_compile.collect_cases = lambda: cases
    names.clear()
    report = folder / "report.json"
    options = ["--cache", str(folder / "figures"), "--capability", capability, "--json", str(report)]
    code = aot_compile.main(options)
    rows = [row for row in json.loads(report.read_text()) if not row["error"]]
    return [code, list(names), rows]

triton.compile = counting
runs = [run("first"), run("first"), run("second"), run("second", "80")]
(folder / "runs.json").write_text(json.dumps(runs))
"""


def test_what_has_not_changed_is_compiled_once(tmp_path):
    """A kernel is compiled again for another target, or when a function that it calls has changed."""
    for name, number in (("first", 1), ("second", 2)):
        (tmp_path / f"{name}.py").write_text(KERNELS.format(number=number), encoding="utf-8")
    program = tmp_path / "counted.py"
    program.write_text(COUNTED, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(program), str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    runs = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    assert [code for code, *_ in runs] == [1, 1, 1, 1]  # a failure is compiled, and reported, each time
    assert [names for _, names, _ in runs] == [
        ["calling_kernel", "other_kernel", "bad_kernel"],
        ["bad_kernel"],
        ["calling_kernel", "bad_kernel"],
        ["calling_kernel", "other_kernel", "bad_kernel"],
    ]
    first, again, *_ = (rows for *_, rows in runs)
    assert again == first
    assert len(first) == 2


def test_no_case_at_all_is_a_failure(tmp_path):
    assert run_module(tmp_path, "--only", "no-such-kernel").returncode == 1


@pytest.mark.skipif(not is_interpreting(), reason="needs a process that runs the interpreter")
def test_the_interpreter_is_refused(capsys):
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        aot_compile.compile_case(collect_cases()[0], 90)
    with pytest.raises(SystemExit):
        aot_compile.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_two_cases_of_one_name_are_refused(monkeypatch):
    module = sys.modules["glm_rlhf.kernels.rl.advantages"]
    case = module.compile_cases()[0]

    def compile_cases():
        return [case, case]

    compile_cases.__module__ = module.__name__
    monkeypatch.setattr(module, "compile_cases", compile_cases)
    with pytest.raises(ValueError, match=case.name):
        collect_cases()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        ({"spill_bytes": 8}, False),
        ({"shared_bytes": 227 * 1024}, True),
        ({"shared_bytes": 227 * 1024 + 1}, False),
        ({"shared_bytes": 200 * 1024, "capability": 80}, False),
        ({"error": "broken"}, False),
    ],
)
def test_launchable_means_compiled_without_spills_and_fitting(change, expected):
    assert is_launchable(replace(RESULT, **change)) is expected


def test_table_has_a_row_for_each_case_and_a_column_for_each_target():
    results = [
        RESULT,
        replace(RESULT, capability=80, spill_bytes=16),
        replace(RESULT, name="another/9B/fp32", error="broken", notes=""),
    ]
    lines = as_markdown(results, date="2026-01-02").splitlines()
    assert lines[2].startswith("2026-01-02. Triton ")
    assert lines[-4:] == [
        "| Kernel / shape / dtype | warps | stages | sm_80 | sm_90 | Note |",
        "|---|---|---|---|---|---|",
        "| another/9B/fp32 | 4 | 3 |  | FAILED |  |",
        "| op_fwd/6B/bf16 | 4 | 3 | 64 / 16 / 1024 | 64 / 0 / 1024 | a note |",
    ]
