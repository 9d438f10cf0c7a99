"""Which code is read by which layer: found by trial forwards, and held against what the method is for.

Networks are chains of layers: each reads the code of the one before it. Layers that are called more than once in a
forward (the cell of an Elman network, unrolled in time) count as one, and may read each other's codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms.code_layers import LINEAR, NORMS
from horizonplan.algorithms.code_pass import CodePass, Dice
from horizonplan.chain import Chain, ChainError
from horizonplan.chain.calls import handler, intercept, quiet, rng_devices

SCALES = (1.0, 8.0, 64.0)  # of the random codes that the model is tried with: an activation may be flat near zero


@dataclass(frozen=True)
class Links:
    """The calls of layers in one forward.

    Attributes:
        modules: the layer of each call.
        parents: for each call, the calls whose codes it reads.
        outputs: calls whose output goes into the loss; it is no code.
        steps: calls whose code is read through a function without a derivative (sign), by one layer.
        normed: calls whose output a normalisation takes at once.
        copied: calls whose code the model overwrites.
    """

    modules: tuple[nn.Module, ...]
    parents: tuple[tuple[int, ...], ...]
    outputs: frozenset[int]
    steps: frozenset[int]
    normed: frozenset[int]
    copied: frozenset[int]

    @cached_property
    def children(self) -> tuple[frozenset[int], ...]:
        """For each call, the calls that read its code."""
        count = range(len(self.parents))
        return tuple(frozenset(j for j in count if i in self.parents[j]) for i in count)

    @cached_property
    def coded(self) -> tuple[int, ...]:
        """The calls that have a code, in the order of the forward."""
        return tuple(i for i in range(len(self.modules)) if i not in self.outputs)

    @cached_property
    def calls(self) -> dict[nn.Module, tuple[int, ...]]:
        """The calls with a code of each layer."""
        layers = dict.fromkeys(self.modules[i] for i in self.coded)
        return {layer: tuple(i for i in self.coded if self.modules[i] is layer) for layer in layers}

    @cached_property
    def orphans(self) -> frozenset[int]:
        """The calls with a code that read none: what they predict does not depend on codes."""
        return frozenset(i for i in self.coded if not self.parents[i])

    def same(self, modules: Sequence[nn.Module], layers: Mapping[nn.Module, str]) -> None:
        """See that a forward called the same layers.

        Raises:
            ChainError: it did not.
        """
        if tuple(modules) != self.modules:
            told = " and ".join(repr([layers[m] for m in calls][:8]) for calls in (self.modules, modules))
            raise ChainError(
                f"model: on batches of the same shape it called layers {told}; alternating minimisation takes models "
                "that call the same ones each time."
            )


def find_links(chain: Chain, layers: Mapping[nn.Module, str], batch: Any) -> Links:
    """Find the links on a batch; nothing is changed by it.

    Raises:
        ChainError: the model is no chain of layers that ends in a linear one.
    """
    with quiet(chain.model), torch.enable_grad():
        return _Search(chain, layers, batch).links()


class _Search:
    def __init__(self, chain: Chain, layers: Mapping[nn.Module, str], batch: Any) -> None:
        self.chain, self.layers, self.batch = chain, layers, batch
        self.dice = Dice(rng_devices(chain.model))
        self.normed: set[int] = set()
        self.generator = torch.Generator().manual_seed(0)  # torch's own is rewound before every run

    def links(self) -> Links:
        first = self._first()
        if not first.modules:
            raise ChainError("model: it calls no linear layer, so there is nothing to train; check its forward.")
        self.modules = first.modules
        self.forward = [first.predictions[i].detach() for i in range(len(self.modules))]
        codes = next(self._draws())
        handed, run, loss = self._run(codes)
        parents, flat = self._read(run, codes, loss)
        steps = frozenset(i for i in flat if self._is_step(i, parents))
        outputs = frozenset(range(len(codes))) - set().union(*parents[:-1])
        self._check(parents, outputs)
        read = tuple(tuple(sorted(found)) for found in parents[:-1])
        copied = frozenset(i for i, code in enumerate(handed) if code._version > 0)
        return Links(tuple(self.modules), read, outputs, steps, frozenset(self.normed), copied)

    def _first(self) -> CodePass:
        """The model's plain forward; sees where a normalisation takes a layer's output at once."""
        returned: list[Tensor] = []

        def hand_on(number: int, prediction: Tensor | None) -> Tensor:
            assert prediction is not None
            returned.append(prediction)
            return prediction

        def norm(original: Any, args: Any, kwargs: Any) -> Any:
            if returned and args and args[0] is returned[-1]:
                self.normed.add(len(returned) - 1)
            return original(*args, **kwargs)

        self.dice.rewind()
        run = CodePass(self.chain, self.layers, hand_on)
        with torch.no_grad(), intercept({m: handler(norm) for m in self.chain.model.modules() if isinstance(m, NORMS)}):
            run.run(self.batch)
        return run

    def _run(self, codes: Sequence[Tensor]) -> tuple[list[Tensor], CodePass, Tensor]:
        """A forward with these codes: what was handed on, the pass, the loss."""
        handed: list[Tensor] = []

        def hand_on(number: int, prediction: Tensor | None) -> Tensor:
            handed.append(codes[number].clone())
            return handed[-1]

        self.dice.rewind()
        run = CodePass(self.chain, self.layers, hand_on, normed=self.normed)
        loss = run.run(self.batch)
        assert loss is not None
        return handed, run, loss

    def _draws(self) -> Iterator[list[Tensor]]:
        """Codes to try the model with: random ones of several scales, each with its negative; the forward's own."""
        for scale in SCALES:
            made = [torch.randn(c.shape, generator=self.generator).to(c) * scale for c in self.forward]
            yield [code.requires_grad_() for code in made]
            yield [(-code).detach().requires_grad_() for code in made]
        yield [code.clone().requires_grad_() for code in self.forward]

    def _read(self, run: CodePass, codes: list[Tensor], loss: Tensor) -> tuple[list[set[int]], list[int]]:
        """For each call, and last for the loss: the codes that it reads; and the codes without any derivative."""
        parents, live = self._graph(run, codes, loss)
        seen = set().union(*parents)
        for other in self._draws():
            if seen <= live:
                break
            _, again, value = self._run(other)
            live |= self._graph(again, other, value)[1]
        for i in set(range(len(codes))) - seen:  # no graph leads there: look at values
            for j in self._moved(i, run, codes, loss):
                parents[j].add(i)
        return parents, sorted(set().union(*parents) - live)

    def _graph(self, run: CodePass, codes: list[Tensor], loss: Tensor) -> tuple[list[set[int]], set[int]]:
        """What each call and the loss have a graph to, and the codes with a derivative somewhere."""
        parents: list[set[int]] = []
        live: set[int] = set()
        for read in (*(run.predictions[j] for j in range(len(codes))), loss):
            slopes = dict(enumerate(_slopes(read, codes)))
            parents.append({i for i, slope in slopes.items() if slope is not None})
            live |= {i for i, slope in slopes.items() if slope is not None and (slope.isfinite() & (slope != 0)).any()}
        return parents, live

    def _moved(self, i: int, run: CodePass, codes: list[Tensor], loss: Tensor) -> set[int]:
        """The calls that read other values, and -1 for another loss, when a code changes."""
        found: set[int] = set()
        for draw in self._draws():
            _, other, moved = self._run([draw[k] if k == i else code for k, code in enumerate(codes)])
            pairs = zip(run.arguments, other.arguments, strict=True)
            found |= {j for j, (old, new) in enumerate(pairs) if not all(map(torch.equal, old, new))}
            found |= set() if torch.equal(loss, moved) else {-1}
        return found

    def _is_step(self, i: int, parents: list[set[int]]) -> bool:
        """Whether a code without a derivative is read element by element, by one layer that reads no other.

        Raises:
            ChainError: it is not, so that nothing tells how to move it.
        """
        children = [j for j, found in enumerate(parents) if i in found]
        alone = len(children) == 1 and children[0] < len(self.forward) and parents[children[0]] == {i}
        if alone and self._elementwise(i, children[0]):
            return True
        raise ChainError(
            f"model: {self._name(i)} goes through a function without a derivative, and is then pooled, read by "
            "several layers or not used; alternating minimisation needs such a function element by element, right "
            "before one linear layer."
        )

    def _elementwise(self, i: int, j: int) -> bool:
        """Whether what call j reads changes where code i has been negated, and nowhere else."""
        changed = False
        for codes in self._draws():
            read, count = self._run(codes)[1].arguments[j], codes[i].numel()
            if len(read) != 1 or read[0].numel() != count:
                return False
            half = torch.randperm(count, generator=self.generator) < (count + 1) // 2  # never all of several
            mask = half.reshape(codes[i].shape).to(codes[i].device)
            mixed = [torch.where(mask, -code, code) if k == i else code for k, code in enumerate(codes)]
            differs = (self._run(mixed)[1].arguments[j][0] != read[0]).reshape(mask.shape)
            if (differs & ~mask).any():
                return False
            changed = changed or bool(differs.any())
        return changed

    def _check(self, parents: list[set[int]], outputs: frozenset[int]) -> None:
        """See that it is a chain.

        Raises:
            ChainError: it is none.
        """
        last = {self.modules[i] for i in outputs}
        kinds = " and ".join(sorted({self._name(i) for i in outputs}))
        if len(last) > 1 or not isinstance(self.modules[max(outputs)], LINEAR) or parents[-1] != outputs:
            read = ", ".join(sorted({self._name(i) for i in parents[-1]})) or "none of the layers"
            raise ChainError(
                f"model: the outputs of {kinds} are read by no other layer, and the loss reads {read}; alternating "
                "minimisation takes one linear output layer, which the loss reads alone."
            )
        count = Counter(self.modules[i] for i in range(len(self.modules)) if i not in outputs)
        core = {i for i in range(len(self.modules)) if count[self.modules[i]] > 1}
        first = min(core, default=0)
        place = {i: first if i in core else i for i in range(len(self.modules))}
        order = list(dict.fromkeys(place[i] for i in range(len(self.modules)) if i not in outputs))
        previous = dict(zip(order, [set(), *({i} for i in order)], strict=False))
        for j in range(len(self.modules)):
            before = set(order[-1:]) if j in outputs else previous[place[j]]
            read_by = {place[i] for i in parents[j]}
            if not (read_by <= before | {place[j]} if j in core else read_by == before):
                names = ", ".join(sorted({self._name(i) for i in parents[j]})) or "none of the layers before it"
                raise ChainError(
                    f"model: {self._name(j)} reads {names}; alternating minimisation takes chains, in which each layer "
                    "reads the one before it (no connections around layers, attention or branches), and RNNs."
                )

    def _name(self, i: int) -> str:
        return repr(self.layers[self.modules[i]])


def _slopes(read: Tensor, codes: list[Tensor]) -> Sequence[Tensor | None]:
    """Derivatives in the codes; ``None`` where no graph leads, or one without derivatives (``torch.heaviside``)."""
    if read.requires_grad:
        try:
            return torch.autograd.grad(read, codes, torch.randn_like(read), allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
    return [None] * len(codes)
