"""The state of every generator that a training run may draw from, as values that a checkpoint can hold.

These are the global ones of torch (CPU and CUDA devices), Python's ``random`` and NumPy, and any others that
are named. A state consists of tensors, numbers, strings, tuples, lists and dicts, so that
``torch.load(..., weights_only=True)`` reads it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
GENERATOR_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def capture(devices: Sequence[int] = (), generators: Sequence[Generator] = ()) -> dict[str, Any]:
    """The present state of the global generators, of those of these CUDA devices, and of ``generators``."""
    return {
        "torch": torch.default_generator.get_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in devices],
        "python": random.getstate(),
        "numpy": _as_tensors(np.random.get_state(legacy=False)),
        "generators": [_state_of(generator) for generator in generators],
    }


def restore(state: dict[str, Any], devices: Sequence[int] = (), generators: Sequence[Generator] = ()) -> None:
    """Bring all generators into a state that :func:`capture` returned.

    Args:
        state: from ``capture``, perhaps in another process.
        devices: as many as were captured, in the same order; their numbers may differ.
        generators: likewise.

    Raises:
        ValueError: there are more or fewer of them than in the state.
    """
    for name, given, kept in (("devices", devices, state["cuda"]), ("generators", generators, state["generators"])):
        if len(given) != len(kept):
            raise ValueError(f"{name}: {len(given)} given, the random state has {len(kept)}; give as many.")
    torch.default_generator.set_state(state["torch"])
    for device, kept in zip(devices, state["cuda"], strict=True):
        torch.cuda.set_rng_state(kept, device)
    random.setstate(state["python"])
    np.random.set_state(_as_arrays(state["numpy"]))
    for generator, kept in zip(generators, state["generators"], strict=True):
        _set_state(generator, kept)


@contextmanager
def seeded_all(seed: int, devices: Sequence[int] = ()) -> Iterator[None]:
    """The global generators and those of these CUDA devices seeded, and brought back afterwards."""
    before = capture(devices)
    try:
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        restore(before, devices)


class Isolated:
    """Random numbers of its own for code that draws from the global generators.

    What runs under ``drawing()`` goes on where the last such block stopped, whatever was drawn outside in
    between; and outside nothing is noticed of it.

    >>> own = Isolated(seed=3)
    >>> with own.drawing():
    ...     first = torch.rand(2)
    >>> outside = torch.rand(5)
    >>> with own.drawing():
    ...     second = torch.rand(2)
    >>> with seeded_all(3):
    ...     torch.equal(torch.rand(2), first) and torch.equal(torch.rand(2), second)
    True
    """

    def __init__(self, seed: int, devices: Sequence[int] = ()) -> None:
        self.devices = devices
        self._bits = type(_bit_generator())()
        with seeded_all(seed, devices):
            self._torch, self._python, self._numpy = self._drawn()
        self._bits.state = self._numpy

    @property
    def state(self) -> dict[str, Any]:
        """The state of these random numbers, as :func:`capture` has it."""
        (cpu, *cuda), numpy = self._torch, _as_tensors(self._numpy)
        return {"torch": cpu, "cuda": cuda, "python": self._python, "numpy": numpy, "generators": []}

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The global generators in the state of this object's."""
        outside, bits = self._drawn(), _bit_generator()
        self._set(self._bits, self._torch, self._python, self._numpy)
        try:
            yield
        finally:
            self._torch, self._python, self._numpy = self._drawn()
            self._set(bits, *outside)

    def _drawn(self) -> tuple[list[Tensor], Any, Any]:
        states = [torch.default_generator.get_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]
        return states, random.getstate(), np.random.get_state(legacy=False)

    def _set(self, bits: Any, states: list[Tensor], python: Any, numpy: Any) -> None:
        """Set the global generators; NumPy's is exchanged, and set only where that has lost half of a normal pair."""
        torch.default_generator.set_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(python)
        np.random.set_bit_generator(bits)  # type: ignore[attr-defined]  # which its stubs do not know
        if numpy["has_gauss"]:
            np.random.set_state(numpy)


def _bit_generator() -> Any:
    return np.random.get_bit_generator()  # type: ignore[attr-defined]


def mixed(*parts: int) -> int:
    """A seed of 32 bits for a tuple of numbers: another one, unrelated, when any of them changes."""
    return random.Random(repr(parts)).getrandbits(32)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _as_tensors(generator.get_state(legacy=False))
    return _as_tensors(generator.bit_generator.state)


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_as_arrays(state))
    else:
        generator.bit_generator.state = _as_arrays(state)


def _as_tensors(state: Any) -> Any:
    """A NumPy state with tensors in place of arrays; the integers of some generators have 128 bits."""
    if isinstance(state, dict):
        return {name: _as_tensors(value) for name, value in state.items()}
    return torch.from_numpy(state.copy()) if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _as_arrays(value) for name, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state
