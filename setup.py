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
    packages=packages(),
    package_dir={f"glm_rlhf.{floor}": floor for floor in FLOORS},
    package_data={f"glm_rlhf.{floor}": ["py.typed"] for floor in FLOORS},
)
