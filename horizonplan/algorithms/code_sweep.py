"""Codes from the top down: each fits the layer above, whose codes have moved already, and stays near the layer below.

"Beyond Backprop: Online Alternating Minimization with Auxiliary Variables", Eqs. 4 and 5, each divided by mu: the loss
is weighted by 1/mu, and quadratic terms by 1, so that one rate serves all layers. Codes are steps of plain gradient
descent away from their forward values. The code before a sign is moved by as much as descent on the activation moves
the activation: through the function itself the derivative is zero. A code below which all is frozen stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.code_links import Links
from horizonplan.algorithms.code_pass import CodePass, Dice
from horizonplan.batch import batch_size, target_of, tensors
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import handler, intercept, rng_devices, scratch_buffers


@dataclass
class Sweep:
    """The codes of one batch.

    Attributes:
        chain: the model.
        layers: the modules that have codes, with their names.
        links: which code is read where.
        batch: the batch.
        mu: the weight of the quadratic terms.
        rates: of the gradient descent on a layer's codes.
        steps: of it, for each code.
        proximal: whether the second term of Eq. 5 counts.
        codes: a call's number -> code; the forward's values until :meth:`move`.
        forward: the codes' values in the forward.
        relaxed: for a layer after a sign, its prediction from the activation as it would have moved.
        unmoved: predictions of the encoding, with their graphs, that read no code.
        loss_slopes: the slopes of the loss over mu in the codes it is read from, at their forward values.
        leaves: those codes, moved, as later passes read them: to differentiate by.
        samples: of the batch; the loss is taken for a mean over them.
        bends: for such codes before a sign: half the change of that slope along the activation's move.
    """

    chain: Chain
    layers: dict[nn.Module, str]
    links: Links
    batch: Any
    mu: float
    rates: Mapping[nn.Module, Tensor | float]
    steps: int
    proximal: bool
    codes: dict[int, Tensor] = field(default_factory=dict)
    forward: dict[int, Tensor] = field(default_factory=dict)
    relaxed: dict[int, Tensor] = field(default_factory=dict)
    unmoved: dict[int, Tensor] = field(default_factory=dict)
    loss_slopes: dict[int, Tensor] = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    bends: dict[int, Tensor] = field(default_factory=dict)
    samples: int = 0

    def __post_init__(self) -> None:
        self.cards = rng_devices(self.chain.model) if self.chain.device.type == "cuda" else []
        self.dice = Dice(self.cards)
        self._inputs: dict[int, Tensor] = {}  # what a layer after a sign reads
        self._slopes: dict[int, Tensor] = {}

    def encode(self) -> Tensor:
        """The forward (Algorithm 2.2); running statistics move in it and nowhere else. Returns the loss, detached.

        Raises:
            ChainError: other layers are called than when the links were found, or nothing tells how many samples
                there are.
        """
        self._encoded = CodePass(self.chain, self.layers, self._leaf, None, self.links.normed, self._leaf_read)
        given: list[Tensor] = []

        def look(original: Any, args: Any, kwargs: Any) -> Any:
            given.extend(tensors([args, kwargs]))
            return original(*args, **kwargs)

        with torch.enable_grad(), intercept({self.chain.model: handler(look)}):
            loss = self._encoded.run(self.batch)
        assert loss is not None
        self.samples = _samples(self.batch, given, self.layers)
        self.links.same(self._encoded.modules, self.layers)
        self._encoded.arguments.clear()
        self.loss = loss
        return loss.detach()

    def move(self) -> None:
        """Algorithm 2.2's ``updateCodes``, from the last code to the first; each graph is freed when it is used."""
        predictions = self._encoded.predictions
        self.unmoved = {i: predictions[i] for i in self.links.orphans}
        for i in self.links.outputs:
            del predictions[i]
        read = {i for j in self.links.outputs for i in self.links.parents[j]}
        self._pull(self.loss, self.loss.new_tensor(self.samples / self.mu), sorted(read))
        del self.loss
        self.loss_slopes = dict(self._slopes)
        for i in reversed(self.links.coded):
            predicted = predictions.pop(i)
            moved = self.forward[i] = predicted.detach()
            if i in self._slopes:
                moved = self._descend(i, self._slopes.pop(i))
                if self.links.parents[i]:
                    self._pull(predicted, 2 * (self.forward[i] - moved), self.links.parents[i])
            self.codes[i] = moved
            if i in self.loss_slopes and i not in self.links.steps:
                self.leaves[i] = moved.detach().requires_grad_()

    @contextmanager
    def rest(self) -> Iterator[None]:
        """For all that comes after the encoding: random state and running statistics are afterwards as now."""
        after = Dice(self.cards)
        try:
            with scratch_buffers(self.chain.model.modules()):
                yield
        finally:
            after.rewind()

    def again(
        self, wanted: Collection[int] | None, last: int | None = None, at: tuple[int, Tensor] | None = None
    ) -> tuple[CodePass, Tensor | None]:
        """Another pass over the batch with the present codes.

        Args:
            wanted: the calls whose predictions are computed; ``None``: all.
            last: the call to end after.
            at: a call, and a value in place of its code (of what is read, where that is a sign).

        Returns:
            The pass, and the loss; ``None`` where it ended before.
        """
        number, value = (-1, None) if at is None else at
        step = number in self.links.steps

        def hand_on(i: int, prediction: Tensor | None) -> Tensor:
            if i in self.links.outputs:
                assert prediction is not None
                return prediction
            code = value if i == number and not step else self.leaves.get(i, self.codes[i])
            assert code is not None
            return code.clone() if i in self.links.copied else code

        def read(i: int, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (value,) if step and value is not None and number in self.links.parents[i] else arguments

        run = CodePass(self.chain, self.layers, hand_on, wanted, self.links.normed, read)
        self.dice.rewind()
        with torch.enable_grad():
            return run, run.run(self.batch, last)

    def _leaf(self, i: int, prediction: Tensor | None) -> Tensor:
        assert prediction is not None
        if i in self.links.outputs:
            return prediction
        self.codes[i] = prediction.detach().requires_grad_(prediction.requires_grad)  # nothing below could follow
        return self.codes[i].clone() if i in self.links.copied else self.codes[i]

    def _leaf_read(self, i: int, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for parent in self.links.parents[i]:
            if parent in self.links.steps and self.codes[parent].requires_grad:
                self._inputs[parent] = arguments[0].detach().requires_grad_()
                return (self._inputs[parent],)
        return arguments

    def _variable(self, i: int) -> Tensor:
        """What descent moves: a code, or what is read in its place after a sign."""
        return self._inputs[i] if i in self.links.steps else self.codes[i]

    def _pull(self, output: Tensor, cotangent: Tensor, parents: tuple[int, ...] | list[int]) -> None:
        """Add what a term contributes to its parents' slopes."""
        moving = [i for i in parents if self.codes[i].requires_grad]
        if not moving:
            return
        variables = [self._variable(i) for i in moving]
        found = torch.autograd.grad(output, variables, cotangent, retain_graph=True, allow_unused=True)
        for i, slope in zip(moving, found, strict=True):
            if slope is not None:
                self._slopes[i] = self._slopes[i] + slope if i in self._slopes else slope

    def _descend(self, i: int, slope: Tensor) -> Tensor:
        """Eqs. 4 and 5 for one code: some steps, the first one from the forward's value and graph."""
        start, rate = self._variable(i).detach(), self.rates[self.links.modules[i]]
        value = start - rate * slope
        for _ in range(self.steps - 1):
            slope = self._slope_at(i, value)
            if self.proximal:
                slope = slope + 2 * (value - start)
            value = value - rate * slope
        if i not in self.links.steps:
            return value
        (child,) = self.links.children[i]
        if child not in self.links.outputs:
            self.relaxed[child] = self.again({child}, child, (i, value))[0].predictions[child].detach()
        else:
            self.bends[i] = ((self._slope_at(i, value) - self.loss_slopes[i]) * (value - start)).sum() / 2
        return self.forward[i] + (value - start).reshape(self.forward[i].shape)

    def _slope_at(self, i: int, value: Tensor) -> Tensor:
        """The slope of the first term of Eq. 4 or 5 at another value than the forward's."""
        children, outputs = self.links.children[i], self.links.outputs
        leaf = value.detach().requires_grad_()
        above = bool(children & outputs)
        run, loss = self.again(children | outputs if above else children, None if above else max(children), (i, leaf))
        terms, cotangents = [], []
        if loss is not None:
            terms.append(loss)
            cotangents.append(loss.new_tensor(self.samples / self.mu))
        for j in sorted(children - outputs):
            terms.append(run.predictions[j])
            cotangents.append(2 * (run.predictions[j].detach() - self.codes[j]))
        (slope,) = torch.autograd.grad(terms, [leaf], cotangents)
        return slope


def _samples(batch: Any, given: list[Tensor], layers: Mapping[nn.Module, str]) -> int:
    """The samples of a batch: what all its tensors share, or else the tensors that the model was given.

    Raises:
        ChainError: neither is one number.
    """
    shared = batch_size(batch)
    if shared is not None:
        return shared
    target, inputs = target_of(batch), [t for t in given if t.ndim]
    times = any(isinstance(m, nn.RNN) and not m.batch_first for m in layers)
    if times and isinstance(target, Tensor) and target.ndim and all(t.shape[1:2] == target.shape[:1] for t in inputs):
        return len(target)
    sizes = {len(t) for t in inputs}
    if len(sizes) != 1:
        raise ChainError(
            f"batch: its tensors share no first dimension, and the model is called with tensors of {sorted(sizes)} "
            "samples; give the model inputs that all have the samples first."
        )
    return sizes.pop()
