"""How tensors lie on devices, read from and written as XLA's shardings, and how an attention call can be divided."""

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

    devices: ids over [lead..., batch, shards of the KV heads, shards that share KV heads, manual, copies].
    layout: the axes of the call's tensors. A call without a batch axis has size 1 there.
    """

    devices: np.ndarray
    layout: axes.Layout

    @property
    def num_lead(self) -> int:
        return self.devices.ndim - 5

    @staticmethod
    def along(
        layout: axes.Layout, name: str, shape: Shape, tiling: Tiling, q_heads: int, kv_heads: int
    ) -> Split | None:
        """The division that follows one tensor's tiles. None if its heads cannot be divided so."""
        names = layout.names(name, len(shape))
        num_lead = layout.num_lead(name, len(shape))
        wanted = [f"lead{i}" for i in range(num_lead)] + ["batch", "q_heads" if "q_heads" in names else "kv_heads"]
        kept = [names.index(axis) if axis in names else None for axis in wanted]
        rest = [i for i in range(len(names)) if i not in kept]  # token axes of a result: the tiles hold the same rows
        rank = len(shape)
        devices = tiling.devices.transpose([*(i for i in kept if i is not None), rank, *rest, rank + 1])
        counts = [1 if i is None else tiling.tiles[i] for i in kept]
        ways = counts.pop()
        kv_ways = axes.kv_head_shards(q_heads, kv_heads, ways)
        if kv_ways is None or (wanted[-1] == "kv_heads" and kv_ways != ways):
            return None
        manual = tiling.devices.shape[-2]
        return Split(devices.reshape(*counts, kv_ways, ways // kv_ways, manual, -1), layout)

    def tiling(self, name: str, shape: Shape) -> Tiling:
        """How a tensor lies on the devices under this division."""
        lead = self.num_lead
        sources: dict[str, tuple[int, ...]] = {f"lead{i}": (i,) for i in range(lead)}
        sources |= {"batch": (lead,), "q_heads": (lead + 1, lead + 2), "kv_heads": (lead + 1,)}
        names = self.layout.names(name, len(shape))
        kept = [
            () if axis.startswith("lead") and size == 1 else sources.get(axis, ())
            for axis, size in zip(names, shape, strict=True)
        ]
        used = [i for group in kept for i in group]
        copies = [i for i in range(self.devices.ndim) if i not in used and i != lead + 3]
        tiles = [math.prod(self.devices.shape[i] for i in group) for group in kept]
        devices = self.devices.transpose([*used, lead + 3, *copies])
        return Tiling(devices.reshape(*tiles, self.devices.shape[lead + 3], -1))

    def kv_head_sharers(self) -> np.ndarray | None:
        """The groups of devices that have different query heads of one and the same KV head, [groups, devices].

        None: no two devices do.
        """
        ways = self.devices.shape[self.num_lead + 2]
        if ways == 1:
            return None
        return np.moveaxis(self.devices, self.num_lead + 2, -1).reshape(-1, ways)
