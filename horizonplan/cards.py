"""Cards by name: what memory they have, and what an hour of one costs where that is known.

Memory is that of the vendors' data sheets, in units of 10^9 bytes. A driver shows a little more (an A100 of 80 GB has
81,920 MiB), so nothing is promised that is not there.

Prices change and differ between sellers. The table has one only with its day and where it was read; where there is
none, it is the user's to give. ``TABLE`` is an ordinary dictionary: replace its entries, or add your own cards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from horizonplan.units import format_bytes, parse_bytes

GB = 10**9


@dataclass(frozen=True)
class Price:
    """What an hour of one card costs.

    Attributes:
        hourly: the price.
        currency: in this currency.
        date: the day for which it was published, YYYY-MM-DD.
        source: what was read.
    """

    hourly: float
    currency: str
    date: str
    source: str


@dataclass(frozen=True)
class Entry:
    """A line of the table: a card's memory in bytes and, where one was checked, its price."""

    memory_bytes: int
    price: Price | None = None


TABLE: dict[str, Entry] = {
    "h200": Entry(141 * GB),
    "h100": Entry(80 * GB),
    "a100-80g": Entry(80 * GB),
    "a100-40g": Entry(40 * GB),
    "l40s": Entry(48 * GB),
    "a40": Entry(48 * GB),
    "a10g": Entry(
        24 * GB,
        Price(1.006, "USD", "2026-06-17", "AWS g5.xlarge, on demand, us-east-1, as listed by factualminds.com"),
    ),
    "l4": Entry(24 * GB),
    "t4": Entry(16 * GB),
    "v100": Entry(16 * GB),
    "v100-32g": Entry(32 * GB),
    "rtx4090": Entry(24 * GB),
    "rtx3090": Entry(24 * GB),
}
"""Cards by name; ``"v100"`` is the one of 16 GB."""


@dataclass(frozen=True)
class Card:
    """A card that can be had.

    Attributes:
        name: its name. A name of ``TABLE`` brings its memory, and its price where there is one.
        memory_bytes: its memory, in bytes or as ``"24GiB"``; None: the table's.
        price: what an hour of one costs; None: the table's. It may be None still, where nobody knows one.
        priced: where the table's price comes from, its date included; empty for the user's own.

    Raises:
        ValueError: the memory is not given, and the name is not in the table.

    Example:
        >>> Card("h200", price=3.5).memory_bytes, Card("h200").price
        (141000000000, None)
        >>> Card("mine", "24GiB", 1.0).memory_bytes
        25769803776
    """

    name: str
    memory_bytes: int = None  # type: ignore[assignment]  # None is filled in from the table
    price: float | None = None
    priced: str = ""

    def __post_init__(self) -> None:
        known = TABLE.get(self.name.lower()) if isinstance(self.name, str) else None
        if self.memory_bytes is None:
            if known is None:
                names = ", ".join(TABLE)
                raise ValueError(f"name={self.name!r} is no card of the table ({names}); give memory_bytes too.")
            object.__setattr__(self, "memory_bytes", known.memory_bytes)
        elif isinstance(self.memory_bytes, str):
            object.__setattr__(self, "memory_bytes", parse_bytes(self.memory_bytes, "memory_bytes"))
        if self.price is None and known is not None and known.price is not None:
            found = known.price
            object.__setattr__(self, "price", found.hourly)
            object.__setattr__(self, "priced", f"{found.currency} an hour, {found.date}, {found.source}")

    def describe(self) -> str:
        """Its name, memory and price in words."""
        price = "price unknown" if self.price is None else f"{self.price:g} an hour"
        return f"{self.name} ({format_bytes(self.memory_bytes)}, {price}{f': {self.priced}' if self.priced else ''})"


@dataclass(frozen=True)
class Nodes:
    """So many of one card, and what they cost together an hour."""

    card: Card
    count: int
    price: float

    def __str__(self) -> str:
        return f"{self.count} x {self.card.name}"


def as_card(given: Card | str) -> Card:
    """A card, or the table's card of that name."""
    return given if isinstance(given, Card) else Card(given)


def priced(card: Card) -> float:
    """The card's price.

    Raises:
        ValueError: nobody has said what it costs.
    """
    if card.price is None:
        raise ValueError(f"card {card.name!r}: no price is known of it; give one: Card({card.name!r}, price=...).")
    price = card.price
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
        raise ValueError(f"price={price!r} of card {card.name!r} is no price; give a finite number > 0.")
    return float(price)


def nodes_for(memory_bytes: float, card: Card) -> Nodes:
    """How many of one card hold a peak together, at least one."""
    count = max(1, -(-math.ceil(memory_bytes) // card.memory_bytes))
    return Nodes(card, count, count * priced(card))


def with_price(card: Card, price: float) -> Card:
    """The card at another price, which is then the user's."""
    return replace(card, price=price, priced="")
