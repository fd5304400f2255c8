"""``python -m heed cache list|verify|clear``: the store of compiled GPU kernels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from heed._jit import StoredFile, cache_dir, remove_stored_files, stored_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("list", "print every kernel: architecture, size, compiler, kernel"),
        ("verify", "check every kernel's checksum; the exit status is 1 if one is damaged"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", nargs="?", default="", help="a folder of kernels (default: the user's cache)")
    text = "remove all kernels from the user's cache, and nothing else"
    clear = actions.add_parser("clear", help=text, description=text)
    clear.add_argument("--damaged", action="store_true", help="only those that cannot be used")


def run(args: argparse.Namespace) -> int:
    if args.action == "clear":
        count = remove_stored_files(only_damaged=args.damaged)
        print(f"removed {count} files from {cache_dir() or 'no cache'}")
        return 0
    if args.folder and not Path(args.folder).is_dir():
        print(f"heed cache: folder: got {args.folder!r}, expected one that exists", file=sys.stderr)
        return 2
    folder = args.folder or cache_dir()
    if folder is None:
        print("there is no cache: no folder can be made or trusted")
        return 0 if args.action == "list" else 1
    files = stored_files(folder=args.folder)
    damaged = [file for file in files if file.error]
    for file in files if args.action == "list" else damaged:
        print(_one_line(file))
    megabytes = sum(file.bytes for file in files) / 1e6
    print(f"{len(files)} kernels, {megabytes:.1f} MB, {len(damaged)} damaged, in {folder}")
    return 1 if args.action == "verify" and damaged else 0


def _one_line(file: StoredFile) -> str:
    if file.error:
        return f"damaged   {file.bytes / 1e3:7.1f} kB  {file.name}: {file.error}"
    return f"{file.arch:8}  {file.bytes / 1e3:7.1f} kB  {file.compiler}  {file.spec}"
