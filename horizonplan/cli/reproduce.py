"""``horizonplan reproduce``: the paper's experiments, run again, with a page of what holds."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from horizonplan.cli import options as opt
from horizonplan.reproduce import EXPERIMENTS, Finding, Sources
from horizonplan.reproduce import reproduce as run_experiments

DATA_VARIABLE = "HORIZONPLAN_CIFAR"
ONLY = f"Experiments, with commas between: {', '.join(EXPERIMENTS)}. Default: all."
SCALE = "small: about 30 minutes of process time on one core. paper: the paper's sizes; for a GPU, and CIFAR is needed."
OUT = "Folder for pictures, tables and report.html. Start again with the same folder to go on after a kill."
SEEDS = (
    "Runs of each method, and draws of the theorem. Default: 3 of M1 and M2, 1 of ResNet-50 and ViT-B/16, 2 of the "
    "others, 5 draws."
)
DATA = f"Folder with CIFAR-10 (and CIFAR-100), unpacked. Default: ${DATA_VARIABLE}; without it, digits of MNIST."
TEXT = "Folder with MiniLM and the King James verses. Default: examples/data."
WEIGHTS = "Folder with resnet-50 and vit-base-patch16-224, for --scale paper."
DEVICE = "Where to train: cpu, cuda, cuda:1."


def reproduce(
    only: Annotated[str | None, Option(help=ONLY)] = None,
    scale: Annotated[Literal["small", "paper"], Option(help=SCALE)] = "small",
    out: Annotated[Path, Option(help=OUT)] = Path("paper"),
    seeds: Annotated[int | None, Option(min=1, help=SEEDS)] = None,
    data: Annotated[Path | None, Option(help=DATA)] = None,
    text: Annotated[Path | None, Option(help=TEXT)] = None,
    weights: Annotated[Path | None, Option(help=WEIGHTS)] = None,
    device: Annotated[str, Option(help=DEVICE)] = "cpu",
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Run the paper's experiments again; write pictures, tables and a page of which claims hold.

    Progress goes to standard error. Nothing is downloaded. --json prints the findings: for each experiment its name,
    caption, pictures, tables and claims with their verdicts.

    Example: horizonplan reproduce --only theorem,e1 --out paper
    """
    if data is None and os.environ.get(DATA_VARIABLE):
        data = Path(os.environ[DATA_VARIABLE])
    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    sources = Sources(images=data, text=text, weights=weights)
    found = run_experiments(out, names, scale, sources, seeds, device, lambda line: typer.echo(line, err=True))
    if json:
        opt.print_json([vars(f) | {"claims": [vars(claim) for claim in f.claims]} for f in found])
    else:
        typer.echo(_in_words(found, out))


def _in_words(found: list[Finding], out: Path) -> str:
    lines = [f"{f.name:8} {claim.verdict:16} {claim.says}" for f in found for claim in f.claims]
    return "\n".join([*lines, f"the page: {out / 'report.html'}"])
