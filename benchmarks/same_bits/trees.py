"""Two trees of the project on this machine: a worktree of a commit, and the process that runs each."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.same_bits import fork_server
from benchmarks.same_bits.names import key_of
from benchmarks.same_bits.rows import RowRun

ROOT = Path(__file__).resolve().parents[2]
"""This tree."""
LAYERS = ("engine", "kernels", "parallel")
"""Folders of a tree that are packages of `glm_rlhf`."""
TIMEOUT_S = 300.0
"""Longest that one run may take."""
_KEY = re.compile(r"^ *([a-z0-9_]+\.[a-z0-9_]+)\b", re.MULTILINE)
_LOG_LINES = 12


class RunFailure(RuntimeError):
    """A run did not end with exit code 0; the message holds the last lines that its ranks wrote."""


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="same_bits_") as place:
        folder = Path(place) / "tree"
        git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def commit_of(root: Path) -> str:
    """Return a tree's commit with its subject, and whether its files differ from it."""
    head = git("log", "-1", "--format=%h %s", "--abbrev=12", root=root)
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", root=root)
    return f"{head} (with uncommitted changes)" if changes else head


def git(*arguments: str, root: Path = ROOT) -> str:
    """Return what git says in a tree.

    Raises:
        RuntimeError: it refuses.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Tree:
    """Owns the process that has imported one tree and forks its runs; used as a context manager."""

    def __init__(self, name: str, root: Path, inputs: Path) -> None:
        self.name, self.root, self.inputs = name, root, inputs
        self.keys = cache(self._keys)

    def __enter__(self) -> "Tree":
        self._folder = tempfile.TemporaryDirectory(prefix=f"same_bits_{self.name}_")
        packages = Path(self._folder.name) / "packages"
        (packages / "glm_rlhf").mkdir(parents=True)
        for layer in LAYERS:
            (packages / "glm_rlhf" / layer).symlink_to(self.root / layer, target_is_directory=True)
        self._log = (Path(self._folder.name) / "log.txt").open("w+")
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(map(str, (packages, self.inputs))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, fork_server.__file__, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=self._folder.name,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and a request was not read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def run(self, command: str, run: RowRun, folder: Path) -> Path:
        """Return the run folder of a command, below `folder`, where its ranks work and write.

        Raises:
            RunFailure: a rank ended with another code than 0, or not in time.
            ValueError: the tree does not have one of the keys.
        """
        folder.mkdir(parents=True, exist_ok=True)
        known = self.keys(command)
        settings = {key_of(key, known): value for key, value in run.settings.items()}
        settings["run.output"] = str(folder / "run")
        argv = [command, *(f"{key}={value.format(inputs=self.inputs)}" for key, value in settings.items())]
        request = {"argv": argv, "world": run.layout.world, "folder": str(folder)}
        codes = self._ask(request | {"timeout_s": TIMEOUT_S})
        if set(codes) != {0}:
            lines = "\n".join(
                f"{path.stem}: {line}"
                for path in sorted(folder.glob("rank_*.txt"))
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            )
            raise RunFailure(f"{self.name}: the ranks ended with {codes}\n{lines}")
        return folder / "run"

    def _keys(self, command: str) -> frozenset[str]:
        """Return the keys that the tree's help on a command lists."""
        keys = frozenset(_KEY.findall(self._ask({"help": command})))
        if not keys:
            raise RunFailure(f"{self.name}: {command} --help lists no keys")
        return keys

    def _ask(self, request: dict) -> object:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            lines = "\n".join(self._log.read().splitlines()[-_LOG_LINES:])
            raise RunFailure(f"{self.name}: the process that imports {self.root} has ended\n{lines}")
        return json.loads(answer)
