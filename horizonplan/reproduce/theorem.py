"""Theorem 3.4 in numbers: how 1 - cos^2 shrinks as h/T goes to 1, in a deep linear network on whitened data.

    W(t) = I + V(t) / T,    L = 1/2 |W(T-1) ... W(0) - Phi|_F^2

The informal statement is an upper bound: 1 - cos^2 is O((1 - h/T)^3). The formal one (Eq. 26) holds h/T fixed while T
grows, and has a limit above 0: it is what is judged here, as it says more. The theorem bounds the norm of V(t) only.
Two kinds are tried: a *drift*, V(t) = V for all t, and *zero-mean* V(t), drawn anew for each t. Gradients are those of
the paper's Eq. 27, and beside them those of disjoint windows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horizonplan.reproduce import style
from horizonplan.reproduce.findings import FAILS, HOLDS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab
from horizonplan.reproduce.numbers import log_line, pm, spread

NAME, TITLE = "theorem", "Theorem 3.4: the cubic law of deep linear networks"
KINDS = {"drift": "V(t) = V, a fixed drift", "zero-mean": "V(t) drawn anew, zero mean"}
WIDTH, DEPTHS, SEEDS = 10, (32, 64, 128, 256, 512, 1024), 5
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.96, 0.97, 0.98)
WIDE, NEAR = (0.5, 0.95), (0.9, 0.98)  # ranges of h/T that a power is fitted to
ORDER, CLOSE, ROUGH = 3, 0.25, 0.75
DEEPER = 3  # of the depths, for that power
BOUNDED = 1.5  # growth over all depths of what should be bounded
HALF_A_BLOCK = 0.5  # a horizon is a whole number of blocks


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
    layers: Tensor = (eye + moves / depth).expand(depth, width, width)
    return layers, phi


def gradients(layers: Tensor, phi: Tensor, horizon: int, stride: int = 1) -> Tensor:
    """Eq. 27: the horizon gradient of every layer, ``(depth, width, width)``.

    ``g_h(t) = (W(e-1) ... W(t+1))^T (W(e-1) ... W(0) - Phi) (W(t-1) ... W(0))^T`` with e = min(t + h, T); with a stride
    s, e = min(s floor(t/s) + h, T).
    """
    products = [torch.eye(layers.shape[1], dtype=layers.dtype)]
    for layer in layers:
        products.append(layer @ products[-1])
    so_far = torch.stack(products)
    depth = len(layers)
    ends = so_far[(torch.arange(depth) // stride * stride + horizon).clamp(max=depth)]
    pulled = torch.linalg.solve(so_far[1:].mT, ends.mT @ (ends - phi))
    found: Tensor = pulled @ so_far[:-1].mT
    return found


def deviation(found: Tensor, exact: Tensor) -> float:
    """1 - cos^2 of two gradients, without the loss of digits that subtracting from 1 would bring."""
    a, b = found / found.norm(), exact / exact.norm()
    less = 0.5 * (a - b).square().sum()  # 1 - cos
    return float(less * (2 - less))


def run(lab: Lab, out: Path) -> Finding:
    """Compute, draw and judge."""
    draws = SEEDS if lab.seeds is None else lab.seeds
    settings = {"width": WIDTH, "depths": DEPTHS, "seeds": draws, "shares": SHARES, "strides": ("s = 1", "s = h")}
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        rows += lab.cells.get(f"{NAME}/{kind}", settings, partial(deviations, kind, DEPTHS, draws))
    powers = [
        {"kind": kind, "T": depth, "seed": seed, **_powers(rows, kind, depth, seed)}
        for kind in KINDS
        for depth in DEPTHS
        for seed in range(draws)
    ]
    _draw(rows, powers, out / f"{NAME}.png")
    tables = (write_table(out / f"{NAME}.csv", rows), write_table(out / f"{NAME}-powers.csv", powers))
    caption = (
        f"Left and middle: 1 - cos² against 1 - h/T for both kinds, mean over {draws} draws of width {WIDTH} (shaded: "
        f"their range), one line for each depth; dotted: the power {ORDER}; dashed: disjoint windows, s = h, at the "
        f"largest depth. Right: the power fitted over h/T from {WIDE[0]:g} to {WIDE[1]:g} and from {NEAR[0]:g} to "
        f"{NEAR[1]:g} (only depths that have enough horizons there), mean and deviation over the draws. Computed from "
        "Eq. 27; nothing is trained: no time to tell. Checkpointed back-propagation has the exact gradient: no "
        "line."
    )
    return Finding(NAME, TITLE, caption, (f"{NAME}.png",), tables, _claims(rows, powers))


def deviations(kind: str, depths: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """1 - cos^2 at every share h/T, depth and draw, of overlapping and of disjoint windows."""
    rows = []
    for depth in depths:
        for seed in range(seeds):
            layers, phi = weights(kind, depth, seed)
            exact = gradients(layers, phi, depth)
            for share in SHARES:
                h = round(share * depth)
                for stride, s in (("s = 1", 1), ("s = h", h)):
                    value = deviation(gradients(layers, phi, h, s), exact)
                    place = {"kind": kind, "T": depth, "seed": seed, "stride": stride}
                    rows.append({**place, "1-h/T": 1 - h / depth, "1-cos2": value})
    return rows


def power(rows: Sequence[dict[str, Any]], kind: str, depth: int, seed: int, shares: tuple[float, float]) -> float:
    """The power of 1 - h/T that fits one draw at stride 1 over a range of h/T; NaN for fewer than four horizons."""
    points = {
        row["1-h/T"]: row["1-cos2"]
        for row in rows
        if (row["kind"], row["T"], row["seed"], row["stride"]) == (kind, depth, seed, "s = 1")
        and shares[0] - HALF_A_BLOCK / depth <= 1 - row["1-h/T"] <= shares[1] + HALF_A_BLOCK / depth
    }
    return log_line(list(points), list(points.values())).slope if len(points) >= 4 else math.nan


def _powers(rows: Sequence[dict[str, Any]], kind: str, depth: int, seed: int) -> dict[str, float]:
    return {name: power(rows, kind, depth, seed, shares) for name, shares in (("wide", WIDE), ("near", NEAR))}


def _of(powers: Sequence[dict[str, Any]], kind: str, depth: int, name: str) -> list[float]:
    return [row[name] for row in powers if (row["kind"], row["T"]) == (kind, depth)]


def _claims(rows: Sequence[dict[str, Any]], powers: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    return tuple(_claim(rows, powers, kind, words) for kind, words in KINDS.items())


def _claim(rows: Sequence[dict[str, Any]], powers: Sequence[dict[str, Any]], kind: str, words: str) -> Claim:
    first, last = DEPTHS[0], DEPTHS[-1]
    off = abs(statistics.fmean(_of(powers, kind, last, "near")) - ORDER)
    size = {depth: statistics.fmean(_at_half(rows, kind, depth)) for depth in (first, last)}
    wide = {depth: pm(_of(powers, kind, depth, "wide")) for depth in (first, last)}
    growth = [
        log_line(DEPTHS[-DEEPER:], [scaled[depth] for depth in DEPTHS[-DEEPER:]]).slope
        for scaled in _scaled(rows, kind)
    ]
    moves = max(map(abs, growth))
    tops = {depth: max(scaled[depth] for scaled in _scaled(rows, kind)) for depth in (first, last)}
    return Claim(
        says=(
            "At a fixed h/T, 1 - cos² has a limit above zero as T goes to infinity, of order "
            f"(1 - h/T)^{ORDER} as h/T goes to 1; {words}."
        ),
        where="Theorem 3.4, formal statement (Eq. 26)",
        rule=(
            f"(1 - cos²)/(1 - h/T)^{ORDER} at a fixed h/T goes with a power of T (fitted to the {DEEPER} largest "
            f"depths) within {CLOSE} of zero at every h/T, and the power of 1 - h/T fitted to h/T from {NEAR[0]:g} to "
            f"{NEAR[1]:g} at T = {last} is within {CLOSE} of {ORDER}: {HOLDS}. Both within {ROUGH}: {PARTLY}. "
            f"Else: {FAILS}."
        ),
        found=(
            f"The power of T is between {min(growth):.2f} and {max(growth):.2f}. At T = {last} the power of 1 - h/T is "
            f"{pm(_of(powers, kind, last, 'near'))}. Over h/T from {WIDE[0]:g} to {WIDE[1]:g} it is {wide[first]} at "
            f"T = {first} and {wide[last]} at T = {last}. At h/T = {WIDE[0]:g}, 1 - cos² goes from {size[first]:.2e} "
            f"to {size[last]:.2e}, that is to {size[last] / size[first]:.2g} of "
            f"it, where T grows by {last / first:g}. The informal statement, an upper bound, "
            f"{HOLDS if tops[last] <= BOUNDED * tops[first] else FAILS}: of the measured h/T the largest "
            f"(1 - cos²)/(1 - h/T)^{ORDER} is {tops[first]:.2f} at T = {first} and {tops[last]:.2f} at T = {last}."
        ),
        verdict=judge(max(off, moves) <= CLOSE, max(off, moves) <= ROUGH),
    )


def _scaled(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[int, float]]:
    """(1 - cos^2) / (1 - h/T)^3 by depth, mean over the draws, for each share h/T that was measured."""
    values = {depth: _values(rows, kind, depth, "s = 1") for depth in DEPTHS}
    return [
        {
            depth: statistics.fmean(values[depth][left]) / left**ORDER
            for depth in DEPTHS
            for left in [_left(share, depth)]
        }
        for share in SHARES
    ]


def _left(share: float, depth: int) -> float:
    """1 - h/T at the whole number of blocks that is nearest to a share."""
    return 1 - round(share * depth) / depth


def _at_half(rows: Sequence[dict[str, Any]], kind: str, depth: int) -> list[float]:
    return _values(rows, kind, depth, "s = 1")[_left(WIDE[0], depth)]


def _values(rows: Sequence[dict[str, Any]], kind: str, depth: int, stride: str) -> dict[float, list[float]]:
    """1 - cos^2 of all draws, by 1 - h/T in rising order."""
    mine = [r for r in rows if (r["kind"], r["T"], r["stride"]) == (kind, depth, stride)]
    return {left: [r["1-cos2"] for r in mine if r["1-h/T"] == left] for left in sorted({r["1-h/T"] for r in mine})}


def _draw(rows: Sequence[dict[str, Any]], powers: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(1, 3, 11, 3.7)
    for panel, kind in zip(axes[0], KINDS, strict=False):
        _draw_kind(panel, rows, kind)
    style.legend(axes[0, 0])
    for kind, colour, mark in zip(KINDS, ("#3b6fb6", "#b5482a"), "os", strict=True):
        for name, shares, ls in (("near", NEAR, "-"), ("wide", WIDE, "--")):
            values = {depth: _of(powers, kind, depth, name) for depth in DEPTHS}
            known = {depth: found for depth, found in values.items() if not math.isnan(found[0])}
            means = [statistics.fmean(found) for found in known.values()]
            spreads = [spread(found) for found in known.values()]
            label = f"{kind}, h/T from {shares[0]:g} to {shares[1]:g}"
            options = {"ms": 4, "capsize": 2, "color": colour, "label": label}
            axes[0, 2].errorbar(list(known), means, spreads, fmt=f"{mark}{ls}", **options)
    axes[0, 2].axhline(ORDER, ls=":", color="0.4", label="the theorem")
    axes[0, 2].set_xscale("log", base=2)
    axes[0, 2].set_xticks(DEPTHS, map(str, DEPTHS))
    axes[0, 2].set(title="fitted power (stride 1)", xlabel="depth T", ylabel="power of 1 - h/T", ylim=(0, ORDER + 0.5))
    style.legend(axes[0, 2], loc="lower right", handlelength=3)
    style.save(made, path)


def _draw_kind(panel: Any, rows: Sequence[dict[str, Any]], kind: str) -> None:
    for colour, depth in zip(style.shades(len(DEPTHS)), DEPTHS, strict=True):
        values = _values(rows, kind, depth, "s = 1")
        lefts, means = list(values), [statistics.fmean(found) for found in values.values()]
        panel.loglog(lefts, means, "o-", ms=3, color=colour, label=f"T = {depth}")
        low, high = ([end(found) for found in values.values()] for end in (min, max))
        panel.fill_between(lefts, low, high, color=colour, alpha=0.15, lw=0)
    law = [means[-1] * (left / lefts[-1]) ** ORDER for left in lefts]
    panel.loglog(lefts, law, ":", color="0.4", label="the theorem")
    apart = _values(rows, kind, DEPTHS[-1], "s = h")
    means = [statistics.fmean(found) for found in apart.values()]
    panel.loglog(list(apart), means, "s--", ms=3, color=style.APART, label=f"s = h, T = {DEPTHS[-1]}")
    panel.set(title=KINDS[kind], xlabel="1 - h/T", ylabel="1 - cos²(θ)")
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
