"""What an experiment works with: the cases at one scale, their data, and the pieces that several experiments share.

One training run and one table of step costs are cells: whoever asks first computes them, and nobody computes
them twice.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.probes.memory import step
from horizonplan.probes.seconds import now
from horizonplan.probes.steady import make_state, restored, standing_bytes
from horizonplan.probes.tracker import Flops, LiveBytes
from horizonplan.reproduce.cases import Case, Data, Scale, Sources, cases
from horizonplan.reproduce.cells import Cells
from horizonplan.reproduce.methods import Method
from horizonplan.training import Callback, DecayOnGrowth, train

ROUNDS, SECONDS = 5, 3.0  # steps are timed in so many rounds, and in more until so much time has passed
VALIDATION_BATCH = 250


@dataclass
class Lab:
    """One run of the experiments.

    Attributes:
        scale: ``"small"`` or ``"paper"``.
        sources: where the user's files lie.
        cells: what is finished.
        seeds: runs of each method, draws of the theorem; ``None``: as many as each case has.
        device: where to train.
    """

    scale: Scale
    sources: Sources
    cells: Cells
    seeds: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._cases = cases(self.scale, self.sources)
        self._data: dict[str, Data] = {}

    def case(self, name: str) -> Case:
        """A case by its name."""
        return self._cases[name]

    @property
    def timed(self) -> str:
        """What :func:`clock` tells on this device, in words."""
        return "wall time" if self.device.type == "cuda" else "process time"

    def words(self, cases: Sequence[Case]) -> str:
        """The cases, their training and their seeds, for captions."""
        return "; ".join(f"{case.words}, seeds: {len(self.seeds_of(case))}" for case in cases)

    def settings(self, case: Case) -> dict[str, Any]:
        """What decides the outcome of work on a case, for the cells: the case, the user's files, the kind of device."""
        return {**case.settings, "device": self.device.type}

    def seeds_of(self, case: Case) -> range:
        """The seeds that a case is run with."""
        return range(case.seeds if self.seeds is None else self.seeds)

    def data(self, case: Case) -> Data:
        """A case's data, read once."""
        if case.name not in self._data:
            self._data[case.name] = case.data()
        return self._data[case.name]

    def model(self, case: Case, seed: int) -> nn.Module:
        """A case's network with the weights of a seed; the generator of the process is left alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return case.make().to(self.device)

    def loader(self, case: Case, seed: int) -> DataLoader[Any]:
        """A case's training data in an order of the seed's."""
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.data(case).training, case.batch, shuffle=True, generator=generator)

    def batches(self, case: Case, seed: int, count: int) -> list[Any]:
        """A seed's first batches, at most ``count``, on the device."""
        return [move(batch, self.device) for batch in islice(self.loader(case, seed), count)]

    def chain(self, case: Case, model: nn.Module, batch: Any) -> Chain:
        """The network as a chain, of the depth that the case has."""
        chain = Chain.from_model(model, batch, loss=case.loss)
        if chain.depth != case.depth:
            raise ValueError(f"{case.name}: {chain.depth} blocks were found, {case.depth} are expected.")
        return chain

    def run(self, case: Case, method: Method, seed: int) -> Run:
        """Train a case with a method (a cell)."""
        settings = {**self.settings(case), "method": str(method.schedule(case.depth)), "seed": seed}
        name = f"runs/{case.name}/batch-{case.batch}/{method.name}/seed-{seed}"
        return Run(**self.cells.get(name, settings, lambda: self._train(case, method, seed)))

    def runs(self, case: Case, method: Method) -> list[Run]:
        """One run for each seed."""
        return [self.run(case, method, seed) for seed in self.seeds_of(case)]

    def costs(self, case: Case, methods: Sequence[Method], name: str = "costs") -> dict[str, Cost]:
        """What one step of each method costs, on one batch and the weights of seed 0 (a cell)."""
        names = [str(method.schedule(case.depth)) for method in methods]
        settings = {**self.settings(case), "methods": names, "rounds": ROUNDS, "seconds": SECONDS}
        found = self.cells.get(f"{name}/{case.name}/batch-{case.batch}", settings, lambda: self._costs(case, methods))
        return {method: Cost(**values) for method, values in found.items()}

    def _train(self, case: Case, method: Method, seed: int) -> dict[str, Any]:
        model, kept = self.model(case, seed), _Kept()
        initial = self._initial_loss(case, model, seed)
        stopped = None
        try:
            train(
                model,
                self.loader(case, seed),
                algorithm=method.algorithm,
                loss=case.loss,
                epochs=case.epochs,
                optimizer=lambda parameters: optimizer_of(case, parameters),
                scheduler=DecayOnGrowth,
                val_data=DataLoader(self.data(case).validation, VALIDATION_BATCH),
                callbacks=[kept],
                watch_every=0,
                oom_retries=0,
                progress=False,
                seed=seed,
            )
        except FloatingPointError as error:
            stopped = str(error)
        return {"initial_loss": initial, **kept.found(), "stopped": stopped}

    def _initial_loss(self, case: Case, model: nn.Module, seed: int) -> float:
        """The mean loss over the training data before the first step, the network in training mode."""
        twin = copy.deepcopy(model).train()
        losses, sizes = [], []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            chain = None
            for batch in DataLoader(self.data(case).training, case.batch):
                here = move(batch, self.device)
                chain = chain or self.chain(case, twin, here)
                losses.append(chain.loss(here).item())
                sizes.append(len(batch[0]))
        return sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes)

    def _costs(self, case: Case, methods: Sequence[Method]) -> dict[str, Any]:
        (batch,) = self.batches(case, 0, 1)
        model = self.model(case, 0).train()
        chain = self.chain(case, model, batch)
        optimizer = optimizer_of(case, [p for p in model.parameters() if p.requires_grad])
        found: dict[str, dict[str, Any]] = {}
        with restored(chain, weights=True):
            make_state(optimizer)
            for method in methods:
                found[method.name] = one_step(chain, batch, method, optimizer)
            seconds = in_turn(chain, batch, methods, optimizer)
        return {name: {**values, "seconds": seconds[name]} for name, values in found.items()}


@dataclass(frozen=True)
class Run:
    """What one training run left behind.

    Attributes:
        initial_loss: mean training loss before the first step.
        losses: mean training loss of each epoch.
        validation: the metrics of each epoch, ``loss`` and perhaps ``accuracy``.
        stopped: why it broke off; ``None`` if it did not.
    """

    initial_loss: float
    losses: list[float]
    validation: list[dict[str, float]]
    stopped: str | None

    @property
    def final_loss(self) -> float:
        """The last epoch's training loss; infinite if the run broke off."""
        return float("inf") if self.stopped or not self.losses else self.losses[-1]

    @property
    def final_accuracy(self) -> float:
        """The last epoch's validation accuracy; 0 if the run broke off."""
        return 0.0 if self.stopped or not self.validation else self.validation[-1]["accuracy"]


@dataclass(frozen=True)
class Cost:
    """What one step costs.

    Attributes:
        bytes: its peak at steady state: parameters, optimiser state, batch, activations, gradients.
        flops: of forward and backward, the heads' included.
        units: in forwards of a linear layer (heads not counted).
        seconds: of forward and backward by :func:`clock`, once a round.
    """

    bytes: int
    flops: int
    units: int
    seconds: list[float]

    @property
    def median_seconds(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these is the middle half of the rounds' seconds."""
        low, _, high = (
            statistics.quantiles(self.seconds, n=4, method="inclusive") if self.seconds[1:] else self.seconds * 3
        )
        return low, high


def clock(chain: Chain) -> float:
    """Process time, to which waiting for others' work does not add; on CUDA the wall clock, once the device is done."""
    return now(chain) if chain.device.type == "cuda" else time.process_time()


def in_turn(
    chain: Chain, batch: Any, methods: Sequence[Method], optimizer: torch.optim.Optimizer
) -> dict[str, list[float]]:
    """Seconds of forward and backward, in turn, so that a slow moment of the machine strikes all alike."""
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    while len(seconds[methods[0].name]) < ROUNDS or sum(map(sum, seconds.values())) < SECONDS:
        for method in methods:
            began = clock(chain)
            method.algorithm.backward(chain, batch)
            seconds[method.name].append(clock(chain) - began)
            optimizer.zero_grad(set_to_none=True)
    return seconds


def one_step(chain: Chain, batch: Any, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Peak bytes, FLOPs and units of one step; what the first step of all allocates does not count."""
    schedule = method.schedule(chain.depth)
    with Flops() as counter:
        step(chain, batch, schedule, optimizer)
    optimizer.zero_grad(set_to_none=True)
    base = standing_bytes(chain, optimizer, batch)
    with LiveBytes() as tracker:
        step(chain, batch, schedule, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return {"bytes": base + tracker.peak, "flops": counter.total, "units": schedule.units(stem_trains=True)}


def optimizer_of(case: Case, parameters: Any) -> torch.optim.Optimizer:
    """The case's optimiser over parameters."""
    kind: Any = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[case.optimizer]
    made: torch.optim.Optimizer = kind(parameters, lr=case.learning_rate)
    return made


def with_batch(case: Case, batch: int) -> Case:
    """The case with another batch size."""
    return replace(case, batch=batch)


class _Kept(Callback):
    """Keeps each epoch's training loss and validation."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def on_epoch_end(self, run: Any, epoch: Mapping[str, Any]) -> None:
        self.epochs.append(dict(epoch))

    def found(self) -> dict[str, Any]:
        names = "val_loss", "val_accuracy"
        validation = [{n.removeprefix("val_"): e[n] for n in names if n in e} for e in self.epochs]
        return {"losses": [e["loss"] for e in self.epochs], "validation": validation}
