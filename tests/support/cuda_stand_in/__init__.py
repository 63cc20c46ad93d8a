"""A CUDA device for processes without one: host memory and CPU operators under the name cuda:0.

It shows that a program on CUDA tensors runs, that no operator or kernel gets tensors of both devices, that
recorded steps contain nothing that cannot be recorded, and that results are right. It shows nothing about
time, overlapping streams, or compiled kernels (they run in Triton's interpreter).

A process uses it if it is started with `environment`.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "CUDA_STAND_IN"
"""Environment variable: the compiled device."""


def build(folder: Path) -> Path:
    """Compile the device into `folder` and return its path; needs g++, takes 15 seconds.

    Raises:
        RuntimeError: the compilation fails.
    """
    torch, source, library = torch_folder(), HERE / "device.cpp", folder / "cuda_stand_in.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{torch / 'include'}", source]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, "-o", library, *libraries], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
    return library


def environment(library: Path) -> dict[str, str]:
    """Return an environment that makes Python start with the device."""
    # Python imports a module `sitecustomize` when it starts.
    paths = [str(HERE / "start"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        LIBRARY: str(library),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",  # nothing can be compiled for this device
    }


def torch_folder() -> Path:
    """Return the folder of torch, without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent
