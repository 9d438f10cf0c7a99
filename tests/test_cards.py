"""Cards by name, the nodes that hold a peak, and what they cost."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import horizonplan as hp
from horizonplan import cards, cost
from horizonplan.cards import TABLE, Card


def test_a_price_of_the_table_has_its_day_and_source_and_others_are_none():
    for name, entry in TABLE.items():
        assert name == name.lower()
        assert entry.memory_bytes % cards.GB == 0
        if entry.price is not None:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry.price.date)
            assert entry.price.source
            assert entry.price.date in Card(name).describe()
        else:
            assert Card(name).price is None
            with pytest.raises(ValueError, match=re.escape(f"Card({name!r}, price=...)")):
                hp.MixedNodes([name])


def test_the_user_s_price_and_memory_go_before_the_table_s():
    own = Card("a10g", price=0.5)
    assert (own.price, own.priced, own.memory_bytes) == (0.5, "", 24 * cards.GB)
    assert Card("A10G", "20GiB", 1.0).memory_bytes == 20 * 2**30
    assert cards.with_price(Card("a10g"), 2.0) == Card("a10g", price=2.0)
    with pytest.raises(ValueError, match=r"name='unheard-of'.*h200.*memory_bytes"):
        Card("unheard-of")


@given(
    memory=st.integers(1, 5000),
    sizes=st.lists(st.integers(10, 900), min_size=1, max_size=4),
    prices=st.lists(st.sampled_from([0.5, 1.0, 1.75, 3.0]), min_size=4, max_size=4),
)
def test_mixed_nodes_are_the_least_ladder(memory, sizes, prices):
    offers = [Card(str(i), size, price) for i, (size, price) in enumerate(zip(sizes, prices, strict=False))]
    mixed = hp.MixedNodes(offers)
    ladders = [hp.LadderCost(card.price, card.memory_bytes) for card in offers]
    assert mixed(memory) == min(ladder(memory) for ladder in ladders)
    found = mixed.nodes(memory)
    assert found.count * found.card.memory_bytes >= memory > (found.count - 1) * found.card.memory_bytes
    assert found.price == found.count * found.card.price == mixed(memory)
    assert cost.nodes_of(mixed, memory) == (found.count, found.card.name)
    prices_of = [mixed(m) for m in range(1, memory + 1, 97)]
    assert all(a <= b for a, b in pairwise(prices_of))


def test_one_card_is_a_ladder_and_comes_back_from_a_file():
    one = hp.MixedNodes([Card("h200", price=3.5), "a10g"])
    assert cost.from_dict(cost.to_dict(one)) == one
    assert one(1) == Card("a10g").price
    assert "h200 (131.3 GiB, 3.5 an hour)" in cost.describe(one)
    assert TABLE["a10g"].price.date in cost.describe(one)


@pytest.mark.parametrize(
    ("offers", "message"),
    [
        ([], "give a list of Card"),
        ("h200", "give a list of Card"),
        ([Card("h200")], "no price is known"),
        ([Card("h200", price=-1.0)], "price=-1.0"),
        ([Card("x", 0, 1.0)], "memory_bytes=0"),
        ([Card("x", 5, 1.0), Card("x", 6, 1.0)], "name twice"),
    ],
)
def test_what_is_no_offer_is_refused(offers, message):
    with pytest.raises(ValueError, match=message):
        hp.MixedNodes(offers)
