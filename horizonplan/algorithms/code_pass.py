"""A forward of the model, by its own code, in which layers hand on codes in place of their outputs.

What lies between two layers (nonlinearities, pooling, reshaping) is whatever the model does there. A recurrent layer
is run step by step, with a code at each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.code_layers import LINEAR, NORMS, activation, cell, cell_weights
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import handler, intercept

HandOn = Callable[[int, Tensor | None], Tensor]
Read = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]]


class _Done(BaseException):  # not an Exception: a model's own handlers let it pass
    """All that was wanted of a pass is known."""


class Dice:
    """Torch's generators as they are now, to draw the same numbers (dropout) in every pass over a batch.

    Args:
        cards: the CUDA devices in use.
    """

    def __init__(self, cards: Sequence[int] = ()) -> None:
        self.cpu = torch.get_rng_state()
        self.cards = [(device, torch.cuda.get_rng_state(device)) for device in cards]

    def rewind(self) -> None:
        """Bring them back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cards:
            torch.cuda.set_rng_state(state, device)


class CodePass:
    """One forward.

    Calls of layers are numbered as they come; a recurrent layer makes one for each time step.

    Args:
        chain: the model.
        layers: the modules that have codes, with their names.
        hand_on: from a call's number and prediction (``None`` where it was not wanted) to what the model goes on with.
        wanted: the calls whose predictions are computed; ``None``: all.
        normed: the calls whose output a normalisation takes at once; its output is the prediction then.
        read: from a call's number and arguments to what the call reads in their place.

    Attributes:
        modules: of each call so far.
        arguments: likewise what it read.
        predictions: those that were wanted, with their graphs.
    """

    def __init__(
        self,
        chain: Chain,
        layers: Mapping[nn.Module, str],
        hand_on: HandOn,
        wanted: Collection[int] | None = None,
        normed: Collection[int] = (),
        read: Read | None = None,
    ) -> None:
        self.chain, self.layers, self.hand_on = chain, layers, hand_on
        self.wanted, self.normed, self.read = wanted, normed, read
        self.modules: list[nn.Module] = []
        self.arguments: list[tuple[Tensor, ...]] = []
        self.predictions: dict[int, Tensor] = {}
        self._open: tuple[int, Tensor] | None = None  # a call that its normalisation is to close, and what it returned

    def run(self, batch: Any, last: int | None = None) -> Tensor | None:
        """The loss; ``None`` if the pass was to end after the call ``last``.

        Raises:
            ChainError: a recurrent layer is given something else than a batch of sequences.
        """
        self._last = last
        handlers = {m: handler(self._linear if isinstance(m, LINEAR) else self._recurrent, m) for m in self.layers}
        if self.normed:
            handlers |= {m: handler(self._norm, m) for m in self.chain.model.modules() if isinstance(m, NORMS)}
        with self.chain.running(), intercept(handlers):
            try:
                return self.chain.loss(batch)
            except _Done:
                return None

    def _call(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[int, tuple[Tensor, ...]]:
        """Note a call, and say what it reads."""
        number = len(self.modules)
        self.modules.append(module)
        if self.read is not None:
            arguments = self.read(number, arguments)
        self.arguments.append(arguments)
        return number, arguments

    def _needs(self, number: int) -> bool:
        return self.wanted is None or number in self.wanted

    def _linear(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Tensor:
        given = args[0] if args else kwargs["input"]
        number, (x,) = self._call(module, (given,))
        made = self._made(number, module, original, x)
        if number not in self.normed:
            return self._finish(number, made)
        raw = self.hand_on(number, None) if made is None else made  # of the same shape
        self._open = number, raw
        return raw

    def _made(self, number: int, module: nn.Module, original: Any, x: Tensor) -> Tensor | None:
        """A call's output, where it is wanted; random numbers are drawn in any case."""
        if self._needs(number):
            return original(x)  # type: ignore[no-any-return]
        if not _plain(module):
            with torch.no_grad():
                original(x)
        return None

    def _norm(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self._open is None or not args or args[0] is not self._open[1]:
            return original(*args, **kwargs)
        number, raw = self._open
        self._open = None
        return self._finish(number, self._made(number, module, original, raw))

    def _recurrent(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        x, h = (*args, *([kwargs["input"]] if "input" in kwargs else []), kwargs.get("hx"))[:2]
        if isinstance(module, nn.RNNCell):
            return self._time_step(module, x, _start(module, x, h, self.layers[module], 2))
        hidden = _start(module, x, h, self.layers[module], 3)
        hidden = hidden if h is None else hidden[0]
        outputs = []
        for x_t in x.unbind(1 if module.batch_first else 0):
            hidden = self._time_step(module, x_t, hidden)
            outputs.append(hidden)
        return torch.stack(outputs, 1 if module.batch_first else 0), hidden.unsqueeze(0)

    def _time_step(self, module: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
        number, arguments = self._call(module, (x, hidden))
        made = cell(module, *arguments) if self._needs(number) else None
        return activation(module)(self._finish(number, made))

    def _finish(self, number: int, prediction: Tensor | None) -> Tensor:
        if prediction is not None:
            self.predictions[number] = prediction
        if number == self._last:
            raise _Done
        return self.hand_on(number, prediction)


def _plain(module: nn.Module) -> bool:
    """Whether a call does what torch's own module does, which draws no random numbers."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module).__module__.startswith("torch.nn.modules.") and not hooked


def _start(module: nn.Module, x: Any, hidden: Any, name: str, dims: int) -> Tensor:
    """The hidden state before the first time step; zeros if none is given."""
    if not isinstance(x, Tensor) or x.ndim != dims:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        shape = "(B, D)" if dims == 2 else "(B, N, D) (batch_first) or (N, B, D)"
        raise ChainError(f"model: {name!r} reads {got}; alternating minimisation takes {shape}, not packed.")
    if hidden is not None:
        return hidden  # type: ignore[no-any-return]
    rows = x.shape[0] if dims == 2 or module.batch_first else x.shape[1]
    return x.new_zeros(rows, cell_weights(module)[1].shape[1])
