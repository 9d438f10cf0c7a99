"""``horizonplan plan``: measure a model, show what each way of computing its gradient costs, choose one."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from horizonplan.cards import Card
from horizonplan.cli import options as opt
from horizonplan.cli.spec import load_data, load_loss, load_model, load_optimizer
from horizonplan.client import Client, ServiceError
from horizonplan.cost import Cost, LadderCost, LinearCost, MixedNodes
from horizonplan.curves import PoorFitWarning
from horizonplan.devices import ASSUMED, Calibration, parse_device
from horizonplan.measured import measurements_of
from horizonplan.objective import AccuracyConstraint, MemoryLimit, MoneyToLoss, Objective, TimeToLoss, Weighted
from horizonplan.plan import Plan
from horizonplan.planner import plan_horizon

EPSILON = "Objective: the least cost at 1 - EPSILON of back-propagation's rate or more. Default: 0.1."
NODE = "Memory of one node, such as 24GiB. Default: the card's; on a CPU, what back-propagation needs."
MEMORY = "What counts: allocated, bytes of tensors; or nvml, what the card needs, as its driver counts."
PROBE_STEPS = "What measuring may cost, in steps of back-propagation; short runs apart."
ROLLOUT_STEPS = "Steps of the short runs that measure rates; 0: none. Default: 50, with --accuracy rollout 128."
ACCURACY = "Where rates come from: cosine, and short runs for the stride; or rollout, short runs for all that may win."
ROLLOUT_BUDGET = "With --accuracy rollout: what the runs may take, in steps of back-propagation."
SERVER = "Address of `horizonplan serve`: measure here, have the choice made there. Key: HORIZONPLAN_KEY."
CANDIDATES = "horizons; or all: checkpointing, micro-batches and bf16 may be chosen too."
TIME = "Objective: the least seconds to the loss of STEPS steps of back-propagation; --memory-limit holds too."
MONEY = "Objective: likewise the least money. Prices are then for an hour."
CARD = "A card to pay for, whole: h200, a10g, ... Repeat it for several; the cheapest is taken."
PRICE = "What an hour of the card costs, one for each --card. Default: the table's, where there is one."
COSINE_FROM = "For a simulated card: a saved plan whose cosines are taken, by the part of the depth."


def plan(
    model: opt.Model,
    data: opt.Data,
    epsilon: Annotated[float | None, Option(help=EPSILON)] = None,
    lam: Annotated[float | None, Option(help="Objective: the least LAM x cost - rate.")] = None,
    memory_limit: Annotated[str | None, Option(help="Objective: the largest horizon within, say, 24GiB.")] = None,
    unit_cost: Annotated[float, Option(help="Price of one node.")] = 1.0,
    node_memory: Annotated[str | None, Option(help=NODE)] = None,
    ladder: Annotated[bool, Option("--ladder", help="Pay for whole nodes, not in proportion.")] = False,
    time_to_loss: Annotated[float | None, Option(metavar="STEPS", help=TIME)] = None,
    money_to_loss: Annotated[float | None, Option(metavar="STEPS", help=MONEY)] = None,
    card: Annotated[list[str] | None, Option(help=CARD)] = None,
    price: Annotated[list[float] | None, Option(help=PRICE)] = None,
    candidates: Annotated[str, Option(help=CANDIDATES)] = "horizons",
    horizons: Annotated[str | None, Option(help="Where to measure: 1,3,6. Default: where it counts.")] = None,
    strides: Annotated[str, Option(help="Strides to weigh; horizon: disjoint windows.")] = "1,horizon",
    rollout_steps: Annotated[int | None, Option(help=ROLLOUT_STEPS)] = None,
    accuracy: Annotated[str, Option(help=ACCURACY)] = "cosine",
    rollout_budget: Annotated[float, Option(help=ROLLOUT_BUDGET)] = 800,
    batches: Annotated[int, Option(help="Batches to measure cosines on.")] = 4,
    batch_size: opt.BatchSize = None,
    blocks: opt.Blocks = None,
    loss: opt.Loss = None,
    optimizer: opt.OptimizerName = "adamw",
    lr: opt.LearningRate = None,
    device: opt.Device = None,
    memory: Annotated[str, Option(help=MEMORY)] = "allocated",
    probe_steps: Annotated[float, Option(help=PROBE_STEPS)] = 60,
    cosine_from: Annotated[Path | None, Option(help=COSINE_FROM)] = None,
    calibration: opt.CalibrationFile = None,
    seed: opt.Seed = 0,
    server: Annotated[str | None, Option(help=SERVER)] = None,
    out: Annotated[Path | None, Option(help="Save the plan here, as JSON.")] = None,
    plot: Annotated[Path | None, Option(help="Draw it here: .png, .svg, .pdf.")] = None,
    plot_frontier: Annotated[Path | None, Option(help="Draw memory against time, and what is not dominated.")] = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure MODEL, print what each horizon costs, and choose one. Nothing is trained.

    With --device simulated:SIZE nothing is measured either: MODEL is made without its values, on the device meta, where
    that can be; bytes are predicted, and cosines are those of another plan. --memory-limit needs none.

    With --server the choice is made, and kept, by a service; model and data stay here.

    Example: horizonplan plan transformer --data mnist5k --out plan.json --plot plan.png
    """
    opt.exclude(epsilon=epsilon, lam=lam, time_to_loss=time_to_loss, money_to_loss=money_to_loss)
    opt.exclude(epsilon=epsilon, lam=lam, memory_limit=memory_limit)
    places = None if horizons is None else [_number("--horizons", part) for part in horizons.split(",")]
    steps = [part if part == "horizon" else _number("--strides", part) for part in strides.split(",")]
    _have_folders(out, plot, plot_frontier)
    _for_simulated(device, cosine_from=cosine_from, calibration=calibration)
    _for_server(server, device, candidates, time_to_loss or money_to_loss or card)
    loaded, _ = load_data(data, batch_size, seed)
    objective = _objective(epsilon, lam, memory_limit, time_to_loss, money_to_loss)
    cost = _cost(unit_cost, node_memory, ladder, card or [], price or [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)  # the plan's notes say it too
        made = plan_horizon(
            load_model(model, loaded, device, seed),
            loaded,
            blocks=blocks,
            loss=load_loss(loss),
            objective=objective,
            cost=cost,
            candidates=candidates,
            strides=steps,
            rollout_steps=rollout_steps,
            accuracy=accuracy,
            rollout_budget=rollout_budget,
            horizons=places,
            batches=batches,
            optimizer=load_optimizer(optimizer, lr),
            device=device,
            seed=seed,
            memory=memory,
            probe_steps=probe_steps,
            cosine_from=None if cosine_from is None else Plan.load(cosine_from),
            calibration=ASSUMED if calibration is None else Calibration.load(calibration),
        )
    if server is not None:
        try:
            made = _judged_there(server, made, objective, cost)
        except ServiceError:
            _hand_over(made, out, plot, json)  # what was measured is not lost
            raise
    _hand_over(made, out, plot, json)
    if plot_frontier is not None:
        made.plot_frontier(plot_frontier)


def _cost(unit_cost: float, node_memory: str | None, ladder: bool, cards: list[str], prices: list[float]) -> Cost:
    """The cost of nodes, or of the cards that are named."""
    if not cards and not prices:
        return (LadderCost if ladder else LinearCost)(unit_cost, node_memory)
    if node_memory is not None or ladder or unit_cost != 1.0:
        raise typer.BadParameter("--card brings memory and price; leave --node-memory, --unit-cost and --ladder out")
    if prices and len(prices) != len(cards):
        raise typer.BadParameter(f"{len(prices)} --price for {len(cards)} --card; give one for each, in order")
    known: list[float | None] = [*prices] or [None] * len(cards)
    return MixedNodes([Card(name, price=price) for name, price in zip(cards, known, strict=True)])


def _judged_there(server: str, made: Plan, objective: Objective, cost: Cost) -> Plan:
    """The plan that a service makes of what was measured here."""
    found = measurements_of(made)
    with Client(server, os.environ.get("HORIZONPLAN_KEY")) as client:
        there = client.plan(**found, objective=objective, cost=cost)
    typer.echo(f"note: {server} keeps this plan as {there.id}", err=True)
    return replace(there, block_names=made.block_names, blocks=made.blocks, provenance=made.provenance)


def _for_server(server: str | None, device: str | None, candidates: str, seconds: object) -> None:
    card = parse_device(device)
    if server is not None and card is not None and card.kind == "simulated":
        raise typer.BadParameter("--server is sent measurements, and on a simulated card nothing is measured")
    if server is not None and candidates != "horizons":
        raise typer.BadParameter("--server weighs horizons and strides; leave --candidates out")
    if server is not None and seconds:
        raise typer.BadParameter("--server knows no --time-to-loss, --money-to-loss or --card; plan without it")


def _hand_over(made: Plan, out: Path | None, plot: Path | None, json: bool) -> None:
    if out is not None:
        made.save(out)
    if plot is not None:
        made.plot(plot)
    if json:
        opt.print_json(made.to_dict())
        typer.echo("".join(f"note: {note}\n" for note in made.notes), err=True, nl=False)
    else:
        typer.echo(made.explain())


def _have_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent} for {path.name}; make it first")


def _for_simulated(device: str | None, **values: object) -> None:
    card = parse_device(device)
    for name, value in values.items():
        if value is not None and (card is None or card.kind != "simulated"):
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --device simulated:SIZE")


def _objective(
    epsilon: float | None, lam: float | None, memory_limit: str | None, seconds: float | None, money: float | None
) -> Objective:
    if seconds is not None:
        return TimeToLoss(seconds, memory_limit)
    if money is not None:
        return MoneyToLoss(money, memory_limit)
    if memory_limit is not None:
        return MemoryLimit(memory_limit)
    return Weighted(lam) if lam is not None else AccuracyConstraint(0.1 if epsilon is None else epsilon)


def _number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number", param_hint=option) from None
