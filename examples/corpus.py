"""Text to train on, and its packing: this repository's documentation and the Python standard library's sources.

Documents are laid end to end in rows of equal length. A row's segment ids say which token belongs to which document,
so that attention stays inside each and no token is spent on padding.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
Encode = Callable[[str], list[int]]


class Packed(NamedTuple):
    """Rows of packed documents. A document that goes on in the next row is one more segment there."""

    tokens: NDArray[np.int32]  # [rows, row_len]
    segment_ids: NDArray[np.int32]  # [rows, row_len], from 0 on in each row


def documents(seed: int = 0) -> Iterator[str]:
    """Texts in an order that is always the same, the documentation among the sources, over and over."""
    files = sorted(ROOT.glob("docs/**/*.md")) + sorted(Path(os.__file__).parent.glob("*.py"))
    random.Random(seed).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return itertools.cycle([text for text in texts if text.strip()])


def pack(texts: Iterator[str], encode: Encode, end_of_text: int, num_rows: int, row_len: int) -> Packed:
    """The first rows that the texts fill. No document is longer than half a row: every row holds several."""
    tokens = np.zeros((num_rows, row_len), np.int32)
    segment_ids = np.zeros((num_rows, row_len), np.int32)
    row, column, segment = 0, 0, 0
    for text in texts:
        rest = [*encode(text), end_of_text][: row_len // 2]
        while rest:
            taken = min(len(rest), row_len - column)
            tokens[row, column : column + taken] = rest[:taken]
            segment_ids[row, column : column + taken] = segment
            rest = rest[taken:]
            column, segment = column + taken, segment + 1
            if column == row_len:
                row, column, segment = row + 1, 0, 0
                if row == num_rows:
                    return Packed(tokens, segment_ids)
    raise ValueError(f"the texts fill {row} rows of {row_len} tokens, expected {num_rows}")


def encode_bytes(text: str) -> list[int]:
    """A vocabulary that needs no model: one token for each byte."""
    return list(text.encode())


END_OF_BYTES = 256
NUM_BYTE_TOKENS = 257
