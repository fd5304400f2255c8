"""How tensors lie on devices, read from and written as XLA's shardings, and how a call can be divided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxlib import xla_client

from heed._jax import axes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """Which device holds which tile of a tensor.

    devices: ids, with one axis per axis of the tensor, then one over manual mesh axes, then one over copies.
    """

    devices: np.ndarray

    @property
    def tiles(self) -> Shape:
        return self.devices.shape[:-2]

    @staticmethod
    def whole(rank: int, num_devices: int) -> Tiling:
        return Tiling(np.arange(num_devices).reshape((1,) * (rank + 1) + (num_devices,)))

    @staticmethod
    def parse(sharding: Any, rank: int) -> Tiling | None:
        """None: every device holds everything."""
        if not sharding.is_tiled():
            return None
        devices = np.asarray(sharding.tile_assignment_devices()).reshape(sharding.tile_assignment_dimensions())
        kinds = list(sharding.subgroup_types())
        if not kinds and sharding.replicate_on_last_tile_dim():
            kinds = [xla_client.OpSharding.Type.REPLICATED]
        manual = [rank + i for i, kind in enumerate(kinds) if kind == xla_client.OpSharding.Type.MANUAL]
        copies = [rank + i for i, kind in enumerate(kinds) if kind == xla_client.OpSharding.Type.REPLICATED]
        if len(manual) + len(copies) != devices.ndim - rank:
            raise ValueError(f"heed: cannot read the sharding {sharding}: pass operands that are not unreduced")
        counts = [math.prod(devices.shape[i] for i in group) for group in (manual, copies)]
        devices = devices.transpose([*range(rank), *manual, *copies])
        return Tiling(devices.reshape(*devices.shape[:rank], *counts))

    def to_xla(self) -> Any:
        num_manual, num_copies = self.devices.shape[-2:]
        if num_manual == 1 and math.prod(self.tiles) == 1:
            return xla_client.HloSharding.replicate()
        kinds = xla_client.OpSharding.Type
        proto = xla_client.OpSharding()
        proto.type = kinds.OTHER
        proto.tile_assignment_dimensions = list(self.tiles)
        if num_manual > 1:
            proto.tile_assignment_dimensions = list(self.devices.shape)
            proto.last_tile_dims = [kinds.MANUAL, kinds.REPLICATED]
        elif num_copies > 1:
            proto.tile_assignment_dimensions = [*self.tiles, num_copies]
            proto.replicate_on_last_tile_dim = True
        proto.tile_assignment_devices = self.devices.reshape(-1).tolist()
        return xla_client.HloSharding.from_proto(proto)

    def covers(self, other: Tiling, shape: Shape) -> bool:
        """Whether every device's tile here contains its tile there, so that cutting it out needs no communication."""
        for axis, size in enumerate(shape):
            first, last = self._range(axis, size)
            other_first, other_last = other._range(axis, size)
            if ((other_last > other_first) & ((other_first < first) | (other_last > last))).any():
                return False
        return True

    def _range(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Per device, the elements of an axis that it holds."""
        chunk = -(-size // self.tiles[axis])
        index = np.empty(self.devices.size, dtype=np.int64)
        index[self.devices.reshape(-1)] = np.indices(self.devices.shape)[axis].reshape(-1)
        return np.minimum(index * chunk, size), np.minimum((index + 1) * chunk, size)


@dataclass(frozen=True)
class Split:
    """One way to divide the call.

    devices: ids over [lead..., divisible..., shards of both kinds of heads, of query heads only, of KV heads only,
        manual, copies], where `layout.divisible` are axes such as the batch. Shards of query heads only share KV heads.
    layout: the axes of the call's tensors.
    """

    devices: np.ndarray
    layout: axes.Layout

    @property
    def num_lead(self) -> int:
        return self.devices.ndim - 5 - len(self.layout.divisible)

    @staticmethod
    def along(
        layout: axes.Layout, name: str, shape: Shape, tiling: Tiling, num_heads: tuple[int, int], kv_tiles: int
    ) -> list[Split]:
        """The divisions that follow one tensor's tiles, best first; none if its heads cannot be divided so.

        num_heads: of q and of k. kv_tiles: into how many k lies divided.
        """
        names = layout.names(name, len(shape))
        num_lead = layout.num_lead(name, len(shape))
        heads = "q_heads" if "q_heads" in names else "kv_heads"
        wanted = [*(f"lead{i}" for i in range(num_lead)), *layout.divisible, heads]
        kept = [names.index(axis) if axis in names else None for axis in wanted]
        rest = [i for i in range(len(names)) if i not in kept]  # token axes of a result: the tiles hold the same rows
        rank = len(shape)
        devices = tiling.devices.transpose([*(i for i in kept if i is not None), rank, *rest, rank + 1])
        counts = [1 if i is None else tiling.tiles[i] for i in kept]
        ways = counts.pop()
        manual = tiling.devices.shape[-2]
        return [
            Split(devices.reshape(*counts, *shards, manual, -1), layout)
            for shards in _head_shards(layout, heads == "q_heads", ways, num_heads, kv_tiles)
        ]

    def tiling(self, name: str, shape: Shape) -> Tiling:
        """How a tensor lies on the devices under this division."""
        kept = self._sources(name, shape)
        used = [i for group in kept for i in group]
        manual = self.devices.ndim - 2
        copies = [i for i in range(self.devices.ndim) if i not in used and i != manual]
        tiles = [math.prod(self.devices.shape[i] for i in group) for group in kept]
        devices = self.devices.transpose([*used, manual, *copies])
        return Tiling(devices.reshape(*tiles, self.devices.shape[manual], -1))

    def _sources(self, name: str, shape: Shape) -> list[tuple[int, ...]]:
        """For each axis of a tensor, the axes of `devices` that divide it."""
        heads = self.devices.ndim - 5
        divided = [*(f"lead{i}" for i in range(self.num_lead)), *self.layout.divisible]
        sources: dict[str, tuple[int, ...]] = {axis: (i,) for i, axis in enumerate(divided)}
        sources |= {"q_heads": (heads, heads + 1), "kv_heads": (heads, heads + 2)}
        names = self.layout.names(name, len(shape))
        return [
            () if axis.startswith("lead") and size == 1 else sources.get(axis, ())
            for axis, size in zip(names, shape, strict=True)
        ]

    def sharers(self, name: str, shape: Shape) -> np.ndarray | None:
        """The groups of devices that have parts of one and the same tile of a sum, [groups, devices].

        Such as those with different query heads of one KV head, whose gradient is the sum. None: no two devices do.
        """
        used = {i for group in self._sources(name, shape) for i in group}
        summed = [i for i in range(self.num_lead, self.devices.ndim - 2) if i not in used]
        ways = math.prod(self.devices.shape[i] for i in summed)
        if ways == 1:
            return None
        rest = [i for i in range(self.devices.ndim) if i not in summed]
        return self.devices.transpose([*rest, *summed]).reshape(-1, ways)


def _head_shards(
    layout: axes.Layout, are_q_heads: bool, ways: int, num_heads: tuple[int, int], kv_tiles: int
) -> list[tuple[int, int, int]]:
    """The shards (of both kinds of heads, of query heads only, of KV heads only) that cut one kind `ways` ways."""
    if layout.heads_are_tied:
        kv_ways = axes.kv_head_shards(*num_heads, ways)
        if kv_ways is None or (kv_ways != ways and not are_q_heads):
            return []
        return [(kv_ways, ways // kv_ways, 1)]
    if not are_q_heads:
        return [(1, 1, ways)]
    return [(shared, ways // shared, 1) for shared in dict.fromkeys((kv_tiles, 1)) if ways % shared == 0]
