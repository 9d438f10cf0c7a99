"""``horizonplan fits``: whether a training step fits a card that is not there; a gate for continuous integration."""

from functools import partial
from typing import Annotated, Any

import typer
from torch import nn
from typer import Option

from horizonplan.cli import options as opt
from horizonplan.cli.spec import load_batch, load_model, load_optimizer, load_shapes
from horizonplan.devices import ASSUMED, Calibration
from horizonplan.fits import Fits, Sweep, sweep
from horizonplan.fits import fits as judge
from horizonplan.probes.simulation import SimulationError
from horizonplan.units import format_bytes, parse_bytes

LIMIT = 65536
BATCH = "module:function that returns one batch, or what --data takes, of which the first batch counts; or one of ours."
HORIZON = "Blocks that each gradient looks ahead. Default: all, which is back-propagation."


def fits(
    model: opt.Model,
    batch: Annotated[str, Option(help=BATCH)],
    device_memory: Annotated[str, Option(help="The card's memory, such as 24GiB.")],
    horizon: Annotated[int | None, Option(min=1, help=HORIZON)] = None,
    stride: opt.Stride = None,
    recompute: opt.Recompute = None,
    sweep: Annotated[bool, Option("--sweep", help="Find the largest batch size that fits, too.")] = False,
    limit: Annotated[int | None, Option(min=1, help=f"Largest size that --sweep tries. Default: {LIMIT}.")] = None,
    batch_size: opt.BatchSize = None,
    blocks: opt.Blocks = None,
    optimizer: opt.OptimizerName = "adamw",
    lr: opt.LearningRate = None,
    calibration: opt.CalibrationFile = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Predict the memory of a training step. Exit code 0 if it fits the card, 1 if not, 2 for an error.

    No card is needed, and MODEL is made without its values, on the device meta, where that can be. --json prints the
    verdict's fields; with --sweep also largest, smallest_too_large (null: none is), and tried, a list of batch_size,
    predicted_bytes, margin_bytes and ok.

    Example: horizonplan fits transformer --batch mnist5k --batch-size 256 --device-memory 24GiB --sweep
    """
    if stride is not None and horizon is None:
        raise typer.BadParameter("--stride needs --horizon")
    if limit is not None and not sweep:
        raise typer.BadParameter("--limit goes with --sweep")
    asked: dict[str, Any] = {
        "device_memory": parse_bytes(device_memory, "device_memory"),
        "horizon": horizon,
        "stride": stride or 1,
        "recompute": recompute or 0,
        "optimizer": load_optimizer(optimizer, lr),
        "blocks": blocks,
        "calibration": ASSUMED if calibration is None else Calibration.load(calibration),
    }
    verdict, found = _answer(model, load_batch(batch, batch_size), asked, (limit or LIMIT) if sweep else None)
    if json:
        opt.print_json(verdict.to_dict() | ({} if found is None else _as_dict(found)))
    else:
        typer.echo(verdict.explain())
        typer.echo("" if found is None else f"\n{_as_table(found)}\n", nl=False)
    if not verdict.ok:
        raise typer.Exit(1)


def _answer(spec: str, batch: Any, asked: dict[str, Any], limit: int | None) -> tuple[Fits, Sweep | None]:
    """The verdict on the batch, and the search for the largest that fits if there is a limit to it."""

    def ask(model: nn.Module) -> tuple[Fits, Sweep | None]:
        verdict = judge(model, batch, **asked)
        return verdict, None if limit is None else sweep(model, batch, limit=limit, **asked)

    shapes = load_shapes(spec, [batch], seed=0)
    try:
        return ask(shapes)
    except SimulationError as error:
        if not any(p.is_meta for p in shapes.parameters()):
            raise
        reason = error
    typer.echo(f"note: model {spec!r} is made with its values and run on the CPU: {reason}", err=True)
    return ask(load_model(spec, [batch], None, seed=0))


def _as_dict(found: Sweep) -> dict[str, Any]:
    names = "batch_size", "predicted_bytes", "margin_bytes", "ok"
    tried = [{name: getattr(verdict, name) for name in names} for verdict in found.tried]
    return {"largest": found.largest, "smallest_too_large": found.smallest_too_large, "tried": tried}


def _as_table(found: Sweep) -> str:
    line = partial("{:>10}  {:>10}  {:>11}  {}".format)
    lines = [line("batch size", "predicted", "with margin", "fits")]
    for verdict in found.tried:
        sizes = verdict.predicted_bytes, verdict.predicted_bytes + verdict.margin_bytes
        lines.append(line(verdict.batch_size, *map(format_bytes, sizes), "yes" if verdict.ok else "no"))
    least = found.smallest_too_large
    more = "the limit, so more may fit; raise --limit" if least is None else f"{least} does not fit"
    largest = f"largest batch size that fits: {found.largest} ({more})"
    return "\n".join([*lines, largest if found.largest else "not even one sample fits"])
