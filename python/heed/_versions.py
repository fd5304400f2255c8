"""Checks the versions of the packages that heed builds on, from their metadata: nothing is imported."""

from __future__ import annotations

import re
from importlib import metadata

MINIMUM_VERSIONS = {"jax": (0, 10), "jaxlib": (0, 10), "jax-tvm-ffi": (0, 1, 3)}


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: "0.12.0.1" -> (0, 12, 0, 1), "0.11.0.dev3+cpu" -> (0, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def check_versions(*, required: bool = False) -> None:
    """Raises ImportError if an installed package is older than heed can use, naming it, its version and the remedy.

    A package that is not installed is an error only if `required`: heed's NumPy face works without JAX.
    """
    problems = []
    for package, minimum in MINIMUM_VERSIONS.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            if required:
                problems.append(f"{package} is not installed, expected {_dotted(minimum)} or newer")
            continue
        if _release(found) < minimum:
            problems.append(f"{package} is {found}, expected {_dotted(minimum)} or newer")
    if problems:
        names = " ".join(f"'{package}>={_dotted(minimum)}'" for package, minimum in MINIMUM_VERSIONS.items())
        raise ImportError(f"heed: {'; '.join(problems)}. Upgrade with: pip install --upgrade {names}")
