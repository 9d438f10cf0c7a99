"""Find the blocks of a model: the longest run of same-kind modules through which one tensor flows.

Candidates are the modules of one class (outermost ones, called once), all of them or those of one
parent; an ``nn.Sequential`` without such a run offers groups of children instead (each
parametrised child with the parameter-free ones after it). A candidate counts if it traces as a
chain with less in its gaps than in its blocks (counting parameters: the normalisations of a
post-norm transformer would also be cuts). The longest wins, gaps and bare layers counting against
it, then the outermost.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.chain.calls import handler, intercept, quiet, regrouped, training_mode
from horizonplan.chain.trace import WAYS_OUT, ChainError, trace

BARE_WEIGHT, BARE_GAPS = 0.5, 0.25


@dataclass(frozen=True)
class Found:
    """Blocks and their names; ``container``'s children are to be ``groups`` while the chain runs."""

    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    container: nn.Module | None = None
    groups: dict[str, nn.Module] = field(default_factory=dict)


def find_blocks(model: nn.Module, run: Callable[[], Tensor]) -> Found:
    """Find the blocks of ``model`` by trial forwards of ``run``.

    Raises:
        ChainError: no two modules form a chain.
    """
    calls = _calls(model, run)
    names = {m: n for n, m in model.named_modules()}
    reasons: list[tuple[bool, str]] = []
    best = _best(model, _runs(model, calls, names), run, reasons)
    if best is None:
        containers = [f for m in calls if isinstance(m, nn.Sequential) and (f := _groups(m, names, calls))]
        best = _best(model, containers, run, reasons)
    if best is None:
        likely = [reason.split(WAYS_OUT)[0].strip() for _, reason in sorted(reasons, key=lambda r: r[0])]
        tried = " Tried: " + " | ".join(likely[:4]) if likely else ""
        raise ChainError(f"blocks: no run of blocks found in {type(model).__name__}.{tried} {WAYS_OUT}")
    return best


def _best(
    model: nn.Module, runs: Sequence[Found], run: Callable[[], Tensor], reasons: list[tuple[bool, str]]
) -> Found | None:
    """The candidate of the largest score; what cannot beat the best so far is not tried."""
    best, score = None, 0.0
    for found in sorted(runs, key=_bound, reverse=True):
        if _bound(found) <= score:
            break
        scored = _score(model, found, run, reasons)
        if scored > score:
            best, score = found, scored
    return best


def _bound(found: Found) -> float:
    """What a candidate's score can be at most."""
    return len(found.blocks) * (BARE_WEIGHT if all(map(_is_bare, found.blocks)) else 1.0)


def refuse_layer_drop(model: nn.Module, found: Found, run: Callable[[], Tensor]) -> None:
    """Refuse models in train mode that skip blocks at random, as far as a trial can tell.

    A rate in a Hugging Face config tells; so does a module of the blocks' kind that runs in eval mode
    and not in train mode. A skip that no trial saw is refused in the step in which it happens.

    Raises:
        ChainError: blocks are skipped at random.
    """
    if not model.training:
        return
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(rate := getattr(config, name, 0), float | int) and rate > 0:
                raise ChainError(f"config.{name}={rate}: blocks are skipped at random (layer drop); set it to 0.")
    kinds = {type(block) for block in found.blocks}
    trained = set(_calls(model, run))
    try:
        with training_mode(model, False):
            evaluated = set(_calls(model, run))
    except Exception:  # a model may have no loss in eval mode; then this trial tells nothing
        return
    names = {m: n for n, m in model.named_modules()}
    if skipped := [names[m] for m in names if type(m) in kinds and m in evaluated - trained]:
        raise ChainError(f"blocks {skipped} run in eval mode but not in train mode (layer drop): switch that off.")


def _score(model: nn.Module, found: Found, run: Callable[[], Tensor], reasons: list[tuple[bool, str]]) -> float:
    """A candidate's score; 0 if it is no chain of blocks, and why not."""
    bare = all(map(_is_bare, found.blocks))
    label = f"{type(found.blocks[0]).__name__} x {len(found.blocks)}"
    try:
        with regrouped(found.container, found.groups):
            layout = trace(model, found.blocks, found.names, run)
    except ChainError as reason:
        reasons.append((bare, f"{label}: {reason}"))
        return 0.0
    within = _parameters(found.blocks)
    gaps = sum(p.numel() for p in {id(p): p for group in layout.before[1:] for p in group}.values())
    if gaps > within or (bare and (len(found.blocks) < 3 or gaps > within * BARE_GAPS)):
        reasons.append((bare, f"{label}: too much lies between them."))
        return 0.0
    return _bound(found) * within / (within + gaps)


def named_blocks(model: nn.Module, blocks: str | Sequence[str]) -> Found:
    """Blocks by a name pattern (``"encoder.layer.*"``), the name of a container, or a list of names.

    Raises:
        ValueError: a name or pattern matches nothing, or one module is named twice.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = _matches(modules, blocks) if isinstance(blocks, str) else [str(name) for name in blocks]
    for name in names:
        if name not in modules:
            raise ValueError(f"blocks: {name!r} is no submodule of {type(model).__name__}; see model.named_modules().")
    found = [modules[name] for name in names]
    if len(set(found)) < len(found):
        twice = next(name for i, name in enumerate(names) if modules[name] in found[:i])
        raise ValueError(f"blocks: {twice!r} is listed already under another name: one module cannot be two blocks.")
    if len(found) == 0:
        raise ValueError(f"blocks={blocks!r} is empty: name at least one submodule of {type(model).__name__}.")
    return Found(tuple(names), tuple(found))


def _matches(modules: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern in modules and isinstance(modules[pattern], nn.ModuleList | nn.Sequential):
        return [f"{pattern}.{child}" for child in modules[pattern]._modules]
    hits = [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
    outermost = [name for name in hits if not any(name.startswith(other + ".") for other in hits)]
    if not outermost:
        raise ValueError(f"blocks={pattern!r} matches no submodule; see model.named_modules() for the names.")
    return outermost


def _calls(model: nn.Module, run: Callable[[], Tensor]) -> list[nn.Module]:
    """Modules in the order in which their calls begin (a module called twice stands there twice)."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        calls.append(module)
        return original(*args, **kwargs)

    with quiet(model), torch.no_grad(), intercept({m: handler(note, m) for m in model.modules()}):
        run()
    return calls


def _runs(model: nn.Module, calls: list[nn.Module], names: dict[nn.Module, str]) -> list[Found]:
    """Runs of modules of one class, those with most parameters first."""
    count = Counter(calls)
    once = [m for m in calls if count[m] == 1 and names[m] and next(m.parameters(), None) is not None]
    by_class: dict[type, list[nn.Module]] = {}
    for module in once:
        by_class.setdefault(type(module), []).append(module)
    runs: dict[tuple[nn.Module, ...], Found] = {}
    for group in by_class.values():
        outermost = [m for m in group if not any(m is not other and m in set(other.modules()) for other in group)]
        parents: dict[str, list[nn.Module]] = {}
        for module in outermost:
            parents.setdefault(names[module].rpartition(".")[0], []).append(module)
        for blocks in (outermost, *parents.values()):
            blocks = _without_bare_head(blocks, once)
            if len(blocks) >= 2 and not _interleaved(model, blocks, names):
                runs[tuple(blocks)] = Found(tuple(names[b] for b in blocks), tuple(blocks))
    return sorted(runs.values(), key=lambda found: -_parameters(found.blocks))


def _is_bare(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _without_bare_head(blocks: list[nn.Module], once: list[nn.Module]) -> list[nn.Module]:
    """A bare last layer (no children) that changes the width and that nothing parametrised follows is the head."""
    if len(blocks) < 3 or not all(map(_is_bare, blocks)) or once[-1] is not blocks[-1]:
        return blocks
    *_, previous, last = (next(b.parameters()).shape[:1] for b in blocks)
    return blocks[:-1] if previous != last else blocks


def _interleaved(model: nn.Module, blocks: list[nn.Module], names: dict[nn.Module, str]) -> bool:
    """Bare layers of one ``nn.Sequential`` with other children between them: better as groups of children."""
    parents = {names[b].rpartition(".")[0] for b in blocks}
    parent = model.get_submodule(next(iter(parents)))
    if len(parents) > 1 or not isinstance(parent, nn.Sequential) or not all(map(_is_bare, blocks)):
        return False
    places = [list(parent).index(b) for b in blocks]
    return places != list(range(places[0], places[0] + len(places)))


def _groups(container: nn.Sequential, names: dict[nn.Module, str], calls: list[nn.Module]) -> Found | None:
    children = list(container._modules.items())
    heads = [
        i for i, (_, child) in enumerate(children) if child is not None and next(child.parameters(), None) is not None
    ]
    if calls.count(container) > 1 or len(heads) < 2:
        return None
    last = max(i for i, m in enumerate(calls) if m in set(container.modules()))
    followed = any(next(m.parameters(), None) is not None for m in calls[last + 1 :])
    starts = heads if followed else heads[:-1]
    ends = [*heads[1:], len(children)][: len(starts)]
    if len(starts) < 2:
        return None
    prefix = names[container] + "." if names[container] else ""
    groups: dict[str, nn.Module] = {name: child for name, child in children[: starts[0]] if child is not None}
    blocks = {}
    for start, end in zip(starts, ends, strict=True):
        members = [child for _, child in children[start:end] if child is not None]
        blocks[children[start][0]] = members[0] if len(members) == 1 else nn.Sequential(*members)
    groups |= blocks
    groups |= {name: child for name, child in children[ends[-1] :] if child is not None}
    return Found(tuple(prefix + name for name in blocks), tuple(blocks.values()), container, groups)


def _parameters(blocks: Sequence[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for b in blocks for p in b.parameters()}.values())
