"""A CUDA device for processes that have none: host memory and the CPU's operators, under the name cuda:0.

What it shows: that a program on CUDA tensors runs at all, that no operator or kernel is given tensors of both
devices, that recorded steps hold nothing that cannot be recorded, and that the numbers are right. What it
does not: anything about time, about streams that overlap, or about kernels as a compiler makes them (they run
in Triton's interpreter).

A process has it when `environment` is its environment.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "CUDA_STAND_IN"
"""Environment variable: the compiled device."""


def build(folder: Path) -> Path:
    """Return the device, compiled into `folder`; needs g++, takes 15 seconds.

    Raises:
        RuntimeError: it does not compile.
    """
    torch, source, library = torch_folder(), HERE / "device.cpp", folder / "cuda_stand_in.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{torch / 'include'}", source]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, "-o", library, *libraries], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
    return library


def environment(library: Path) -> dict[str, str]:
    """Return an environment in which Python starts with the device."""
    # Python imports a module `sitecustomize` when it starts.
    paths = [str(HERE / "start"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        LIBRARY: str(library),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",  # nothing can be compiled for a device that is none
    }


def torch_folder() -> Path:
    """Return where torch is, without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent
