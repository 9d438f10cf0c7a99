"""Where the state sits in a block's arguments and in its output.

A block takes its state as one of its arguments and returns it alone or as the first tensor of a
tuple, list, dict or ``ModelOutput``. Everything else in the output is no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

STATE_NAMES = ("hidden_states", "hidden_state", "x", "input", "inputs", "src")


@dataclass(frozen=True)
class Slot:
    """An argument's place: a position, or a name."""

    key: int | str

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument there."""
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]

    def put(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another value there."""
        if isinstance(self.key, int):
            return (*args[: self.key], value, *args[self.key + 1 :]), kwargs
        return args, {**kwargs, self.key: value}


def candidates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Slot]:
    """Places of tensor arguments, likeliest state first."""
    named = sorted(kwargs, key=lambda name: STATE_NAMES.index(name) if name in STATE_NAMES else len(STATE_NAMES))
    keys: list[int | str] = [*range(len(args)), *named]
    return [slot for slot in map(Slot, keys) if isinstance(slot.get(args, kwargs), Tensor)]


@dataclass(frozen=True)
class Output:
    """A block's output taken apart: its leaves, and which one is the state."""

    leaves: tuple[Any, ...]
    spec: TreeSpec
    index: int

    @classmethod
    def of(cls, value: Any) -> Output | None:
        """Take an output apart; ``None`` if there is no tensor in it."""
        leaves, spec = tree_flatten(value)
        index = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        return None if index is None else cls(tuple(leaves), spec, index)

    @property
    def state(self) -> Tensor:
        """The state."""
        return self.leaves[self.index]  # type: ignore[no-any-return]

    def rebuild(self, state: Tensor, others: Callable[[Tensor], Any]) -> Any:
        """The same structure around another state; ``others`` maps the remaining tensors."""
        leaves = [others(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        leaves[self.index] = state
        return tree_unflatten(leaves, self.spec)

    def detached(self) -> Output:
        """The structure with its other tensors cut off, and no state."""
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        leaves[self.index] = None
        return Output(tuple(leaves), self.spec, self.index)

    def skeleton(self) -> Output:
        """The structure without its tensors, to be rebuilt around a state later."""
        return Output(tuple(None if isinstance(leaf, Tensor) else leaf for leaf in self.leaves), self.spec, self.index)
