"""Functions that workers call in tests."""

import os
import random
import signal
import subprocess
import sys
import time


def echo(value):
    return value


def draws() -> tuple:
    import numpy as np

    return random.random(), float(np.random.rand())


def about() -> dict:
    """What a worker is."""
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "folder": os.getcwd(),
        "modules": sorted(sys.modules),
        "environment": dict(os.environ),
        "stdin": sys.stdin.read(),
    }


def hang() -> None:
    """Neither return nor let another thread run."""
    number = 7 ** (7**8)
    print(str(number) if number < 0 else number.bit_length())
    time.sleep(1000)


def hang_with_child(path: str) -> None:
    """Hang in a process of its own, whose id is in a file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(f"{path}.new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(f"{path}.new", path)
    child.wait()


def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(1000)


def fork_and_die() -> None:
    """Leave a process behind that holds the worker's connection."""
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(4)


def raises() -> None:
    raise KeyError("answer")


def unpicklable():
    return lambda: None


def prints(text: str) -> str:
    print(text)
    sys.stderr.write(text + "\n")
    return text


def terminate_children() -> list[int]:
    """The exit codes of a program and a fork of this process that are asked to end."""
    import multiprocessing

    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    fork.start()
    time.sleep(0.3)
    program.terminate()
    fork.terminate()
    fork.join()
    return [program.wait(), fork.exitcode]


def broken_preparation() -> None:
    raise ValueError("not today")
