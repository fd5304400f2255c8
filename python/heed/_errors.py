"""heed's own error type. Shapes and values raise ValueError, dtypes and kinds of array TypeError."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(ValueError):
    """The arguments are valid, but no kernel can serve them where the call would run.

    Attributes:
        reasons: why each kernel candidate declined, by the candidate's name, in the order in which they were tried.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons: dict[str, str] = dict(reasons or {})
