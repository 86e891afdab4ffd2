"""Memory is pinned once and taken back before it is unmapped: with a driver that only takes notes, since CI has no device."""

from __future__ import annotations

import gc
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aiovec.pool.pinning import pin


class Driver(ModuleType):
    """PyTorch as far as it is asked here."""

    def __init__(self, *, has_device: bool = True, refuses: bool = False) -> None:
        super().__init__("torch")
        self.told: list[Any] = []
        result = "out of memory" if refuses else "success"

        def register(address: int, nbytes: int, flags: int) -> str:
            self.told.append(("register", address, nbytes, flags))
            return result

        runtime = SimpleNamespace(
            cudaError=SimpleNamespace(success="success"),
            cudaHostRegister=register,
            cudaHostUnregister=lambda address: self.told.append(("unregister", address)),
        )
        self.cuda = SimpleNamespace(is_available=lambda: has_device, cudart=lambda: runtime)


def test_pinned_once_and_until_the_last_array_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "torch", driver)
    memory = np.zeros(4096, np.uint8)
    address = memory.ctypes.data
    pin(memory)
    pin(memory)
    assert driver.told == [("register", address, 4096, 0)]
    kept = memory[100:]
    del memory
    gc.collect()
    assert len(driver.told) == 1
    del kept
    assert driver.told[1:] == [("unregister", address)]


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (Driver(has_device=False), "PyTorch finds no CUDA device"),
        (Driver(refuses=True), "CUDA did not pin 16 bytes: out of memory"),
        (None, "there is no PyTorch"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, driver: Any, message: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", driver)
    with pytest.raises(RuntimeError, match=message):
        pin(np.zeros(16, np.uint8))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch, and a CUDA device")
def test_on_a_device() -> None:
    """The real one, where there is one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    memory = np.zeros(1 << 20, np.uint8)
    pin(memory)
    assert torch.from_numpy(memory).is_pinned()
