"""Which layers of a model get a local loss, with which transfer function, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from horizonplan.algorithms.layers import Layer, Weighted, feature_dim, refusal
from horizonplan.algorithms.matching import matching
from horizonplan.algorithms.sightings import Sight, sightings
from horizonplan.algorithms.transfer import LINEAR, Transfer, named
from horizonplan.chain import Chain

Transfers = Mapping[str, "Transfer | str | None"]


@dataclass(frozen=True)
class Treated:
    """What was found.

    Attributes:
        layers: those with a local loss, in the order of their calls.
        left: name -> reason, of the modules with trainable parameters that take the ordinary gradient.
    """

    layers: tuple[Layer, ...]
    left: dict[str, str]


def treat(chain: Chain, batch: Any, variant: str, transfers: Transfers) -> Treated:
    """Find a model's layers and their transfer functions, by up to three trial forwards that change nothing.

    Args:
        chain: the model.
        batch: a batch as in training.
        variant: of LocoProp; S asks for no transfer function, Poco's for one that is a module of its own.
        transfers: layer name, or a pattern of names -> transfer function, which is then not looked for; ``None``: the
            layer takes the ordinary gradient.

    Raises:
        ValueError: ``transfers`` names no layer, or a function that is not known.
    """
    modules = {m: name for name, m in chain.model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    shared = _shared(modules)
    reasons = {m: refusal(m, shared) for m in modules}
    candidates = {m: name for m, name in modules.items() if isinstance(m, Weighted) and reasons[m] is None}
    given = _given(transfers, candidates, {name: reasons[m] for m, name in modules.items()})
    seen, calls = sightings(chain, batch, candidates)
    last = next(reversed(seen), None)
    layers = []
    left = {name: why for m, name in modules.items() if (why := reasons[m]) is not None and _trains(m)}
    for module, sight in seen.items():
        name = candidates[module]
        wanted = given.get(module, sight.transfer)
        if calls[name] > 1:
            found: Layer | str = f"it is called {calls[name]} times in a forward"
        elif module is last and variant == "M" and module not in given and (match := matching(chain, batch, module)):
            found = Layer(name, module, match)
        else:
            found = _layer(name, module, sight, wanted, variant, module in given)
        if isinstance(found, str):
            left[name] = found
        else:
            layers.append(found)
    return Treated(
        tuple(layers),
        left | {name: "a trial forward did not call it" for m, name in candidates.items() if m not in seen},
    )


def _layer(
    name: str, module: Weighted, sight: Sight, wanted: Transfer | None, variant: str, given: bool
) -> Layer | str:
    """A layer with what its variant needs, or why that is missing."""
    if given and wanted is None:
        return "transfers= says so"
    if variant == "S":
        return Layer(name, module, LINEAR)
    if wanted is None:
        return "the activation after it has no matching loss"
    if variant == "M" or wanted == LINEAR:
        return Layer(name, module, wanted)
    if sight.follower is None or sight.transfer == LINEAR:  # a module before f, a flattening say
        return f"{wanted} after it is not computed by a module of its own"
    return Layer(name, module, wanted, sight.follower)


def _given(
    transfers: Transfers, candidates: Mapping[Weighted, str], reasons: Mapping[str, str | None]
) -> dict[Weighted, Transfer | None]:
    """The transfer functions that the user gave, by layer; the last pattern that fits counts.

    Raises:
        ValueError: a pattern that fits no layer, or a value that is no transfer function.
    """
    found: dict[Weighted, Transfer | None] = {}
    for pattern, value in transfers.items():
        fitting = [m for m, name in candidates.items() if fnmatchcase(name, pattern)]
        why = next((f" ({why})" for name, why in reasons.items() if why and fnmatchcase(name, pattern)), "")
        if not fitting and value is not None:
            raise ValueError(
                f"transfers: {pattern!r} names no layer{why}; layers are {', '.join(candidates.values())}."
            )
        for m in fitting:
            found[m] = named(value, feature_dim(m)) if isinstance(value, str) else value
    return found


def _shared(modules: Mapping[nn.Module, str]) -> set[int]:
    """Ids of the parameters that several modules have."""
    counts = Counter(id(p) for m in modules for p in m.parameters(recurse=False))
    return {i for i, count in counts.items() if count > 1}


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
