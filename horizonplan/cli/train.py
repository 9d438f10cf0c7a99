"""``horizonplan train``: train a model with a plan, with a horizon of one's own, or with back-propagation."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from horizonplan.algorithms import BackPropagation, Horizon
from horizonplan.cli import options as opt
from horizonplan.cli.spec import SCHEDULERS, load_data, load_loss, load_model, load_optimizer, load_scheduler
from horizonplan.plan import Plan
from horizonplan.training import EarlyStopping, Result, TensorBoard, Terminated
from horizonplan.training import train as run_training
from horizonplan.units import format_bytes, format_seconds

HORIZON = "Train without a plan: blocks that each gradient looks ahead. Default: all, which is back-propagation."
WARMUP = "Epochs of smaller horizons first, growing to that of the plan or to HORIZON."
RUN_DIR = "Folder for log.jsonl, plan.json, checkpoints and the weights, model.safetensors."
SCHEDULER = (
    f"Schedule of the learning rate: {', '.join(SCHEDULERS)}, or module:function from an Optimizer to a scheduler."
)
ACCUMULATE = "Batches whose gradients make one step."
SAVE_EVERY = "Steps between checkpoints. Default: one after each epoch."
RESUME = "Go on from the newest valid checkpoint in RUN_DIR, if there is one."
NONFINITE = "What to do when a loss or gradient is NaN or infinite: stop, skip the step, or roll back to a checkpoint."
PATIENCE = "Stop when the validation loss (without validation data: the loss) has not improved for so many epochs."
OOM = "How often, when memory runs out, a step is tried again with recompute or half the horizon."
COMPILE = "Compile each block with torch.compile."
FUSED = "Update each parameter as soon as its gradient is complete, and free the gradient."
WATCH = "Steps between measurements of a step's peak memory on a CPU; 0: the first two steps only."
COSINE = "Steps between measurements of the gradient's cosine; 0: none."

PRECISION = "Autocast around forwards. Default: the plan's, or fp32."


def train(
    model: opt.Model,
    data: opt.Data,
    plan: Annotated[Path | None, Option(help="Train with this plan, from `horizonplan plan --out`.")] = None,
    horizon: Annotated[int | None, Option(help=HORIZON)] = None,
    stride: opt.Stride = None,
    recompute: opt.Recompute = None,
    warmup: Annotated[int, Option(min=0, help=WARMUP)] = 0,
    epochs: Annotated[int, Option(min=1, help="Passes over the data.")] = 1,
    run_dir: Annotated[Path | None, Option(help=RUN_DIR)] = None,
    save_every: Annotated[int | None, Option(min=1, help=SAVE_EVERY)] = None,
    resume: Annotated[bool, Option("--resume", help=RESUME)] = False,
    batch_size: opt.BatchSize = None,
    blocks: opt.Blocks = None,
    optimizer: opt.OptimizerName = "adamw",
    lr: opt.LearningRate = None,
    loss: opt.Loss = None,
    scheduler: Annotated[str | None, Option(help=SCHEDULER)] = None,
    scheduler_every: Annotated[Literal["epoch", "step"], Option(help="How often it is stepped.")] = "epoch",
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, Option(help=PRECISION)] = None,
    accumulate: Annotated[int, Option(min=1, help=ACCUMULATE)] = 1,
    max_grad_norm: Annotated[float | None, Option(help="Clip the gradient's norm to this.")] = None,
    fused: Annotated[bool, Option("--fused", help=FUSED)] = False,
    compile: Annotated[bool, Option("--compile", help=COMPILE)] = False,
    patience: Annotated[int | None, Option(min=1, help=PATIENCE)] = None,
    nonfinite: Annotated[Literal["raise", "skip", "rollback"], Option(help=NONFINITE)] = "raise",
    oom_retries: Annotated[int, Option(min=0, help=OOM)] = 2,
    watch_every: Annotated[int, Option(min=0, help=WATCH)] = 100,
    cosine_every: Annotated[int, Option(min=0, help=COSINE)] = 0,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Write RUN_DIR/tensorboard, too.")] = False,
    device: opt.Device = None,
    seed: opt.Seed = 0,
    deterministic: Annotated[bool, Option("--deterministic", help="Only deterministic algorithms.")] = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train MODEL; print loss, validation metrics, peak memory and time.

    --json prints final_loss, val_metrics, peak_bytes, step_seconds, stopped (null: all epochs were made), horizon
    (null: all blocks) and stride. Exit code 143: SIGTERM came, and the run is saved in RUN_DIR. For several processes:
    torchrun --nproc-per-node N -m horizonplan train ...

    Example: horizonplan train transformer --data mnist5k --plan plan.json --epochs 5 --run-dir run
    """
    for name, value in {"horizon": horizon, "stride": stride, "recompute": recompute, "blocks": blocks}.items():
        opt.exclude(plan=plan, **{name: value})
    if stride is not None and horizon is None:
        raise typer.BadParameter("--stride needs --horizon")
    if run_dir is None:
        for name, given in {"resume": resume, "tensorboard": tensorboard, "save-every": save_every}.items():
            if given:
                raise typer.BadParameter(f"--{name} needs --run-dir")
    chosen = None if plan is None else Plan.load(plan)
    if chosen is not None:
        horizon, stride = chosen.horizon, chosen.stride
    method = BackPropagation(recompute or 0) if horizon is None else Horizon(horizon, stride or 1, recompute or 0)
    batches, validation = load_data(data, batch_size, seed, shuffle=True)
    callbacks: list[Any] = [TensorBoard()] if tensorboard else []
    if patience is not None:
        callbacks.append(EarlyStopping(patience, "loss" if validation is None else "val_loss"))
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        result = run_training(
            load_model(model, batches, device, seed),
            batches,
            plan=chosen,
            algorithm=None if chosen is not None else method,
            warmup=warmup,
            epochs=epochs,
            loss=load_loss(loss),
            blocks=blocks,
            device=device,
            optimizer=load_optimizer(optimizer, lr),
            scheduler=load_scheduler(scheduler, epochs),
            scheduler_every=scheduler_every,
            precision=precision,
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
            fused=fused,
            compile=compile,
            val_data=validation,
            callbacks=callbacks,
            watch_every=watch_every,
            cosine_every=cosine_every,
            run_dir=run_dir,
            save_every=save_every,
            resume=resume,
            nonfinite=nonfinite,
            oom_retries=oom_retries,
            seed=seed,
            deterministic=deterministic,
        )
    except Terminated as end:
        if first:
            typer.echo(str(end), err=True)
        raise
    if first:
        _print(result, json, horizon, stride)


def _print(result: Result, json: bool, horizon: int | None, stride: int | None) -> None:
    if json:
        names = "final_loss", "val_metrics", "peak_bytes", "step_seconds", "stopped"
        opt.print_json({n: getattr(result, n) for n in names} | {"horizon": horizon, "stride": stride or 1})
        return
    metrics = "".join(f"validation {name:17} {value:.4f}\n" for name, value in result.val_metrics.items())
    typer.echo(f"training loss, last epoch    {result.final_loss:.4f}")
    typer.echo(metrics, nl=False)
    typer.echo(f"peak memory of a step        {format_bytes(result.peak_bytes)}")
    typer.echo(f"time of a step / of all      {format_seconds(result.step_seconds)} / {format_seconds(result.seconds)}")
    if result.stopped is not None:
        typer.echo(f"stopped early: {result.stopped}")
