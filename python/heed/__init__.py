"""heed: attention for JAX, NumPy and anything with DLPack.

`heed.flash_mha` is exact attention with grouped heads, causal and windowed masks, soft caps, sinks, ALiBi and segments;
`heed.flash_mha_varlen` is the same on packed sequences; both have gradients, through autodiff and as
`heed.flash_mha_bwd` and `heed.flash_mha_varlen_bwd`; `heed.ops` has gated activations, rotary embeddings, RMS norms
and attention of one query, `heed.jit` the same as TVM-FFI modules; `heed.explain` says which kernel a call gets.
Importing heed imports neither JAX nor any other framework.
"""

from __future__ import annotations

import sys
from typing import Any

from heed import jit, ops
from heed._attention import flash_mha
from heed._attention_bwd import AttentionGradients, flash_mha_bwd, flash_mha_varlen_bwd
from heed._attention_varlen import flash_mha_varlen
from heed._errors import UnsupportedError
from heed._explain import Explanation, explain
from heed._lib import checked_version
from heed._versions import check_versions

check_versions()
__version__ = checked_version()

__all__ = [
    "AttentionGradients",
    "Explanation",
    "UnsupportedError",
    "__version__",
    "explain",
    "export_checks",
    "flash_mha",
    "flash_mha_bwd",
    "flash_mha_varlen",
    "flash_mha_varlen_bwd",
    "jit",
    "ops",
]


def export_checks() -> list[Any]:
    """The `disabled_checks` that `jax.export.export` needs for programs that call heed.

    heed's custom calls keep their meaning across versions (their names carry one), so that an exported program may call
    them: `jax.export.export(jax.jit(f), disabled_checks=heed.export_checks())(*args)`.
    """
    from heed import _jax_attention

    return _jax_attention.export_checks()


if "jax" in sys.modules:  # so that programs exported or compiled by another process find heed's calls
    from heed import _jax_attention as _jax_attention
