"""Chooses from a folder of wheels what an environment lacks to run heed. Used by install_offline.sh.

``offline_wheels.py WHEEL_DIR [--extra NAME ...]`` prints the path of every wheel to install. What is installed already
and new enough is left alone. A wheel that is missing is an error; for an extra it is a warning.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

try:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
    from pip._vendor.packaging.version import Version
except ImportError:
    sys.exit(f"error: {sys.executable} has no pip (Debian: python3-pip, or use a virtual environment)")

# Large packages that a machine has for its own reasons (a CUDA build of jaxlib, say): never replaced.
KEPT = {"jax", "jaxlib", "numpy", "scipy"}


class Resolver:
    """Walks requirements depth first. Collects the wheels to install, what is wrong, and what is only a pity."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chosen: dict[str, Path] = {}
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._seen: set[str] = set()
        self._ranks = {tag: rank for rank, tag in enumerate(sys_tags())}

    def best_wheel(self, requirement: Requirement) -> tuple[Path | None, list[str]]:
        """The newest wheel that satisfies the requirement and fits this Python, and the names of the unfit."""
        fitting: list[tuple[Version, int, Path]] = []
        unfit: list[str] = []
        for path in sorted(self.folder.glob("*.whl")):
            name, version, _, tags = parse_wheel_filename(path.name)
            if name != canonicalize_name(requirement.name):
                continue
            ranks = [self._ranks[tag] for tag in tags if tag in self._ranks]
            if ranks and requirement.specifier.contains(version, prereleases=True):
                fitting.append((version, -min(ranks), path))
            else:
                unfit.append(path.name)
        return (max(fitting)[2] if fitting else None), unfit

    def require(self, requirement: Requirement, wanted_by: str, *, optional: bool = False) -> None:
        name = str(canonicalize_name(requirement.name))
        if name in self._seen:
            return
        self._seen.add(name)
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        if installed and name != "heed" and requirement.specifier.contains(installed, prereleases=True):
            return
        if installed and name in KEPT:
            self.errors.append(
                f"{name} {installed} is installed, but {wanted_by} needs {requirement}. It is not replaced: upgrade it "
                "yourself, or use another Python."
            )
            return
        path, unfit = self.best_wheel(requirement)
        if path is None:
            message = f"no wheel for {requirement} (needed by {wanted_by}) in {self.folder}"
            if unfit:
                message += f"; these do not fit this Python, this system or that requirement: {', '.join(unfit)}"
            (self.warnings if optional else self.errors).append(message)
            return
        self.chosen[name] = path
        for child in requirements_of(path, set(requirement.extras)):
            self.require(child, name, optional=optional)

    def require_heed(self, extras: list[str]) -> None:
        self.require(Requirement("heed"), "this script")
        if "heed" in self.chosen:
            for extra in extras:
                for child in requirements_of(self.chosen["heed"], {extra}):
                    self.require(child, f"heed[{extra}]", optional=True)


def requirements_of(wheel: Path, extras: set[str]) -> list[Requirement]:
    """The requirements in a wheel's metadata that apply to this Python."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    found = [Requirement(text) for text in fields.get_all("Requires-Dist") or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras | {""})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extra", action="append", default=[])
    args = parser.parse_args()

    resolver = Resolver(args.folder.resolve())
    resolver.require_heed(args.extra)
    for message in resolver.warnings:
        print(f"warning: {message}", file=sys.stderr)
    for message in resolver.errors:
        print(f"error: {message}", file=sys.stderr)
    if resolver.errors:
        return 1
    print(*resolver.chosen.values(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
