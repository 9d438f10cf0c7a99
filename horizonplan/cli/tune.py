"""``horizonplan tune``: train the schedules worth training, with parameters that Optuna proposes."""

import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import optuna
import typer
from typer import Option

from horizonplan.cli import options as opt
from horizonplan.cli.spec import load_data, load_loss, load_maker, load_space, load_tunable
from horizonplan.objective import AccuracyConstraint
from horizonplan.plan import Plan
from horizonplan.tuner import Study, tune_horizon

VAL_DATA = "What --data takes, to validate on. Default: the second of the pair that --data leads to."
STORAGE = (
    "Where the trials are kept, and gone on with: a file, or the URL of a database, for several machines at once "
    "(postgresql://user@host/name). Default: nowhere."
)
RATES = "Least and largest learning rate; none: the optimizer's own."
SPACE = "module:function from an Optuna trial to {'model': {...}, 'optimizer': {...}, 'train': {...}}, arguments."
WORKERS = "Trials side by side, each in a process; 0: one after another in this process."
LIMIT = "What a step may need, such as 24GiB. What is predicted to need more is never trained."
METRIC = "What trials are compared by, beside memory and time: loss or accuracy, on the validation data."
OPTIMIZER = "adamw, adam, sgd, or module:function from parameters and lr=... to an Optimizer."


def tune(
    model: opt.Model,
    data: opt.Data,
    val_data: Annotated[str | None, Option(help=VAL_DATA)] = None,
    plan: Annotated[Path | None, Option(help="Try the schedules of this plan. Default: one is made.")] = None,
    trials: Annotated[int, Option(min=1, help="Trials in all, those in STORAGE included.")] = 20,
    epochs: Annotated[int, Option(min=1, help="Passes over the data, each trial.")] = 1,
    storage: Annotated[str | None, Option(help=STORAGE)] = None,
    name: Annotated[str, Option(help="Name of the study in its storage.")] = "horizonplan",
    workers: Annotated[int, Option(min=0, help=WORKERS)] = 1,
    metric: Annotated[str, Option(help=METRIC)] = "loss",
    memory_limit: Annotated[str | None, Option(help=LIMIT)] = None,
    schedules: Annotated[int, Option(min=1, help="Schedules of the plan to try, at most.")] = 6,
    learning_rates: Annotated[str, Option(help=RATES)] = "1e-4,1e-2",
    max_warmup: Annotated[int | None, Option(min=0, help="Most epochs of smaller horizons. Default: half.")] = None,
    space: Annotated[str | None, Option(help=SPACE)] = None,
    prune: Annotated[bool, Option("--prune/--no-prune", help="End trials early that do worse than half.")] = True,
    timeout: Annotated[float, Option(help="Seconds that a trial may take.")] = 86400.0,
    epsilon: Annotated[float, Option(help="Objective of the plan that is made: 1 - EPSILON of the rate.")] = 0.1,
    batch_size: opt.BatchSize = None,
    blocks: opt.Blocks = None,
    optimizer: Annotated[str, Option(help=OPTIMIZER)] = "adamw",
    loss: opt.Loss = None,
    device: opt.Device = None,
    seed: opt.Seed = 0,
    out: Annotated[Path | None, Option(help="Save the best trial's plan here, as JSON.")] = None,
    plot: Annotated[Path | None, Option(help="Draw the trials here: .png, .svg, .pdf.")] = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train MODEL with the schedules that a plan leaves to training, and print what came of each.

    Each trial is judged by peak memory, METRIC and time of a step; on the front are those that none beats in all three.
    The plan of the one with the best METRIC is saved by --out, for `horizonplan train --plan`. With --storage the same
    command goes on after a crash, and several machines may run it at once. Exit code 1 if no trial finished.

    --json prints trials (each with its schedule, params, memory_bytes, metrics, step_seconds, values, state, reason),
    best_trials (numbers of those on the front), best, and plan.

    Example: horizonplan tune transformer --data mnist5k --trials 20 --epochs 2 --storage study.log --out plan.json
    """
    opt.exclude(plan=plan, blocks=blocks)
    for path in (out, plot):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent} for {path.name}; make it first")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    provided = partial(_training, data, batch_size, seed)
    validating = partial(_validation, data, val_data)
    study = tune_horizon(
        load_maker(model, provided(), seed),
        provided,
        val_data=validating,
        plan=None if plan is None else Plan.load(plan),
        storage=storage,
        trials=trials,
        epochs=epochs,
        metric=metric,
        optimizer=load_tunable(optimizer),
        learning_rates=_rates(learning_rates),
        max_warmup=max_warmup,
        space=load_space(space),
        schedules=schedules,
        memory_limit=memory_limit,
        workers=workers,
        prune=prune,
        seed=seed,
        name=name,
        timeout_seconds=timeout,
        loss=load_loss(loss),
        blocks=blocks,
        objective=AccuracyConstraint(epsilon),
        device=device,
    )
    _hand_over(study, out, plot, json)
    if not json:
        typer.echo(_command(study, model, data, optimizer, batch_size, out))


def _training(spec: str, batch_size: int | None, seed: int) -> Iterable[Any]:
    return load_data(spec, batch_size, seed, shuffle=True)[0]


def _validation(spec: str, own: str | None) -> Any:
    """The validation data; called in each trial, so that data need not travel."""
    found = load_data(spec, None, 0)[1] if own is None else load_data(own, None, 0)[0]
    if found is None:
        raise ValueError(f"data {spec!r}: it has nothing to validate on; give --val-data, or let it return a pair.")
    return found


def _rates(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    try:
        least, largest = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: give two numbers such as 1e-4,1e-2, or none", param_hint="--learning-rates"
        ) from None
    return least, largest


def _command(study: Study, model: str, data: str, optimizer: str, batch_size: int | None, out: Path | None) -> str:
    """How to train with the best trial's schedule *and* parameters: a plan has the schedule alone."""
    params = dict(study.params)
    words = ["horizonplan", "train", model, "--data", data, "--plan", str(out or "PLAN"), "--optimizer", optimizer]
    words += [] if batch_size is None else ["--batch-size", str(batch_size)]
    for name in ("lr", "warmup"):
        if name in params:
            words += [f"--{name}", f"{params.pop(name):.4g}"]
    told = "" if out else " (PLAN is what --out saves)"
    own = f", and with {', '.join(f'{k}={v}' for k, v in params.items())}" if params else ""
    return f"train as the best trial{told}: {shlex.join(words)}{own}"


def _hand_over(study: Study, out: Path | None, plot: Path | None, json: bool) -> None:
    """Save, print, then draw, so that a picture that cannot be drawn costs nothing else."""
    if out is not None and study.best_trials:
        study.plan.save(out)
    if json:
        opt.print_json(study.to_dict())
    else:
        typer.echo(str(study))
        typer.echo("->: the best; *: no trial is better in memory, metric and time")
    if plot is not None:
        study.plot(plot)
    study.best  # noqa: B018 - which raises if there is none
