"""A model without memory: shapes in place of values, to predict a step on a CUDA card on any machine.

Parameters, buffers and batch become fake tensors (``torch._subclasses.fake_tensor``): every operator
computes shapes and allocates nothing, so a model of any size, on device ``meta`` too, runs forward
and backward in seconds under :class:`horizonplan.probes.LiveBytes`. The fakes live on device ``cpu``
(fake CUDA tensors cannot run a backward without a card), so operators that keep something else for
their backward on CUDA than on CPU are replaced by ones that keep the same as CUDA's kernels do.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from horizonplan.batch import mapped
from horizonplan.probes.budget import on_host
from horizonplan.probes.steady import Optimize, check_optimizer, like, optimizer_for

_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SMALL = 2**24  # numbers
_FACTORIES = (torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.full)


class SimulationError(ValueError):
    """The model asks for values, which a simulation does not have; the message names the place."""


class Simulation:
    """What stands for a model's tensors while it is simulated."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Any, Tensor]] = {}
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def twin(self, tensor: Tensor) -> Tensor:
        """The fake in place of a tensor; tensors that share memory have fakes that do."""
        if id(tensor) not in self._twins:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = (storage, torch.empty(storage.nbytes(), dtype=torch.uint8))
            flat = self._storages[storage._cdata][1].view(tensor.dtype)
            fake = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            self._twins[id(tensor)] = (tensor, fake)
        return self._twins[id(tensor)][1]

    def batch(self, batch: Any) -> Any:
        """The batch as fakes; small tensors of integers keep their values, if they have any."""
        return mapped(batch, lambda t: t.cpu() if _is_small_integer(t) and not t.is_meta else self.twin(t))

    def optimizer(self, optimizer: Optimize | None) -> Callable[[Any], Optimizer]:
        """How to make the user's optimiser over fakes, with the temporaries that it has on CUDA."""

        def make(parameters: Any) -> Optimizer:
            given = optimizer
            if isinstance(given, Optimizer):
                groups = [
                    {**group, "params": [self._twins[id(p)][1] for p in group["params"] if id(p) in self._twins]}
                    for group in given.param_groups
                ]
                if not any(group["params"] for group in groups):
                    check_optimizer(given, parameters, given)  # of another model, and this says so
                made = like(given, groups)
            else:
                made = optimizer_for(parameters, given)
            return all_at_once(made)

        return make


def all_at_once(optimizer: Optimizer) -> Optimizer:
    """The optimiser with ``foreach`` where the user left that open: the default on CUDA, and not on CPU."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


@contextmanager
def simulated(model: nn.Module, cuda: bool = True) -> Iterator[Simulation]:
    """Replace a model's tensors by fakes for the length of a ``with`` block; the model itself is not touched.

    Args:
        model: on any device, ``meta`` included.
        cuda: keep for the backward what CUDA's kernels keep (``False``: what the CPU's keep).

    Raises:
        SimulationError: the model's flow depends on values (``.item()``, boolean indexing), or an
            operator has no fake.
    """
    simulation, saved = Simulation(), []
    homes: list[dict[str, Any]] = [d for m in model.modules() for d in (m._parameters, m._buffers, vars(m))]
    try:
        with _unlogged(), on_host(), FakeTensorMode(allow_non_fake_inputs=True):
            for home in homes:
                for name, value in list(home.items()):
                    if isinstance(value, Tensor):
                        saved.append((home, name, value))
                        home[name] = simulation.twin(value)
            integers: Any = _IntegersAreReal()  # type: ignore[no-untyped-call]
            with integers, _as_on_cuda() if cuda else nullcontext():
                yield simulation
    except Exception as error:
        cause = _first_cause(error)
        if not isinstance(cause, _NEEDS_VALUES):
            raise
        raise SimulationError(
            f"model: {_place(cause)} needs values ({type(cause).__name__}: {cause}), and a simulation has shapes only; "
            "remove the dependence on values, or measure on a device."
        ) from error
    finally:
        for home, name, value in saved:
            home[name] = value


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging a traceback of its own where fake tensors fit no operator: the error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _IntegersAreReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Small tensors of integers and booleans keep their values: positions, masks, lengths, tokens.

    Models branch on them ("does this mask hide anything?"), and what they decide is then what they decide
    in a real step. What is computed from them and from fakes together is fake.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) or t.is_meta for t in given):
            return func(*args, **kwargs)
        if not (all(map(_is_small_integer, given)) if given else _makes_small_integers(func, args, kwargs)):
            return func(*args, **kwargs)
        with on_host():
            return func(*args, **kwargs)


def _is_small_integer(tensor: Tensor) -> bool:
    return tensor.dtype in _INTEGERS and tensor.numel() <= _SMALL


def _makes_small_integers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function without tensors among its arguments returns a small tensor of integers."""
    kind, dtype = getattr(func, "overloadpacket", None), kwargs.get("dtype")
    if kind is torch.ops.aten.arange:
        whole = all(isinstance(a, int) for a in args)
        return whole and dtype in (None, *_INTEGERS) and max(map(abs, args), default=0) <= _SMALL
    sizes = args[0] if args and isinstance(args[0], list | tuple) else None
    if kind not in _FACTORIES or sizes is None or not all(isinstance(n, int) for n in sizes):
        return False
    filled = type(args[1]) if kind is torch.ops.aten.full and dtype is None else None
    return (dtype in _INTEGERS or filled in (int, bool)) and math.prod(sizes) <= _SMALL


_DROPOUT, _ATTENTION, _RMS_NORM = F.dropout, F.scaled_dot_product_attention, F.rms_norm
_AUTOCAST = torch.autocast.__init__


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or not 0 < p < 1:
        return _DROPOUT(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
) -> Tensor:
    return _ATTENTION(query, key, value, attn_mask, 0.0, *args, **kwargs)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    return torch.native_layer_norm(input, list(normalized_shape), weight, None, 1e-6 if eps is None else eps)[0]


def _autocast(self: torch.autocast, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
    if device_type == "cuda":
        device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
    _AUTOCAST(self, device_type, dtype, *args, **kwargs)


_REPLACED = {
    F.dropout: _dropout,
    torch.dropout: lambda input, p, train: _dropout(input, p, train),
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}


class _KeepsAsCuda(TorchFunctionMode):
    """Operators that keep for their backward what CUDA's kernels keep.

    Dropout keeps a mask of one byte an element (on CPU: of the input's type). Attention with dropout
    stays fused and draws its mask again (on CPU: the whole matrix of scores). RMSNorm keeps its input
    and a number a row, as LayerNorm does (on CPU: several tensors of the input's size).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """CUDA's terms: its kernels, its autocast, and recurrent layers whose states show.

    The replaced functions are also put where torch's own Python looks for them (inside
    ``multi_head_attention_forward`` no function mode is active).
    """
    places: list[tuple[Any, str, Any]] = [
        (F, "dropout", _dropout),
        (F, "scaled_dot_product_attention", _attention),
        (F, "rms_norm", _rms_norm),
        (torch.autocast, "__init__", _autocast),
        (torch.backends.mkldnn, "enabled", False),  # its LSTM's fake keeps nothing; step by step, gates and cells show
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        with _KeepsAsCuda():
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _first_cause(error: BaseException) -> BaseException:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _place(error: BaseException) -> str:
    """The innermost line that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/horizonplan/" not in f.filename]
    frame = own[-1] if own else frames[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line or frame.name})"
