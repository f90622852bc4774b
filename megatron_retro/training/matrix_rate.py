"""The rate of a square matrix product: what the arithmetic of a step is measured by."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_SECONDS = 0.3  # after which a measurement ends, or after five


def matrix_product(dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """(a square matrix product large enough to run at this device's rate, its FLOPs)."""
    gpu = torch.cuda.is_available()
    size, times = (8192, 4) if gpu else (1024, 8)
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda" if gpu else "cpu") for _ in range(2))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return multiply, 2.0 * times * size**3


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of `matrix_product` on this rank's device while the other ranks of the run multiply too."""
    multiply, flop = matrix_product(dtype)
    multiply()  # warm up
    if dist.is_initialized():
        dist.barrier()
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < _SECONDS:
        synchronize()
        begin = time.perf_counter()
        multiply()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return flop / statistics.median(seconds)


def synchronize() -> None:
    """Wait for what this process has asked of its GPU, if it has one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
