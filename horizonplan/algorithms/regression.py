"""The co-state at a cut, predicted from the state there by linear regression on all pairs seen.

"Predict Globally, Correct Locally: Parallel-in-Time Optimal Control of Neural Networks", Eq. 6:

    min over A, B of    sum over pairs of    | A x + B - p |^2

kept as sums of products, so its memory does not grow with the pairs. What the equation does not have: a ridge; a weight
of older pairs that falls; the target beside x (a sample's co-state is a function of both, which Lemma 2.1 leaves out).
A co-state here is the gradient of the loss in the state; the paper's P is minus that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from horizonplan.batch import target_of

FULL = 256  # entries of a sample's state up to which all of them are regressed on all of them
CHANNELS = 256  # channels of a position up to which all of them are regressed on all of them
RANK = 64  # beyond that
MOST_ROWS = 4096  # samples or positions of a batch that are learned from
MOST_TARGETS = 256  # classes, or numbers of a target, that are regressed on


class Regression:
    """Streaming ridge regression from states to co-states.

    Small states (at most 256 entries a sample, and no sequences) are regressed whole: ``"full"``. Of others every
    position is regressed by itself, with the same coefficients, on its channels and on their means over all positions:
    ``"channels"``; and if there are more than 256 channels, on 64 random combinations of them: ``"low-rank"``.

    Args:
        decay: factor on the weight of earlier pairs at each new batch; 1: all pairs weigh the same.
        ridge: relative to the mean square of what is regressed on.
        classes: that the targets are of (:func:`classes_of`), 0 if they are values; ``None``: the targets are not
            regressed on.

    Attributes:
        kind: which of the three, once a pair is known.
    """

    def __init__(self, decay: float, ridge: float, classes: int | None) -> None:
        self.decay, self.ridge, self.classes = decay, ridge, classes
        self.kind: str | None = None
        self.products: Tensor | None = None  # (f, f): of what is regressed on
        self.mixed: Tensor | None = None  # (f, q): of that with the co-states
        self.mixing: Tensor | None = None  # (C, 64)

    def targets(self, batch: Any, state: Tensor) -> Tensor | None:
        """What is regressed on besides the state; see :func:`known`."""
        return None if self.classes is None else known(batch, self.classes, len(state))

    def add(self, state: Tensor, target: Tensor | None, costate: Tensor) -> None:
        """Learn from the pairs of one batch.

        Args:
            state: ``(B, ...)``.
            target: from :meth:`targets`.
            costate: the gradient of the batch's mean loss in ``state``.
        """
        rows, of_sample = self._regressors(state, target)
        y = _flat(costate, self.kind)
        every = -(-len(rows) // MOST_ROWS)
        spread = of_sample.repeat_interleave(len(rows) // len(of_sample), 0)
        x = torch.cat([rows[::every], spread[::every]], 1).double()
        y = y[::every].double() * (len(state) * every**0.5)  # of a sample's own loss: batches differ in size
        x = x * every**0.5
        if self.products is None:
            self.products, self.mixed = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
        assert self.mixed is not None
        self.products.mul_(self.decay).addmm_(x.T, x)
        self.mixed.mul_(self.decay).addmm_(x.T, y)

    def predict(self, state: Tensor, target: Tensor | None) -> Tensor:
        """The co-state of the batch's mean loss; zero while no pair is known."""
        if self.products is None or self.mixed is None:
            return torch.zeros_like(state)
        ridge = self.ridge * self.products.diagonal().mean() + torch.finfo(torch.float64).tiny
        solved = torch.linalg.solve(self.products + ridge * torch.eye(len(self.products)).to(self.products), self.mixed)
        rows, of_sample = self._regressors(state, target)
        local, common = (solved / len(state)).to(state.dtype).split([rows.shape[1], of_sample.shape[1]])
        found = (rows @ local).reshape(len(of_sample), -1, local.shape[1]) + (of_sample @ common).unsqueeze(1)
        return _unflat(found.flatten(0, 1), state, self.kind)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        kept = {"products": self.products, "mixed": self.mixed, "mixing": self.mixing}
        return {"kind": self.kind} | {name: None if t is None else t.cpu() for name, t in kept.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.kind = state["kind"]
        kept = (None if (t := state[n]) is None else t.to(device, copy=True) for n in ("products", "mixed", "mixing"))
        self.products, self.mixed, self.mixing = kept

    def _regressors(self, state: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is regressed on, of each sample or position, and of each sample (the last one a 1)."""
        if self.kind is None:
            self.kind = kind_of(state)
        rows = _flat(state, self.kind)
        if self.kind == "low-rank":
            rows = rows @ self._mixing(rows)
        of_sample = [state.new_ones(len(state), 1)]
        if self.kind != "full":
            of_sample.insert(0, rows.reshape(len(state), -1, rows.shape[1]).mean(1))
        if target is not None and target.ndim == 3 and len(rows) == target.shape[0] * target.shape[1]:
            rows = torch.cat([rows, target.flatten(0, 1).to(rows)], 1)
        elif target is not None:
            of_sample.insert(0, (target.mean(1) if target.ndim == 3 else target).to(rows))
        return rows, torch.cat(of_sample, 1)

    def _mixing(self, x: Tensor) -> Tensor:
        if self.mixing is None:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(x.shape[1], RANK, dtype=torch.float64, generator=generator)
            self.mixing = torch.linalg.qr(drawn).Q.to(x)
        return self.mixing


def kind_of(state: Tensor) -> str:
    """How states of a shape are regressed.

    >>> [kind_of(torch.zeros(2, *shape)) for shape in ((64,), (8, 16, 16), (10, 768))]
    ['full', 'channels', 'low-rank']
    """
    if state.ndim != 3 and state[:1].numel() <= FULL:
        return "full"
    return "channels" if state.shape[_channel_axis(state)] <= CHANNELS else "low-rank"


def classes_of(batch: Any, output: Tensor) -> int:
    """How many classes the targets of a batch are of; 0 where they are values.

    They are classes where the default loss takes them for classes
    (:func:`horizonplan.batch.default_loss`), and are more than one.

    Args:
        batch: the batch.
        output: the model's for it, or a tensor of its shape.
    """
    target = target_of(batch)
    if not isinstance(target, Tensor) or target.dtype == torch.bool or target.is_floating_point() or output.ndim < 2:
        return 0
    if output.shape[:-1] == target.shape:
        count = output.shape[-1]
    else:
        count = output.shape[1] if (output.shape[0], *output.shape[2:]) == tuple(target.shape) else 0
    return count if count > 1 else 0


def known(batch: Any, classes: int, samples: int) -> Tensor | None:
    """The targets of a batch as numbers: classes one-hot, values as they are.

    Args:
        batch: the batch.
        classes: how many; 0: the targets are values.
        samples: of the state (its first axis).

    Returns:
        ``(B, k)``, or ``(B, N, k)`` for a class at each position; ``None`` for targets of another form or number, and
        for more than 256 classes or values.
    """
    target = target_of(batch)
    if not isinstance(target, Tensor) or target.ndim == 0 or len(target) != samples:
        return None
    target = target.detach()
    if classes > 0 and not target.is_floating_point():
        if target.ndim > 2 or classes > MOST_TARGETS:
            return None
        return F.one_hot(target.clamp(0, classes - 1).long(), classes).double() * (target >= 0).unsqueeze(-1)
    flat = target.flatten(1) if target.ndim > 1 else target.unsqueeze(1)
    return flat.double() if flat.shape[1] <= MOST_TARGETS else None


def _channel_axis(state: Tensor) -> int:
    return 1 if state.ndim > 3 else -1


def _flat(state: Tensor, kind: str | None) -> Tensor:
    """``(samples or positions, features)``."""
    if kind == "full":
        return state.reshape(len(state), -1)
    return state.movedim(_channel_axis(state), -1).flatten(0, -2)


def _unflat(rows: Tensor, like: Tensor, kind: str | None) -> Tensor:
    if kind == "full":
        return rows.reshape(like.shape)
    axis = _channel_axis(like)
    return rows.reshape(like.movedim(axis, -1).shape).movedim(-1, axis).contiguous()
