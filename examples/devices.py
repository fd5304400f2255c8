"""Where an example runs: on a GPU if JAX has one and heed serves the model's attention there, else on the CPU."""

from __future__ import annotations

import contextlib
import os

import jax
import numpy as np

import heed
from llama import LlamaConfig


class NoDeviceError(RuntimeError):
    """The device that was asked for is not there, or heed has no kernel for it."""


def explain(config: LlamaConfig, device: jax.Device) -> heed.Explanation:
    """Which kernel serves the model's attention calls on the device."""
    q, kv = (
        jax.device_put(np.zeros((1, 64, num_heads, config.head_dim), np.float32), device)
        for num_heads in (config.num_q_heads, config.num_kv_heads)
    )
    return heed.explain(heed.flash_mha, q, kv, kv, is_causal=True)


def choose_device(wanted: str, config: LlamaConfig) -> tuple[jax.Device, str]:
    """The device to run on ("auto", "cpu" or "gpu" is wanted) and heed's kernel there."""
    candidates = []
    if wanted in ("auto", "gpu"):
        with contextlib.suppress(RuntimeError):  # JAX without CUDA
            candidates += jax.devices("cuda")[:1]
    if wanted in ("auto", "cpu"):
        candidates += jax.devices("cpu")[:1]
    reasons = ["JAX sees none"]
    for device in candidates:
        found = explain(config, device)
        if found.chosen is not None:
            return device, found.chosen
        reasons = [f"{name}: {reason}" for name, reason in found.reasons.items()]
    raise NoDeviceError(f"got --device {wanted}, expected one that heed serves: {'; '.join(reasons)}")


def describe_device(device: jax.Device) -> str:
    """What a person calls it, such as "NVIDIA H200" or "2 CPU cores"."""
    return f"{len(os.sched_getaffinity(0))} CPU cores" if device.platform == "cpu" else device.device_kind
