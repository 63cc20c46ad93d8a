"""The Dockerfile: pinned, small, not as root, and of versions that the package takes."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "launch" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "SHELL", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """`(instruction, the rest on one line)`, without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """What a linter of Dockerfiles would say, of the rules that matter here."""
    found, stages, values = [], {"${CUDA_IMAGE}"}, {}
    steps = instructions(text)
    for name, rest in steps:
        if name not in INSTRUCTIONS:
            found.append(f"{name} is not used here")
        if name == "ARG" and "=" in rest:
            values.setdefault(*rest.split("=", 1))
        if name == "FROM":
            image, *stage = rest.split(" AS ")
            tag = values["CUDA_IMAGE"] if image == "${CUDA_IMAGE}" else image
            if image not in stages or (":" not in tag and image not in stages) or tag.endswith(":latest"):
                found.append(f"FROM {image}: give a tag, or a stage")
            stages.update(stage)
        if name == "RUN":
            found += _of_run(rest)
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("the image runs as root")
    return found


def _of_run(rest: str) -> list[str]:
    found = []
    if "apt-get install" in rest:
        if "--no-install-recommends" not in rest or "rm -rf /var/lib/apt/lists/*" not in rest:
            found.append("apt-get: --no-install-recommends, and remove the lists in the same RUN")
        if "apt-get update &&" not in rest:
            found.append("apt-get install without update in the same RUN")
    if re.search(r"\b(sudo|cd)\b", rest):
        found.append("no sudo, no cd")
    for requirement in re.findall(r'(?:^| )"([\w-]+)"', rest):
        found.append(f"{requirement} is not pinned")
    for url in re.findall(r"git\+\S+", rest):
        if "@" not in url:
            found.append(f"{url} is not pinned")
    return found


def arguments() -> dict[str, str]:
    return dict(
        rest.split("=", 1)
        for name, rest in instructions(DOCKERFILE.read_text(encoding="utf-8"))
        if name == "ARG" and "=" in rest
    )


def test_no_rule_is_broken():
    assert faults(DOCKERFILE.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (":13.0.3-cudnn-devel-ubuntu24.04", ":latest", "give a tag"),
        ("@${APEX_COMMIT}", "", 'apex.git" is not pinned'),
        ('"wheel==0.48.0"', '"wheel"', "wheel is not pinned"),
        (" --no-install-recommends", "", "apt-get: --no-install-recommends"),
        ("USER engine", "USER root", "runs as root"),
    ],
)
def test_a_broken_rule_is_found(before, after, says):
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert before in text
    (fault,) = faults(text.replace(before, after))
    assert says in fault


def test_versions_are_those_that_the_package_takes():
    values = arguments()
    assert re.fullmatch(r"[0-9a-f]{40}", values["APEX_COMMIT"])
    # One CUDA: of the image, with whose nvcc is compiled, and of torch's wheels.
    cuda = re.search(r"cuda:(\d+)\.(\d+)\.", values["CUDA_IMAGE"])
    assert values["TORCH_INDEX"].endswith(f"/cu{cuda[1]}{cuda[2]}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (text for text in project["dependencies"] if text.startswith("torch>="))
    low, high = ([int(n) for n in bound.split(".")] for bound in re.findall(r"[\d.]+\d", torch))
    assert low <= [int(n) for n in values["TORCH_VERSION"].split(".")][:2] < high


def test_transformer_engine_is_one_that_megatron_core_takes():
    from importlib.metadata import requires

    (wanted,) = (r for r in requires("megatron-core") if r.startswith("transformer-engine") and "dev" in r)
    least, below = re.search(r">=(\d+\.\d+)", wanted)[1], re.search(r"<(\d+\.\d+)", wanted)[1]
    version = [int(n) for n in arguments()["TRANSFORMER_ENGINE_VERSION"].split(".")]
    assert [int(n) for n in least.split(".")] <= version < [int(n) for n in below.split(".")]
