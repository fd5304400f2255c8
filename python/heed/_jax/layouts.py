"""The axes of the tensors of each op's calls, from what a problem's text says."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from heed._jax.axes import Layout
from heed._problem import function_of

Shapes = Mapping[str, tuple[int, ...]]
"""The operands that a call has."""
Options = Mapping[str, str]
"""What a problem's text says besides."""

_TOKENS = (
    "Every query attends to keys on all devices, so a sharded token axis needs ring attention, which this version of "
    "heed does not have"
)
_HEAD_DIM = "Scores sum over the whole head dim"
_LENGTHS = "Every device needs the lengths of all sequences"
_ROW = "The elements of a row are computed from each other"
_WORKSPACE = {"workspace": "Each device has its own scratch memory"}

# Attention. -----------------------------------------------------------------------------------------------------------


def _with_gradients(forward: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The tensors of the backward pass too. A gradient looks like what it is one of, but for those of per-head values,
    which are given for each row of the batch; the workspace is as much memory for each row and head."""
    per_head = ("batch", "q_heads") if "batch" in forward["q"] else ("q_heads",)
    gradients = {f"d{name}": forward[name] for name in ("q", "k", "v", "out", "lse")}
    return forward | gradients | {"dsinks": per_head, "dalibi_slopes": per_head, "workspace": (*per_head, "workspace")}


_ATTENTION_WHOLE = {"q_tokens": _TOKENS, "kv_tokens": _TOKENS, "head_dim_qk": _HEAD_DIM, "head_dim_v": _HEAD_DIM}

_DENSE = Layout(
    "flash_mha",
    _with_gradients(
        {
            "q": ("batch", "q_tokens", "q_heads", "head_dim_qk"),
            "k": ("batch", "kv_tokens", "kv_heads", "head_dim_qk"),
            "v": ("batch", "kv_tokens", "kv_heads", "head_dim_v"),
            "sinks": ("q_heads",),
            "alibi_slopes": ("q_heads",),
            "q_segment_ids": ("batch", "q_tokens"),
            "kv_segment_ids": ("batch", "kv_tokens"),
            "out": ("batch", "q_tokens", "q_heads", "head_dim_v"),
            "lse": ("batch", "q_heads", "q_tokens"),
        }
    ),
    whole=_ATTENTION_WHOLE | _WORKSPACE,
    instead="the batch or the heads",
)
_VARLEN = Layout(
    "flash_mha_varlen",
    _with_gradients(
        {
            "q": ("q_tokens", "q_heads", "head_dim_qk"),
            "k": ("kv_tokens", "kv_heads", "head_dim_qk"),
            "v": ("kv_tokens", "kv_heads", "head_dim_v"),
            "sinks": ("q_heads",),
            "alibi_slopes": ("q_heads",),
            "cu_seqlens_q": ("boundaries",),
            "cu_seqlens_k": ("boundaries",),
            "seqused_k": ("sequences",),
            "out": ("q_tokens", "q_heads", "head_dim_v"),
            "lse": ("q_heads", "q_tokens"),
        }
    ),
    whole=_ATTENTION_WHOLE | {"boundaries": _LENGTHS, "sequences": _LENGTHS} | _WORKSPACE,
    instead="the heads",
)


def attention(shapes: Shapes, _: Options) -> Layout:
    return _VARLEN if function_of(shapes) == _VARLEN.function else _DENSE


def _decode_layout(kv_layout: str) -> Layout:
    def kv(head_dim: str) -> tuple[str, ...]:
        return ("kv_tokens", "kv_heads", head_dim) if kv_layout == "NHD" else ("kv_heads", "kv_tokens", head_dim)

    return Layout(
        "ops.single_decode",
        {
            "q": ("q_heads", "head_dim_qk"),
            "k": kv("head_dim_qk"),
            "v": kv("head_dim_v"),
            "sinks": ("q_heads",),
            "alibi_slopes": ("q_heads",),
            "out": ("q_heads", "head_dim_v"),
            "lse": ("q_heads",),
            "workspace": ("q_heads", "workspace"),
        },
        whole={
            "kv_tokens": "The query attends to keys on all devices",
            "head_dim_qk": _HEAD_DIM,
            "head_dim_v": _HEAD_DIM,
        }
        | _WORKSPACE,
        instead="the heads",
    )


_DECODE = {kv_layout: _decode_layout(kv_layout) for kv_layout in ("NHD", "HND")}


def attention_decode(_: Shapes, options: Options) -> Layout:
    return _DECODE[options["layout"]]


# The others. ----------------------------------------------------------------------------------------------------------


@functools.cache
def _act_layout(activation: str) -> Layout:
    pair, half = ("gates_and_factors",), ("hidden",)
    return Layout(
        f"ops.{activation}_and_mul",
        {"x": pair, "out": half, "dout": half, "dx": pair},
        whole={"gates_and_factors": _ROW, "hidden": _ROW},
        instead="any other axis",
        halves={"hidden": "gates_and_factors"},
    )


def act_and_mul(_: Shapes, options: Options) -> Layout:
    return _act_layout(options["activation"])


def _rope_layout(function: str, tokens: str, why_whole: Mapping[str, str], instead: str) -> Layout:
    q, k = (tokens, "q_heads", "head_dim"), (tokens, "kv_heads", "head_dim")
    return Layout(
        function,
        {
            "q": q,
            "k": k,
            "indptr": ("boundaries",),
            "offsets": ("sequences",),
            "pos_ids": (tokens,),
            "cos_sin_cache": ("positions", "rotary_dim"),
            "q_rope": q,
            "k_rope": k,
        },
        whole={"head_dim": "The elements of a head are rotated in pairs", **why_whole},
        instead=instead,
        heads_are_tied=False,
    )


_SEQUENCES = {"packed_tokens": _LENGTHS, "boundaries": _LENGTHS, "sequences": _LENGTHS}
_CACHE = dict.fromkeys(("positions", "rotary_dim"), "A token may stand at any position of the cache")
_ROPE = {
    name: _rope_layout(f"ops.{name}", "packed_tokens", _SEQUENCES, "the heads")
    for name in ("apply_rope", "apply_llama31_rope")
} | {
    name: _rope_layout(f"ops.{name}", "tokens", _CACHE, "the tokens or the heads")
    for name in ("apply_rope_pos_ids", "apply_rope_with_cos_sin_cache")
}


def rope(shapes: Shapes, options: Options) -> Layout:
    if "pos_ids" in shapes:
        return _ROPE["apply_rope_with_cos_sin_cache" if "cos_sin_cache" in shapes else "apply_rope_pos_ids"]
    return _ROPE["apply_llama31_rope" if options["llama31"] == "1" else "apply_rope"]


@functools.cache
def _norm_layout(function: str, num_row_axes: int) -> Layout:
    rows = (*(f"row{i}" for i in range(num_row_axes)), "hidden")
    return Layout(
        function,
        {
            **dict.fromkeys(("x", "residual", "out", "sum", "dout", "dsum", "dx"), rows),
            "weight": ("hidden",),
            "dweight": ("hidden",),
            "workspace": ("workspace",),
        },
        whole={"hidden": "Every element of a row is divided by the norm of all"} | _WORKSPACE,
        instead="any other axis",
    )


def rms_norm(shapes: Shapes, _: Options) -> Layout:
    is_fused = "residual" in shapes or "dsum" in shapes
    return _norm_layout(
        "ops.fused_add_rms_norm" if is_fused else "ops.rms_norm", len(shapes["x"]) - len(shapes["weight"])
    )
