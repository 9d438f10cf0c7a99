"""``horizonplan train``: train a model with a plan, with a horizon of one's own, or with back-propagation."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from horizonplan.algorithms import BackPropagation, Horizon
from horizonplan.cli import options as opt
from horizonplan.cli.spec import load_data, load_model, load_optimizer
from horizonplan.plan import Plan
from horizonplan.training import train as run_training
from horizonplan.units import format_bytes, format_seconds

HORIZON = "Train without a plan: blocks that each gradient looks ahead. Default: all, which is back-propagation."


def train(
    model: opt.Model,
    data: opt.Data,
    plan: Annotated[Path | None, Option(help="Train with this plan, from `horizonplan plan --out`.")] = None,
    horizon: Annotated[int | None, Option(help=HORIZON)] = None,
    stride: opt.Stride = None,
    recompute: opt.Recompute = None,
    epochs: Annotated[int, Option(help="Passes over the data.")] = 1,
    run_dir: Annotated[Path | None, Option(help="Folder for log.jsonl, plan.json and the weights, model.pt.")] = None,
    batch_size: opt.BatchSize = None,
    blocks: opt.Blocks = None,
    optimizer: opt.OptimizerName = "adamw",
    lr: opt.LearningRate = None,
    device: opt.Device = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train MODEL; print loss, validation metrics, peak memory and time.

    --json prints final_loss, val_metrics, peak_bytes, step_seconds, horizon (null: all blocks) and stride.

    Example: horizonplan train transformer --data mnist5k --plan plan.json --epochs 5 --run-dir run
    """
    for name, value in {"horizon": horizon, "stride": stride, "recompute": recompute, "blocks": blocks}.items():
        opt.exclude(plan=plan, **{name: value})
    if stride is not None and horizon is None:
        raise typer.BadParameter("--stride needs --horizon")
    chosen = None if plan is None else Plan.load(plan)
    if chosen is not None:
        horizon, stride = chosen.horizon, chosen.stride
    method = BackPropagation(recompute or 0) if horizon is None else Horizon(horizon, stride or 1, recompute or 0)
    batches, validation = load_data(data, batch_size, seed, shuffle=True)
    result = run_training(
        load_model(model, batches, device, seed),
        batches,
        plan=chosen,
        algorithm=None if chosen is not None else method,
        epochs=epochs,
        val_data=validation,
        optimizer=load_optimizer(optimizer, lr),
        run_dir=run_dir,
        blocks=blocks,
        device=device,
        seed=seed,
    )
    if json:
        numbers = {name: getattr(result, name) for name in ("final_loss", "val_metrics", "peak_bytes", "step_seconds")}
        opt.print_json({**numbers, "horizon": horizon, "stride": stride or 1})
        return
    metrics = "".join(f"validation {name:17} {value:.4f}\n" for name, value in result.val_metrics.items())
    typer.echo(f"training loss, last epoch    {result.final_loss:.4f}")
    typer.echo(metrics, nl=False)
    typer.echo(f"peak memory of a step        {format_bytes(result.peak_bytes)}")
    typer.echo(f"time of a step / of all      {format_seconds(result.step_seconds)} / {format_seconds(result.seconds)}")
