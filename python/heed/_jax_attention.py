"""Attention on JAX arrays and tracers: validates once, on unbatched shapes, and binds the primitive."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heed._versions import check_versions

check_versions(required=True)

import jax  # noqa: E402

from heed._jax import ffi_target, partition, vjp  # noqa: E402
from heed._jax.operands import prepare  # noqa: E402
from heed._jax.ops import ATTENTION_BWD, ATTENTION_FWD, OPS  # noqa: E402
from heed._jax.primitive import compiled  # noqa: E402
from heed._problem import GRADIENT_NAMES, AttentionStatics  # noqa: E402

__all__ = ["attention", "attention_bwd", "export_checks", "register_targets"]


def register_targets() -> None:
    """Tells XLA about heed's custom calls, for programs that were compiled or exported elsewhere."""
    ffi_target.register()
    partition.register()


def export_checks() -> list[Any]:
    """What `jax.export.export(..., disabled_checks=...)` needs to export programs that call heed.

    The process that runs such a program needs heed's targets as well: this call registers them there.
    """
    register_targets()
    return [jax.export.DisabledSafetyCheck.custom_call(op.target_name) for op in OPS]


def attention(statics: AttentionStatics, operands: Sequence[Any]) -> Any:
    """Attention on JAX values; `operands` follow `OPERAND_NAMES`, absent ones are None. Returns out or (out, lse)."""
    present, arrays, is_traced = prepare(ATTENTION_FWD, statics, operands)
    if is_traced:
        results = vjp.attention(statics, present, tuple(arrays))
    else:
        results = compiled(ATTENTION_FWD, statics, present)(*arrays)
    return tuple(results) if statics.return_lse else results[0]


def attention_bwd(statics: AttentionStatics, operands: Sequence[Any]) -> tuple[Any | None, ...]:
    """The gradients of attention on JAX values; `operands` follow `BWD_OPERAND_NAMES`, absent ones are None.

    Returns one for each of `GRADIENT_NAMES`, None where its operand is absent.
    """
    present, arrays, _ = prepare(ATTENTION_BWD, statics, operands)
    gradients = vjp.attention_bwd(statics, present, arrays)
    return tuple(gradients.get(name.removeprefix("d")) for name in GRADIENT_NAMES)


register_targets()
