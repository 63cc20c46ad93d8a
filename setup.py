"""The package mapping of glm-rlhf: three top-level folders become `glm_rlhf.<floor>`."""

from setuptools import find_packages, setup

FLOORS = ("engine", "kernels", "parallel")


def packages() -> list[str]:
    """Return every package below the three floors under its import name."""
    found = []
    for floor in FLOORS:
        found.append(f"glm_rlhf.{floor}")
        found.extend(f"glm_rlhf.{floor}.{name}" for name in find_packages(floor))
    return found


setup(
    name="glm-rlhf",
    version="0.1.0",
    description="Align ChatGLM / GLM models with human feedback on GPU clusters",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=packages(),
    package_dir={f"glm_rlhf.{floor}": floor for floor in FLOORS},
    install_requires=[
        "torch>=2.10,<2.14",
        "megatron-core==0.16.1",
        # Without a GPU: the interpreter of Triton 3.6 needs numpy < 2.4 (the kernels themselves do not).
        "triton>=3.6,<3.10",
        "numpy",
        "psutil",
        "pydantic>=2.8",
        "PyYAML",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "parity": ["transformers>=5"],
        "test": ["hypothesis", "pyarrow", "pytest", "pytest-timeout", "pytest-xdist", "transformers>=5"],
        "lint": ["import-linter", "ruff"],
        "cuda": ["transformer-engine[pytorch]"],
        "wandb": ["wandb"],
        "parquet": ["pyarrow"],
        "plot": ["matplotlib"],
    },
    entry_points={"console_scripts": ["glm-rlhf = glm_rlhf.engine.cli:main"]},
)
