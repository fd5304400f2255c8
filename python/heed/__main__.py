"""The command line: ``python -m heed cache | cmake-dir | compile | doctor | version``. None imports JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import heed
from heed import _cache_command, _compile_command


def cmake_dir() -> Path:
    """The folder that holds ``heedConfig.cmake``, to be passed to CMake as ``-Dheed_DIR``."""
    # An editable install spreads the package over two folders; only one of them holds what CMake installed.
    folders = [Path(entry) / "lib" / "cmake" / "heed" for entry in heed.__path__]
    for folder in folders:
        if (folder / "heedConfig.cmake").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"heed's CMake package is missing: looked in {', '.join(map(str, folders))}")


def _print_cmake_dir(_: argparse.Namespace) -> int:
    try:
        print(cmake_dir())
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _print_version(_: argparse.Namespace) -> int:
    print(version("heed"))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from heed._doctor import doctor

    return doctor()


def _no_arguments(_: argparse.ArgumentParser) -> None:
    pass


# What runs, what it takes, what it is for.
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str]] = {
    "cache": (_cache_command.run, _cache_command.add_arguments, "list, verify or clear the compiled GPU kernels"),
    "cmake-dir": (_print_cmake_dir, _no_arguments, "print the folder of heed's CMake package (cmake -Dheed_DIR=...)"),
    "compile": (_compile_command.run, _compile_command.add_arguments, "compile GPU kernels before they are needed"),
    "doctor": (_doctor, _no_arguments, "print what heed finds on this machine and which kernels it would choose"),
    "version": (_print_version, _no_arguments, "print heed's version"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m heed", description="heed: attention for CPUs and GPUs")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (function, add_arguments, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    status: int = args.function(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
