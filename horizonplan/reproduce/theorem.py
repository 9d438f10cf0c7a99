"""Theorem 3.4 in numbers: how 1 - cos^2 shrinks as h/T goes to 1, in a deep linear network on whitened data.

    W(t) = I + V(t) / T,    L = 1/2 |W(T-1) ... W(0) - Phi|_F^2

The theorem bounds the norm of V(t) only. Two kinds are tried: a *drift*, V(t) = V for all t, and *zero-mean* V(t), drawn
anew for each t. Gradients are those of the paper's Eq. 27.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horizonplan.reproduce import style
from horizonplan.reproduce.findings import FAILS, HOLDS, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab
from horizonplan.reproduce.numbers import Line, log_line, pm

NAME, TITLE = "theorem", "Theorem 3.4: the cubic law of deep linear networks"
KINDS = {"drift": "V(t) = V, a fixed drift", "zero-mean": "V(t) drawn anew, zero mean"}
WIDTH, DEPTHS, SEEDS = 10, (32, 64, 128, 256, 512, 1024), 5
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
ORDER, TOLERANCE = 3, 0.5


def weights(kind: str, depth: int, seed: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """The layers ``(depth, width, width)`` and Phi ``(width, width)``, in double precision.

    Entries of V and Phi are normal with variance 1/width, so that norms stay bounded as the width grows.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 1 if kind == "drift" else depth
    scale = width**-0.5
    phi = scale * torch.randn(width, width, generator=generator, dtype=torch.float64)
    moves = scale * torch.randn(count, width, width, generator=generator, dtype=torch.float64)
    eye = torch.eye(width, dtype=torch.float64)
    return (eye + moves / depth).expand(depth, width, width), phi


def gradients(layers: Tensor, phi: Tensor, horizon: int) -> Tensor:
    """Eq. 27: the horizon gradient of every layer, ``(depth, width, width)``.

    ``g_h(t) = (W(e-1) ... W(t+1))^T (W(e-1) ... W(0) - Phi) (W(t-1) ... W(0))^T`` with e = min(t + h, T).
    """
    products = [torch.eye(layers.shape[1], dtype=layers.dtype)]
    for layer in layers:
        products.append(layer @ products[-1])
    so_far = torch.stack(products)
    depth = len(layers)
    ends = so_far[(torch.arange(depth) + horizon).clamp(max=depth)]
    pulled = torch.linalg.solve(so_far[1:].mT, ends.mT @ (ends - phi))
    return pulled @ so_far[:-1].mT


def deviation(found: Tensor, exact: Tensor) -> float:
    """1 - cos^2 of two gradients, without the loss of digits that subtracting from 1 would bring."""
    a, b = found / found.norm(), exact / exact.norm()
    less = 0.5 * (a - b).square().sum()  # 1 - cos
    return float(less * (2 - less))


def run(lab: Lab, out: Path) -> Finding:
    """Compute, draw and judge."""
    settings = {"width": WIDTH, "depths": DEPTHS, "seeds": SEEDS, "shares": SHARES}
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        rows += lab.cells.get(f"{NAME}/{kind}", settings, lambda kind=kind: deviations(kind, DEPTHS, SEEDS))
    slopes = [
        {"kind": kind, "T": depth, "seed": seed, **vars(slope(rows, kind, depth, seed))}
        for kind in KINDS
        for depth in DEPTHS
        for seed in range(SEEDS)
    ]
    _draw(rows, slopes, out / f"{NAME}.png")
    tables = (write_table(out / f"{NAME}.csv", rows), write_table(out / f"{NAME}-slopes.csv", slopes))
    caption = (
        f"Left and middle: 1 - cos² against 1 - h/T for both kinds, mean over {SEEDS} draws of width {WIDTH}, one line "
        f"for each depth; dotted: the power {ORDER}. Right: the power fitted over h/T from {SHARES[0]:g} to "
        f"{SHARES[-1]:g}, mean and deviation over the draws. Computed from Eq. 27; nothing is trained."
    )
    return Finding(NAME, TITLE, caption, (f"{NAME}.png",), tables, _claims(rows, slopes))


def deviations(kind: str, depths: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """1 - cos^2 at every share h/T, depth and draw."""
    rows = []
    for depth in depths:
        for seed in range(seeds):
            layers, phi = weights(kind, depth, seed)
            exact = gradients(layers, phi, depth)
            for share in SHARES:
                value = deviation(gradients(layers, phi, round(share * depth)), exact)
                left = 1 - round(share * depth) / depth
                rows.append({"kind": kind, "T": depth, "seed": seed, "1-h/T": left, "1-cos2": value})
    return rows


def slope(rows: Sequence[dict[str, Any]], kind: str, depth: int, seed: int) -> Line:
    """The power that was fitted, for one draw."""
    mine = [row for row in rows if (row["kind"], row["T"], row["seed"]) == (kind, depth, seed)]
    return log_line([row["1-h/T"] for row in mine], [row["1-cos2"] for row in mine])


def _of(slopes: Sequence[dict[str, Any]], kind: str, depth: int) -> list[float]:
    return [row["slope"] for row in slopes if (row["kind"], row["T"]) == (kind, depth)]


def _claims(rows: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    first, last = DEPTHS[0], DEPTHS[-1]
    claims = []
    for kind, words in KINDS.items():
        means = [statistics.fmean(_of(slopes, kind, depth)) for depth in DEPTHS]
        near = abs(means[-1] - ORDER) <= TOLERANCE
        size = {depth: statistics.fmean(_at_half(rows, kind, depth)) for depth in (first, last)}
        claims.append(
            Claim(
                says=f"1 - cos² is of order (1 - h/T)^{ORDER} as h/T goes to 1, T to infinity; {words}.",
                where="Theorem 3.4",
                rule=(
                    f"The mean power at T = {last} is within {TOLERANCE} of {ORDER}: {HOLDS}, if it also is nearer than "
                    f"at T = {first}; partly, if only one of the two; else {FAILS}."
                ),
                found=(
                    f"The power is {pm(_of(slopes, kind, first))} at T = {first} and {pm(_of(slopes, kind, last))} at "
                    f"T = {last}. At h/T = {SHARES[0]:g}, 1 - cos² goes from {size[first]:.2e} to {size[last]:.2e}, by a "
                    f"factor of {size[first] / size[last]:.2g} where T grows by {last / first:g}."
                ),
                verdict=judge(
                    near and abs(means[-1] - ORDER) < abs(means[0] - ORDER),
                    near or abs(means[-1] - ORDER) < abs(means[0] - ORDER),
                ),
            )
        )
    return tuple(claims)


def _at_half(rows: Sequence[dict[str, Any]], kind: str, depth: int) -> list[float]:
    wanted = 1 - round(SHARES[0] * depth) / depth
    return [r["1-cos2"] for r in rows if (r["kind"], r["T"]) == (kind, depth) and r["1-h/T"] == wanted]


def _draw(rows: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(1, 3, 10.5, 3.5)
    for panel, kind in zip(axes[0], KINDS, strict=False):
        for colour, depth in zip(style.shades(len(DEPTHS)), DEPTHS, strict=True):
            mine = [row for row in rows if (row["kind"], row["T"]) == (kind, depth)]
            lefts = sorted({row["1-h/T"] for row in mine})
            means = [statistics.fmean(r["1-cos2"] for r in mine if r["1-h/T"] == left) for left in lefts]
            panel.loglog(lefts, means, "o-", ms=3, color=colour, label=f"T = {depth}")
        ends = [lefts[0], lefts[-1]]
        panel.loglog(ends, [means[-1] * (left / lefts[-1]) ** ORDER for left in ends], ":", color="0.4")
        panel.set(title=KINDS[kind], xlabel="1 - h/T", ylabel="1 - cos²(θ)")
    style.legend(axes[0, 0])
    for kind, colour, mark in zip(KINDS, ("#3b6fb6", "#b5482a"), "os", strict=True):
        values = [_of(slopes, kind, depth) for depth in DEPTHS]
        axes[0, 2].errorbar(
            DEPTHS,
            [statistics.fmean(v) for v in values],
            [statistics.stdev(v) for v in values],
            fmt=f"{mark}-",
            ms=4,
            capsize=2,
            color=colour,
            label=kind,
        )
    axes[0, 2].axhline(ORDER, ls=":", color="0.4", label="the theorem")
    axes[0, 2].set_xscale("log", base=2)
    axes[0, 2].set(title="fitted power", xlabel="depth T", ylabel="power of 1 - h/T", ylim=(0, ORDER + 1))
    style.legend(axes[0, 2], loc="lower right")
    style.save(made, path)
