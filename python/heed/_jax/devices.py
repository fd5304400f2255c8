"""What must be there before a lowered program runs: a kernel on each platform, loaded on each local GPU."""

# mypy: disable-error-code="no-untyped-call"
# JAX leaves parts of its API untyped.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from heed._errors import UnsupportedError
from heed._jax.ops import Op
from heed._lib import function
from heed._problem import require_kernel


def local_cuda_ordinals() -> list[int]:
    """CUDA's ordinals of the GPUs that this process's JAX uses; none where JAX has no CUDA backend."""
    try:
        return [int(device.local_hardware_id) for device in jax.local_devices(backend="cuda")]
    except RuntimeError:
        return []


def prepare(op: Op, text: str, platforms: Sequence[str], what: str) -> tuple[int, ...] | None:
    """Makes the problem's kernels ready on every platform that a program is lowered for.

    A problem that some platform cannot serve raises UnsupportedError. On CUDA the kernel is compiled, if need be, and
    loaded on all GPUs of this process that a kernel serves, so that a failure is an error of the call that traces and
    the program only launches. A GPU that none serves, beside others, is reported by XLA when a program is to run there.
    Where there is no GPU (lowering for another machine) all that is left to the process that runs the program.

    Returns the shape of a workspace that is large enough for all of them; None if the call has none.
    """
    serving: list[Any] = []
    for platform in platforms:
        if platform == "cpu":
            serving.append(op.resolve(text, "cpu"))
            require_kernel(serving[-1], what, "cpu")
        elif platform == "cuda":
            serving += _prepare_cuda(op, text, what)
        else:
            reason = f"heed has no kernels for the platform {platform}, only for cpu and cuda"
            raise UnsupportedError(f"{what}: {reason}", {platform: reason})
    return _workspace_shape(op, serving) if op.has_workspace else None


def workspace_of_share(op: Op, share: str, platform: str) -> tuple[int, ...] | None:
    """The shape of a workspace for one device's share of a call; None if it needs none.

    It is not that of the whole call, divided: fewer heads leave more of a GPU to each of them, so that each may need
    more, also where the whole needs none.
    """
    if not op.has_workspace:
        return None
    targets = ["cpu"] if platform == "cpu" else set(_cuda_targets().values()) or ["cuda"]
    return _workspace_shape(op, [op.resolve(share, target) for target in targets])


def _workspace_shape(op: Op, resolutions: Sequence[Any]) -> tuple[int, ...] | None:
    """Large enough for every kernel that was found; None if none has a workspace."""
    shapes = [resolution.workspace_shape for resolution in resolutions if resolution.chosen is not None]
    if not shapes:
        return None
    largest: tuple[int, ...] = max(shapes)  # they differ in the last axis only
    return None if op.may_lack_workspace and largest[-1] == 0 else largest


def _cuda_targets() -> dict[int, str]:
    return {ordinal: str(function("cuda_target")(ordinal)) for ordinal in local_cuda_ordinals()}


def _prepare_cuda(op: Op, text: str, what: str) -> list[Any]:
    """What the problem resolves to on each kind of GPU that serves it."""
    targets = _cuda_targets()
    found = {target: op.resolve(text, target) for target in targets.values() or ["cuda"]}
    serving = [resolution for resolution in found.values() if resolution.chosen is not None]
    if not serving:
        target, resolution = next(iter(found.items()))
        require_kernel(resolution, what, target)
    for ordinal, target in targets.items():
        if found[target].chosen is None:
            continue
        try:
            function(f"{op.stem}_load")(text, ordinal)
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(str(error)) from None  # without the native frames
    return serving
