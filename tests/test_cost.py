"""Linear and ladder costs are the paper's formulas; anything callable is a cost."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizonplan import cost as costs
from horizonplan.cost import ForgottenCost, LadderCost, LinearCost, as_cost

BYTES = st.integers(0, 2**70)
NODES = st.integers(1, 2**50)
GIB = 2**30


def by_megabyte(memory_bytes: int) -> float:
    return memory_bytes / 1e6


@given(memory=BYTES, node=NODES)
def test_linear_cost_is_c_m_over_m0(memory, node):
    assert LinearCost(3.0, node)(memory) == pytest.approx(float(3 * Fraction(memory, node)), rel=1e-15)


@given(memory=BYTES, node=NODES)
def test_ladder_cost_is_c_times_the_exact_ceiling(memory, node):
    assert LadderCost(1.0, node)(memory) == float(math.ceil(Fraction(memory, node)))


def test_ladder_steps_one_byte_after_a_full_node_where_floats_cannot_tell():
    node = 2**60
    assert [LadderCost(2.0, node)(m) for m in (1, node, node + 1, 2 * node, 2 * node + 1)] == [2, 2, 4, 4, 6]


def test_ladder_takes_fitted_bytes_with_fractions():
    assert LadderCost(1.0, 100)(100.5) == 2.0


@pytest.mark.parametrize("kind", [LinearCost, LadderCost])
def test_node_memory_is_normalised_to_bytes(kind):
    assert kind(1.0, "24GiB") == kind(1.0, 24 * GIB)
    assert kind(1.0, "24GiB").node_memory_bytes == 24 * GIB
    assert hash(kind(1.0, "24GiB")) == hash(kind(1.0, 24 * GIB))


@pytest.mark.parametrize("kind", [LinearCost, LadderCost])
def test_open_node_memory_is_filled_in_once(kind):
    cost = kind(2.0)
    filled = cost.with_node_memory("1GiB")
    assert filled == kind(2.0, GIB)
    assert filled.with_node_memory("2GiB") is filled
    with pytest.raises(ValueError, match=r"node_memory=None.*give it"):
        cost(1)


def test_as_cost_completes_what_the_user_left_open():
    assert as_cost(None, "1GiB") == LinearCost(1.0, GIB)
    assert as_cost(LadderCost(2.0), GIB) == LadderCost(2.0, GIB)
    assert as_cost(LadderCost(2.0, 5), GIB) == LadderCost(2.0, 5)
    assert as_cost(by_megabyte, GIB) is by_megabyte
    with pytest.raises(ValueError, match=r"cost=3 cannot be called; give LinearCost"):
        as_cost(3, GIB)


@pytest.mark.parametrize("unit_cost", [0, -1.0, math.nan, math.inf, True, "2", None])
@pytest.mark.parametrize("kind", [LinearCost, LadderCost])
def test_unit_cost_must_be_a_price(kind, unit_cost):
    with pytest.raises(ValueError, match=r"unit_cost=.* give a finite number > 0"):
        kind(unit_cost=unit_cost)


@pytest.mark.parametrize("node_memory", [0, -1, "x", False, math.nan])
@pytest.mark.parametrize("kind", [LinearCost, LadderCost])
def test_node_memory_must_be_a_size(kind, node_memory):
    with pytest.raises(ValueError, match="node_memory="):
        kind(node_memory=node_memory)


@pytest.mark.parametrize("cost", [LinearCost(), LinearCost(2.5, "1GiB"), LadderCost(), LadderCost(3.0, 7)])
def test_costs_survive_json(cost):
    assert costs.from_dict(json.loads(json.dumps(costs.to_dict(cost)))) == cost


def test_the_stored_form_is_the_contract():
    assert costs.to_dict(LadderCost(2.0, "1GiB")) == {"kind": "ladder", "unit_cost": 2.0, "node_memory_bytes": GIB}
    assert costs.to_dict(LinearCost())["kind"] == "linear"


def test_a_function_is_stored_by_name_and_says_that_it_must_be_given_again():
    stored = costs.to_dict(by_megabyte)
    assert stored == {"kind": "callable", "name": "by_megabyte"}
    forgotten = costs.from_dict(stored)
    assert forgotten == ForgottenCost("by_megabyte")
    assert costs.to_dict(forgotten) == stored
    with pytest.raises(ValueError, match=r"cost='by_megabyte' was a function.*pass cost= again"):
        forgotten(1)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind='cubic' is no cost; give 'linear'"):
        costs.from_dict({"kind": "cubic"})


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (LinearCost(1.0, "24GiB"), "1 a node of 24.0 GiB, in proportion to the memory used"),
        (LadderCost(2.5), "2.5 a node of unknown memory, each node begun paid in full"),
        (by_megabyte, "the function by_megabyte"),
    ],
)
def test_costs_are_described_in_words(cost, words):
    assert costs.describe(cost) == words
