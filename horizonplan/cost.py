"""What a plan's memory costs: a price, in units of the user's choice, as a function of peak bytes.

Any callable ``bytes -> float`` is a cost. Two come from Section 4 of "Unifying Back-Propagation and Forward-Forward
Algorithms through Model Predictive Control", both in nodes (one node is one device) of M0 bytes at a price c each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Self

from horizonplan.cards import Card, Nodes, as_card, nodes_for, priced
from horizonplan.units import format_bytes, parse_bytes

Cost = Callable[[int], float]


@dataclass(frozen=True)
class _NodeCost:
    kind: ClassVar[str]
    rule: ClassVar[str]
    unit_cost: float = 1.0
    node_memory: int | str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.unit_cost, Real) and not isinstance(self.unit_cost, bool)
        if not (number and 0 < self.unit_cost < math.inf):
            raise ValueError(f"unit_cost={self.unit_cost!r} is not a price; give a finite number > 0")
        if self.node_memory is not None:
            object.__setattr__(self, "node_memory", parse_bytes(self.node_memory, "node_memory"))

    @property
    def node_memory_bytes(self) -> int:
        """Bytes of one node; ValueError while they are unknown."""
        if self.node_memory is None:
            raise ValueError("node_memory=None, so nothing can be priced; give it, such as node_memory='24GiB'")
        return parse_bytes(self.node_memory, "node_memory")

    def with_node_memory(self, node_memory: int | str) -> Self:
        """Return a copy that knows its node's memory; self if it already does."""
        return replace(self, node_memory=node_memory) if self.node_memory is None else self


@dataclass(frozen=True)
class LinearCost(_NodeCost):
    r"""Memory can be bought in any amount: :math:`C(M) = c M / M_0`.

    Attributes:
        unit_cost: The price c of one node, in any currency; finite and positive.
        node_memory: Bytes M0 of one node, or ``"24GiB"``; None: to be filled in by ``with_node_memory``.

    Example:
        >>> LinearCost(unit_cost=3.0, node_memory="24GiB")(12 * 1024**3)
        1.5
    """

    kind: ClassVar[str] = "linear"
    rule: ClassVar[str] = "in proportion to the memory used"

    def __call__(self, memory_bytes: float) -> float:
        """Price of a peak of ``memory_bytes``. Raises ValueError while ``node_memory`` is None."""
        return float(self.unit_cost * (memory_bytes / self.node_memory_bytes))


@dataclass(frozen=True)
class LadderCost(_NodeCost):
    r"""Only whole nodes can be bought: :math:`C(M) = c \lceil M / M_0 \rceil`, in exact integer arithmetic.

    Attributes as for ``LinearCost``.

    Example:
        >>> cost = LadderCost(unit_cost=3.0, node_memory="24GiB")
        >>> cost(24 * 1024**3), cost(24 * 1024**3 + 1)
        (3.0, 6.0)
    """

    kind: ClassVar[str] = "ladder"
    rule: ClassVar[str] = "each node begun paid in full"

    def __call__(self, memory_bytes: float) -> float:
        """Price of a peak of ``memory_bytes``. Raises ValueError while ``node_memory`` is None."""
        return float(self.unit_cost * -(-math.ceil(memory_bytes) // self.node_memory_bytes))


@dataclass(frozen=True, init=False)
class MixedNodes:
    """Whole nodes of one kind, whichever of several cards is cheapest for a peak: the ladder cost of each, the least.

    A peak that needs several nodes is taken to be split over them, as in the paper's ladder; kinds are not mixed.

    Attributes:
        cards: The cards, each with memory and price; names of the table may be given for them.

    Raises:
        ValueError: There are no cards, one has no price or no memory, or two have one name.

    Example:
        >>> cost = MixedNodes([Card("small", "6GiB", 1.0), Card("large", "24GiB", 3.5)])
        >>> [str(cost.nodes(size * 2**30)) for size in (6, 12, 18, 24)], cost(24 * 2**30)
        (['1 x small', '2 x small', '3 x small', '1 x large'], 3.5)
    """

    kind: ClassVar[str] = "mixed"
    cards: tuple[Card, ...]

    def __init__(self, cards: Sequence[Card | str]) -> None:
        made = () if isinstance(cards, str) else tuple(as_card(card) for card in cards)
        if not made:
            raise ValueError(f"cards={cards!r}: give a list of Card, such as [Card('h200', price=3.5)]")
        for card in made:
            priced(card)
            if not isinstance(card.memory_bytes, int) or card.memory_bytes < 1:
                raise ValueError(f"memory_bytes={card.memory_bytes!r} of card {card.name!r}: give bytes >= 1")
        if len({card.name for card in made}) < len(made):
            raise ValueError(f"cards: {[card.name for card in made]} have a name twice; give each card once")
        object.__setattr__(self, "cards", made)

    def nodes(self, memory_bytes: float) -> Nodes:
        """The cheapest nodes that hold a peak; of equally dear ones the fewest, then the first card's."""
        return min((nodes_for(memory_bytes, card) for card in self.cards), key=lambda found: (found.price, found.count))

    def __call__(self, memory_bytes: float) -> float:
        """Price of a peak of ``memory_bytes``."""
        return self.nodes(memory_bytes).price


@dataclass(frozen=True)
class ForgottenCost:
    """A user's function read back from a file, which keeps its name but no code."""

    name: str

    def __call__(self, memory_bytes: float) -> float:
        """Raise ValueError: there is nothing to call."""
        raise ValueError(f"cost={self.name!r} was a function, and files store no code; pass cost= again")


def as_cost(cost: Cost | None, default_node_memory: int | str) -> Cost:
    """Complete a user's ``cost=``: None is a ``LinearCost``, and a node's memory left open is filled in."""
    if cost is not None and not callable(cost):
        raise ValueError(f"cost={cost!r} cannot be called; give LinearCost(), LadderCost() or a function of bytes")
    cost = LinearCost() if cost is None else cost
    return cost.with_node_memory(default_node_memory) if isinstance(cost, _NodeCost) else cost


def nodes_of(cost: Cost, memory_bytes: int) -> tuple[int, str] | None:
    """How many whole nodes a peak takes, and of what; ``None`` where the cost is not in whole nodes."""
    if isinstance(cost, MixedNodes):
        found = cost.nodes(memory_bytes)
        return found.count, found.card.name
    if isinstance(cost, LadderCost):
        return -(-memory_bytes // cost.node_memory_bytes), f"{format_bytes(cost.node_memory_bytes)}"
    return None


def describe(cost: Cost) -> str:
    """Say a cost in words, such as "1 a node of 24.0 GiB, in proportion to the memory used"."""
    if isinstance(cost, MixedNodes):
        return f"the cheapest whole nodes of one kind, of {'; '.join(card.describe() for card in cost.cards)}"
    if not isinstance(cost, _NodeCost):
        return f"the function {_name(cost)}"
    node = "unknown memory" if cost.node_memory is None else format_bytes(cost.node_memory_bytes)
    return f"{cost.unit_cost:g} a node of {node}, {cost.rule}"


def to_dict(cost: Cost) -> dict[str, Any]:
    """Write a cost as JSON-ready values; of a user's function only the name."""
    if isinstance(cost, MixedNodes):
        return {"kind": cost.kind, "cards": [asdict(card) for card in cost.cards]}
    if not isinstance(cost, _NodeCost):
        return {"kind": "callable", "name": _name(cost)}
    return {"kind": cost.kind, "unit_cost": cost.unit_cost, "node_memory_bytes": cost.node_memory}


def from_dict(data: Mapping[str, Any]) -> Cost:
    """Read what ``to_dict`` wrote; a user's function comes back as a ``ForgottenCost``."""
    kind = data.get("kind")
    if kind == "callable":
        return ForgottenCost(data["name"])
    if kind == "mixed":
        return MixedNodes([Card(**card) for card in data["cards"]])
    if kind not in ("linear", "ladder"):
        raise ValueError(f"kind={kind!r} is no cost; give 'linear', 'ladder', 'mixed' or 'callable'")
    priced = LinearCost if kind == "linear" else LadderCost
    return priced(data.get("unit_cost", 1.0), data.get("node_memory_bytes"))


def _name(cost: Cost) -> str:
    return cost.name if isinstance(cost, ForgottenCost) else getattr(cost, "__name__", type(cost).__name__)
