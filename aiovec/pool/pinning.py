"""Pinned memory: what a CUDA device reads by itself, so that `tensor.to("cuda", non_blocking=True)` really does not block.

Registered with the CUDA driver where it lies, through PyTorch, once for each strip, and taken back before it is unmapped.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pin"]

_pinned: set[int] = set()  # addresses


def pin(memory: npt.NDArray[np.uint8]) -> None:
    """Pins memory until the last array over it is gone; nothing if it is pinned already. May take long.

    Raises:
        RuntimeError: There is no PyTorch, or it has no CUDA device, or that refuses the memory.
    """
    address = memory.ctypes.data
    if address in _pinned:
        return
    cudart = _cudart()
    error = cudart.cudaHostRegister(address, memory.nbytes, 0)
    if error != cudart.cudaError.success:
        raise RuntimeError(f"pin_memory=True: CUDA did not pin {memory.nbytes:,} bytes: {error}")
    _pinned.add(address)
    # Arrays that were lent hold this one, whose end comes before that of its mapping.
    weakref.finalize(memory, _unpin, cudart, address).atexit = False


def _cudart() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise RuntimeError("pin_memory=True: there is no PyTorch here, which does it. Leave it out.") from error
    if not torch.cuda.is_available():
        raise RuntimeError("pin_memory=True: PyTorch finds no CUDA device here. Leave it out.")
    return torch.cuda.cudart()


def _unpin(cudart: Any, address: int) -> None:
    _pinned.discard(address)
    cudart.cudaHostUnregister(address)
