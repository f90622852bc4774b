"""Lets unmodified megatron-core train where there is no CUDA. Used by `mcore.py` alone.

megatron-core 0.16 – 0.19 names CUDA literally in about a dozen modules. `redirect_to_cpu` points those names at the
CPU; on a machine with CUDA nothing is touched. A global `TorchFunctionMode` for everything would be shorter but is
inactive inside backward, so only the optimizer and checkpoint code, which never differentiates, runs under one.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

# Modules that pass the literal device="cuda" to a factory function on the training path.
_LITERAL_CUDA = (
    "pipeline_parallel.schedules",
    "transformer.utils",
    "optimizer.clip_grads",
    "optimizer.optimizer",
    "optimizer.grad_scaler",
    "tensor_parallel.data",
    "utils",
    "dist_checkpointing.mapping",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)


def redirect_to_cpu() -> None:
    """Point megatron-core's uses of CUDA at the CPU; calling it again changes nothing."""
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = lambda seed: None
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    mcore_random._CUDA_RNG_STATE_TRACKER = _CpuRngTracker()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    proxy = _TorchWithoutCuda()
    for name in _LITERAL_CUDA:
        with contextlib.suppress(ImportError):  # not every version has every module
            importlib.import_module(f"megatron.core.{name}").torch = proxy  # type: ignore[attr-defined]


class TypeNamesMode(torch.overrides.TorchFunctionMode):
    """Tensors report CUDA type names: megatron-core's optimizers compare with 'torch.cuda.FloatTensor' as a string."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = _on_cpu(kwargs or {})
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _TorchWithoutCuda(types.ModuleType):
    """The module `torch`, except that factory functions put device='cuda' on the CPU."""

    _FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "empty_like", "zeros_like")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self._FACTORIES:
            setattr(self, name, self._redirected(getattr(torch, name)))

    @staticmethod
    def _redirected(factory: Any) -> Any:
        return lambda *args, **kwargs: factory(*args, **_on_cpu(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": _CPU} if str(kwargs.get("device")).startswith("cuda") else kwargs


class _NoStream:
    """What megatron-core does with a CUDA stream, done by nobody."""

    def wait_event(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _CpuRngTracker:
    """`CudaRNGStatesTracker` on the one CPU generator."""

    use_cudagraphable_rng = False

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        return bool(self.states_)

    def reset(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self._forked: str | None = None

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Run a block on the stream `name`; a nested fork continues the outer stream afterwards."""
        outside, outer = torch.get_rng_state(), self._forked
        if outer is not None:
            self.states_[outer] = outside
        torch.set_rng_state(self.states_[name])
        self._forked = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside if outer is None else self.states_[outer])
            self._forked = outer
