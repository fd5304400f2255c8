"""The shapes of the GPU benchmark, who takes part in each, and whether heed's result there is right.

Everyone reads the same tensors [batch, tokens, heads, head dim] and allocates an output per call with torch's
allocator. PyTorch's `scaled_dot_product_attention` gets transposed views of them, which its backends take as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import heed
from packed import PackedRow, equal_lengths, uneven_lengths

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tolerance import assert_close

Run = Callable[[], Any]

TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
OTHER_TOKENS = (1024, 4096, 16384)  # of the other head dims and groups
SHORT_TOKENS = (64, 128, 256)
FEW_QUERIES, FEW_KEYS = 16, 8192  # of a sequence: one that is continued by a few tokens
BATCH_TOKENS = 16384  # batch x tokens of every dense row but those


@dataclass(frozen=True)
class Row:
    """One dense shape: sequences of `tokens`, as many as make BATCH_TOKENS. `window` tokens to the left, or -1.
    `query_tokens`: rows of queries of each sequence, if they are not as many.
    """

    group: str
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    window: int = -1
    batch_tokens: int = BATCH_TOKENS
    query_tokens: int | None = None

    @property
    def num_queries(self) -> int:
        return self.tokens if self.query_tokens is None else self.query_tokens

    @property
    def batch(self) -> int:
        return max(1, self.batch_tokens // self.tokens)

    @property
    def label(self) -> str:
        kind = "causal" if self.is_causal else "full"
        kind += f" window {self.window}" if self.window >= 0 else ""
        few = "" if self.query_tokens is None else f"{self.batch} x {self.query_tokens} queries, "
        return f"D {self.head_dim}, {self.q_heads}/{self.kv_heads}, {few}S {self.tokens} {kind}"

    @property
    def flops(self) -> float:
        """4 B H D per kept query-key pair; a causal mask counts as half of all pairs, a window by its pairs. So does a
        causal mask over few queries.
        """
        s = self.tokens
        pairs = s * s / 2 if self.is_causal else self.num_queries * s
        if self.is_causal and self.query_tokens is not None:
            pairs = self.query_tokens * (s - (self.query_tokens - 1) / 2)
        if self.window >= 0:
            pairs = _kept_pairs(s, self.window)
        return 4.0 * self.batch * pairs * self.q_heads * self.head_dim

    @property
    def work_share(self) -> float | None:
        """Of the causal call without the window."""
        return (
            None if self.window < 0 else _kept_pairs(self.tokens, self.window) / _kept_pairs(self.tokens, self.tokens)
        )


def _kept_pairs(tokens: int, window: int) -> float:
    kept = min(window + 1, tokens)
    return kept * tokens - kept * (kept - 1) / 2


def dense_rows(is_quick: bool) -> list[Row]:
    """The rows in the order of their importance."""
    rows = []
    both = (False, True)
    d128_tokens = (1024, 8192) if is_quick else TOKENS
    rows += [Row("d128", s, 16, 16, 128, causal) for causal in both for s in d128_tokens]
    others = (("d64", 32, 32, 64), ("d256", 8, 8, 256), ("gqa", 32, 8, 128))
    other_tokens = (4096,) if is_quick else OTHER_TOKENS
    for group, q_heads, kv_heads, head_dim in others:
        rows += [Row(group, s, q_heads, kv_heads, head_dim, causal) for causal in both for s in other_tokens]
    windows = ((16384, 1024),) if is_quick else ((4096, 1024), (16384, 1024), (16384, 4096))
    rows += [Row("window", s, 32, 8, 128, True, window) for s, window in windows]
    short_tokens = (128,) if is_quick else SHORT_TOKENS
    rows += [Row("short", s, 16, 16, 128, causal) for causal in both for s in short_tokens]
    few_rows = ((1, 32), (8, 32)) if is_quick else ((1, 32), (8, 32), (32, 32), (1, 64), (8, 64), (32, 64))
    rows += [
        Row("few", FEW_KEYS, q_heads, 8, 128, causal, batch_tokens=batch * FEW_KEYS, query_tokens=FEW_QUERIES)
        for causal in both
        for batch, q_heads in few_rows
    ]
    return rows


def packed_rows() -> list[tuple[PackedRow, PackedRow]]:
    """Pairs of the same work: very uneven sequences, and equal ones."""
    uneven = uneven_lengths()
    equal = equal_lengths(uneven)
    return [
        (
            PackedRow("64 to 8192 tokens", uneven, 16, 128, causal),
            PackedRow(f"{equal[0]} tokens each", equal, 16, 128, causal),
        )
        for causal in (False, True)
    ]


# Who takes part. Each function makes the inputs' caller for one row, or raises if it cannot serve it.


@dataclass(frozen=True)
class Inputs:
    """bfloat16 tensors [batch, tokens, heads, head dim]; packed ones lack the first axis and have `offsets`."""

    q: Any
    k: Any
    v: Any
    offsets: Any = None
    dout: Any = None  # the gradient of the output, where one is taken


def make_inputs(row: Row, device: str) -> Inputs:
    import torch

    torch.manual_seed(row.tokens)

    def draw(tokens: int, heads: int) -> Any:
        return torch.randn(row.batch, tokens, heads, row.head_dim, device=device, dtype=torch.bfloat16)

    return Inputs(draw(row.num_queries, row.q_heads), draw(row.tokens, row.kv_heads), draw(row.tokens, row.kv_heads))


def make_packed_inputs(row: PackedRow, device: str) -> Inputs:
    import torch

    torch.manual_seed(row.head_dim)
    shape = (sum(row.lengths), row.heads, row.head_dim)
    q, k, v = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    return Inputs(q, k, v, torch.tensor(row.offsets, dtype=torch.int32, device=device))


def heed_call(row: Row, x: Inputs) -> Run:
    window = (row.window, 0) if row.window >= 0 else (-1, -1)
    return lambda: heed.flash_mha(x.q, x.k, x.v, is_causal=row.is_causal, window_size=window)


def heed_sm80_call(row: Row, x: Inputs) -> Run:
    """The portable kernel, whichever is the automatic choice."""
    window = (row.window, 0) if row.window >= 0 else (-1, -1)
    return lambda: heed.flash_mha(x.q, x.k, x.v, is_causal=row.is_causal, window_size=window, backend="sm80")


def kernel_of(row: Row, x: Inputs) -> str | None:
    """The automatic choice."""
    window = (row.window, 0) if row.window >= 0 else (-1, -1)
    return heed.explain(heed.flash_mha, x.q, x.k, x.v, is_causal=row.is_causal, window_size=window).chosen


def heed_full_causal_call(row: Row, x: Inputs) -> Run:
    """The window row without its window."""
    return lambda: heed.flash_mha(x.q, x.k, x.v, is_causal=True)


def heed_mha_call(row: Row, x: Inputs) -> Run:
    """The GQA row with as many KV heads as query heads."""
    k, v = (t.repeat_interleave(row.q_heads // row.kv_heads, dim=2) for t in (x.k, x.v))
    return lambda: heed.flash_mha(x.q, k, v, is_causal=row.is_causal)


def sdpa_call(backend: str) -> Callable[[Row, Inputs], Run]:
    """torch's scaled_dot_product_attention with one backend forced."""

    def make(row: Row, x: Inputs) -> Run:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        attend = torch.nn.functional.scaled_dot_product_attention
        mask: dict[str, Any] = {"is_causal": row.is_causal}
        if row.is_causal and row.num_queries != row.tokens:  # its own mask is aligned at the top left: one in memory
            seen = torch.ones(row.num_queries, row.tokens, dtype=torch.bool, device=q.device)
            mask = {"attn_mask": seen.tril(row.tokens - row.num_queries)}

        def run() -> Any:
            with sdpa_kernel(chosen):
                return attend(q, k, v, enable_gqa=row.q_heads != row.kv_heads, **mask)

        return run

    return make


def fa2_window_call(row: Row, x: Inputs) -> Run:
    """torch's FA2 by its own operator, since scaled_dot_product_attention has no windows."""
    import torch

    attend = torch.ops.aten._flash_attention_forward
    window = {"window_size_left": row.window, "window_size_right": 0}
    return lambda: attend(x.q, x.k, x.v, None, None, row.tokens, row.tokens, 0.0, True, False, **window)[0]


def fa2_few_call(row: Row, x: Inputs) -> Run:
    """torch's FA2 by its own operator, whose causal mask is aligned at the bottom right."""
    import torch

    attend, lengths = torch.ops.aten._flash_attention_forward, (row.num_queries, row.tokens)
    return lambda: attend(x.q, x.k, x.v, None, None, *lengths, 0.0, row.is_causal, False)[0]


def fa2_packed_call(row: PackedRow, x: Inputs) -> Run:
    """torch's FA2 on packed sequences, which takes the longest length from the host."""
    import torch

    attend, longest = torch.ops.aten._flash_attention_forward, max(row.lengths)
    causal = row.is_causal
    return lambda: attend(x.q, x.k, x.v, x.offsets, x.offsets, longest, longest, 0.0, causal, False)[0]


def heed_packed_call(row: PackedRow, x: Inputs) -> Run:
    return lambda: heed.flash_mha_varlen(x.q, x.k, x.v, x.offsets, is_causal=row.is_causal)


def heed_sm80_packed_call(row: PackedRow, x: Inputs) -> Run:
    return lambda: heed.flash_mha_varlen(x.q, x.k, x.v, x.offsets, is_causal=row.is_causal, backend="sm80")


_HEED = {"heed": heed_call, "heed sm80": heed_sm80_call}
_SDPA = {"cudnn": sdpa_call("CUDNN_ATTENTION"), "fa2": sdpa_call("FLASH_ATTENTION")}
CONTENDERS: Mapping[str, Mapping[str, Callable[[Row, Inputs], Run]]] = {
    "d128": {**_HEED, **_SDPA},
    "d64": {**_HEED, **_SDPA},
    "d256": {**_HEED, **_SDPA},
    "gqa": {**_HEED, "heed MHA": heed_mha_call, **_SDPA},
    "window": {**_HEED, "heed full causal": heed_full_causal_call, "fa2": fa2_window_call},
    "short": {**_HEED, **_SDPA},
    "few": {**_HEED, **_SDPA, "fa2": fa2_few_call},
}

# Pauses take most of a run's time: outside of D 128, those pause that a target speaks of.
_HOT_ONLY = ("heed sm80", "heed MHA", "fa2")


def hot_only(group: str) -> tuple[str, ...]:
    """Who of a group is timed hot alone."""
    return () if group == "d128" else _HOT_ONLY


# Whether heed's result is right: the tests' rule, on rows drawn at random.


def wrong_result(row: Row, x: Inputs, out: Any, num_rows: int = 64) -> str | None:
    """What is wrong with `out` on some query rows, or None. The oracle is float64, by torch, on the tensors' device."""
    import torch

    rng = np.random.default_rng(row.tokens + row.head_dim)
    group = row.q_heads // row.kv_heads
    found, oracle, naive = [], [], []
    for _ in range(num_rows):
        b, i, h = (int(rng.integers(size)) for size in (row.batch, row.num_queries, row.q_heads))
        first = max(0, i - row.window) if row.window >= 0 else 0
        last = row.tokens - row.num_queries + i + 1 if row.is_causal else row.tokens
        q, k, v = x.q[b, i, h], x.k[b, first:last, h // group], x.v[b, first:last, h // group]
        scale = 1 / math.sqrt(row.head_dim)
        weights = torch.softmax(k.double() @ q.double() * scale, 0)
        oracle.append((weights @ v.double()).cpu().numpy())
        rounded = torch.softmax((k.float() * q.float()).sum(-1) * scale, 0).to(v.dtype)
        naive.append((rounded.float()[:, None] * v.float()).sum(0).to(v.dtype).float().cpu().numpy())
        found.append(out[b, i, h].float().cpu().numpy())
    return verdict(found, naive, oracle, row.label)


def wrong_packed_result(row: PackedRow, x: Inputs, out: Any, num_rows: int = 64) -> str | None:
    """The same for packed sequences, each of which is a dense row of batch 1."""
    for begin, length in zip(row.offsets, row.lengths, strict=False):
        at = slice(begin, begin + length)
        one = Row("packed", length, row.heads, row.heads, row.head_dim, row.is_causal, batch_tokens=length)
        inputs = Inputs(x.q[None, at], x.k[None, at], x.v[None, at])
        wrong = wrong_result(one, inputs, out[None, at], max(4, num_rows // len(row.lengths)))
        if wrong:
            return f"the sequence at {begin}: {wrong}"
    return None


def verdict(found: Any, naive: Any, oracle: Any, what: str) -> str | None:
    """What the tests' rule says against a bfloat16 result, or None."""
    import ml_dtypes

    bfloat16 = ml_dtypes.bfloat16
    try:
        assert_close(np.array(found).astype(bfloat16), np.array(naive).astype(bfloat16), oracle, bfloat16, what)
    except AssertionError as error:
        return str(error)
    return None
