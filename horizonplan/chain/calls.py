"""Take over module calls for the length of a ``with`` block, and keep side effects out of it.

``nn.Module.__call__`` looks up ``_compiled_call_impl`` on the instance before anything else, so an
entry there sees the arguments that the model itself passes, before any hook fires, and decides
whether (and how often) the module really runs. ``forward`` and the hooks are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Original = Callable[..., Any]
Handler = Callable[[Original, tuple[Any, ...], dict[str, Any]], Any]

ENTRY = "_compiled_call_impl"  # where a module keeps what torch.compile made of its call
_MISSING = object()


@contextmanager
def intercept(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Route ``module(*args, **kwargs)`` to ``handlers[module](original, args, kwargs)``; always restored."""
    saved = {module: module.__dict__.get(ENTRY, _MISSING) for module in handlers}
    try:
        for module, handler in handlers.items():
            entry = saved[module]
            original = module._call_impl if entry is _MISSING or entry is None else entry
            module.__dict__[ENTRY] = _Entry(handler, getattr(original, "original", original))
        yield
    finally:
        for module, entry in saved.items():
            if entry is _MISSING:
                module.__dict__.pop(ENTRY, None)
            else:
                module.__dict__[ENTRY] = entry


class _Entry:
    """A handler in place of a call; a second ``intercept`` inside finds the model's own call behind it."""

    def __init__(self, handler: Handler, original: Original) -> None:
        self.handler, self.original = handler, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.original, args, kwargs)


Buffers = list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]


def buffers_of(modules: Iterable[nn.Module]) -> Buffers:
    """The modules' own buffers (children not included): where each is kept, its name, and itself."""
    return [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]


@contextmanager
def scratch_buffers(modules: Iterable[nn.Module], earlier: Buffers | None = None) -> Iterator[None]:
    """Let the modules work on copies of their own buffers, or of ``earlier`` values; the real ones come back."""
    modules = list(modules)
    saved = [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]
    try:
        for owner, name, buffer in (*buffers_of(modules), *(earlier or [])):
            owner[name] = buffer.clone()
        yield
    finally:
        for owner, buffers in saved:
            owner.clear()
            owner.update(buffers)


class BufferLog:
    """Values of the modules' buffers now, to find out later which of them have changed since."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.noted = [(*entry, entry[2]._version, entry[2].clone()) for entry in buffers_of(modules)]

    def changed(self) -> Buffers:
        """The earlier values of those that have changed."""
        return [
            (o, name, value) for o, name, b, version, value in self.noted if o[name] is not b or b._version != version
        ]


@contextmanager
def regrouped(container: nn.Module | None, groups: Mapping[str, nn.Module]) -> Iterator[None]:
    """Give an ``nn.Sequential`` other children for a while (groups of its own ones)."""
    if container is None:
        yield
        return
    children = container._modules
    try:
        container._modules = dict(groups)
        yield
    finally:
        container._modules = children


@contextmanager
def without_cache(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch ``config.use_cache`` off: a key/value cache is of no use in training and would outlive the graphs."""
    every: list[Any] = [getattr(m, "config", None) for m in modules]
    configs = {id(c): c for c in every if getattr(c, "use_cache", False) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def rng_devices(model: nn.Module) -> list[int]:
    """CUDA devices whose random state the model's operations may advance."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def seeded(seed: int, devices: Sequence[int]) -> Iterator[None]:
    """Torch's generators of the CPU and of these CUDA devices seeded, and brought back; no other is touched."""
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


class Ambient:
    """The autocast state at one moment, to run something under it later (or with autocast off)."""

    def __init__(self) -> None:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        self.states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self, cache: bool = True) -> Iterator[None]:
        """Run under this state. ``cache=False``: no cast of a weight outlives one operation."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    caching = self.cache and cache
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=caching))
            yield

    @staticmethod
    @contextmanager
    def off() -> Iterator[None]:
        """Run without autocast, as backward passes should."""
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


@contextmanager
def training_mode(model: nn.Module, training: bool = True) -> Iterator[None]:
    """A model in train (or eval) mode, every module's own mode restored afterwards.

    A model that is in train mode already stays as it is, so that parts kept in eval mode (frozen
    BatchNorm) stay there.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        if model.training != training:
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def quiet(model: nn.Module) -> ExitStack:
    """A context for trial forwards: random state, buffers and cache flags are as before when it ends.

    Compiled blocks run eagerly in it, so that watching their insides does not recompile them.
    """
    stack = ExitStack()
    if any(m.__dict__.get(ENTRY) is not None for m in model.modules()):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    stack.enter_context(torch.random.fork_rng(devices=rng_devices(model)))
    stack.enter_context(scratch_buffers(model.modules()))
    stack.enter_context(without_cache(model.modules()))
    stack.enter_context(Ambient().restored(cache=False))  # a cached cast of a weight would link one block to another
    return stack


def finite(tensor: Tensor) -> bool | None:
    """Whether all values are finite; ``None`` for a tensor that stands for a shape and has none."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    return bool(torch.isfinite(tensor).all())


def handler(function: Callable[..., Any], *bound: Any) -> Handler:
    """Bind leading arguments of a handler (a block's index, say)."""
    return partial(function, *bound)
