"""Alternating minimisation against the paper's equations, written out."""

import copy

import pytest
import torch
from altmin_models import MODELS, Elman, perceptron
from altmin_oracle import Perceptron, columns, elman_codes, loss_of
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import AlternatingMinimization, Penalty
from horizonplan.algorithms.coactivation import Memory, coordinate_descent, rows, write


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(rows=7, inputs=6, classes=3):
    return torch.randn(rows, inputs, dtype=torch.double), torch.randint(0, classes, (rows,))


def swept(method, model, data, encode_only=False):
    """The sweep of a step that is not made."""
    chain = hp.Chain.from_model(model, data, blocks=[""])
    method.prepare(chain, data)
    mu = method.mu(0) if isinstance(method.mu, Penalty) else method.mu
    sweep = method._sweep(data, mu)
    sweep.encode()
    if not encode_only:
        with sweep.rest():
            sweep.move()
    return sweep


def oracle_of(model, method, activation=torch.tanh):
    layers = [(m.weight.detach(), m.bias.detach()) for m in model if isinstance(m, nn.Linear)]
    return Perceptron(layers, activation, method.mu, method.code_lr, method.code_steps, method.proximal)


@pytest.mark.parametrize("proximal", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_codes_and_weights_are_the_papers(steps, proximal, activation):
    method = AlternatingMinimization(code_steps=steps, proximal=proximal, mu=0.3, code_lr=0.05)
    model, data = perceptron(activation), batch()
    function = torch.tanh if activation is nn.Tanh else torch.relu
    oracle = oracle_of(model, method, function)
    codes = oracle.update_codes(*data)
    sweep = swept(method, model, data)
    assert len(sweep.codes) == len(codes) == 2
    for own, expected in zip(map(sweep.codes.get, range(2)), codes, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    wanted = oracle.update_weights(*data, codes, 0.5)
    method.step(sweep.chain, data, torch.optim.SGD(model.parameters(), lr=0.5))
    for module, (weight, bias) in zip((m for m in model if isinstance(m, nn.Linear)), wanted, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.bias.detach(), bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proximal", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_elman_network_has_a_code_at_every_time_step_and_on_its_output_sequence(steps, proximal):
    method = AlternatingMinimization(code_steps=steps, proximal=proximal, code_lr=0.05)
    model = Elman().double()
    x, y = torch.randn(6, 4, 3, dtype=torch.double), torch.randint(0, 3, (6,))
    sweep = swept(method, model, (x, y))
    codes = [sweep.codes[i] for i in range(5)]
    assert [tuple(code.shape) for code in codes] == [(6, 5)] * 4 + [(6, 4, 2)]
    forward = model.v(model.states(x)).detach()
    z = forward.requires_grad_()
    if steps == 1:
        (slope,) = torch.autograd.grad(loss_of(model.c(torch.relu(z).flatten(1)), y), z)
        torch.testing.assert_close(codes[4], z.detach() - 0.05 * slope, rtol=1e-12, atol=1e-12)

    def above(cells):
        return (codes[4] - model.v(torch.tanh(torch.stack(cells, 1)))).square().sum()

    cell = model.cell
    weights = [p.detach() for p in (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias_ih_l0 + cell.bias_hh_l0)]
    expected = elman_codes(weights, above, x, 0.05, steps, proximal)
    for own, code in zip(codes, expected, strict=False):
        torch.testing.assert_close(own, code, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", [False, True])
def test_a_cell_in_a_loop_is_the_same_as_the_layer(memory):
    data = torch.randn(6, 4, 3), torch.randint(0, 3, (6,))
    layer = Elman()
    loop = Elman(nn.RNNCell)
    loop.v.load_state_dict(layer.v.state_dict())
    loop.c.load_state_dict(layer.c.state_dict())
    loop.cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.cell.state_dict().items()})
    before = [p.detach().clone() for p in layer.parameters()]
    for model in (layer, loop):
        hp.train(model, [data], algorithm=AlternatingMinimization(memory=memory), epochs=3)
    moved = [torch.dist(p.detach(), old) > 1e-4 for p, old in zip(layer.parameters(), before, strict=True)]
    still = {"cell.bias_hh_l0"} if memory else set()  # a memory writes the sum of the two biases into the other one
    assert {n for (n, _), yes in zip(layer.named_parameters(), moved, strict=True) if not yes} == still
    for one, other in zip(layer.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_quadratic_terms_are_zero_at_the_forward_codes(name):
    make, data = MODELS[name]
    sweep = swept(AlternatingMinimization(), make(), data(), encode_only=True)
    codes = {i: code.detach() for i, code in sweep.codes.items()}
    sweep.codes = codes
    with sweep.rest():
        run, loss = sweep.again(None)
    assert set(codes) == set(sweep.links.coded) != set()
    for i, code in codes.items():
        assert torch.equal(run.predictions[i], code)
    assert torch.equal(loss, sweep.loss)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("proximal", [True, False])
def test_a_small_step_on_a_code_decreases_its_sub_problem(activation, proximal):
    method = AlternatingMinimization(code_lr=1e-3, proximal=proximal, mu=0.2)
    model, data = perceptron(activation), batch()
    oracle = oracle_of(model, method, torch.tanh if activation is nn.Tanh else torch.relu)
    sweep = swept(method, model, data)
    forward = oracle.encode(data[0])
    for level in range(2):
        problem = oracle.problem(level, [sweep.codes[i] for i in range(2)], forward, data[1])
        assert problem(sweep.codes[level]) < problem(forward[level])


def test_many_steps_reach_the_closed_form_optimum_of_the_quadratic_sub_problem():
    """Eq. 5, linear activation: (W^T W + 1) c = W^T (c_above - b) + c_forward; without its second term, W c = ..."""
    model, data = perceptron(nn.Identity), batch()
    weight, bias = model[2].weight.detach(), model[2].bias.detach()
    for proximal in (True, False):
        method = AlternatingMinimization(code_steps=1200, code_lr=0.2, proximal=proximal)
        sweep = swept(method, model, data)
        above, forward = sweep.codes[1] - bias, sweep.forward[0]
        assert (above - forward @ weight.T).abs().max() > 1e-2
        if proximal:
            eye = torch.eye(5, dtype=torch.double)
            optimum = torch.linalg.solve(weight.T @ weight + eye, (above @ weight + forward).T).T
            torch.testing.assert_close(sweep.codes[0], optimum)
        else:
            torch.testing.assert_close(sweep.codes[0] @ weight.T, above)


def test_the_first_step_does_not_see_the_proximal_term():
    found = []
    for proximal in (True, False):
        torch.manual_seed(0)
        model = perceptron().float()
        data = [(torch.randn(6, 6), torch.arange(6) % 3)]
        hp.train(model, data, algorithm=AlternatingMinimization(proximal=proximal), epochs=3)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["perceptron", "cnn", "elman"])
def test_small_moves_give_the_direction_of_back_propagation(name):
    """With a single small step on each code every layer's gradient is parallel to back-propagation's."""
    make, data = MODELS[name]
    model, data = make().double(), data()
    data = data[0].double(), data[1]
    chain = hp.Chain.from_model(model, data, blocks=[""])
    method = AlternatingMinimization(code_lr=1e-4)
    method.prepare(chain, data)
    method.step(chain, data, torch.optim.SGD(model.parameters(), lr=0.0))
    own = {n: p.grad.flatten() for n, p in model.named_parameters()}
    model.zero_grad()
    chain.loss(data).backward()
    for n, p in model.named_parameters():
        if name == "elman" and "cell" in n:  # time steps add up with different lengths
            continue
        exact = p.grad.flatten()
        assert (own[n] / own[n].norm()) @ (exact / exact.norm()) > 1 - 1e-5, n


def test_a_layers_rate_minimises_along_the_slope():
    """Eq. 5 with a linear activation, at the automatic rate: a longer or a shorter step is worse."""
    model, data = perceptron(nn.Identity), batch()
    method = AlternatingMinimization()
    sweep = swept(method, model, data)
    weight, bias = model[2].weight.detach(), model[2].bias.detach()
    move = sweep.codes[0] - sweep.forward[0]

    def value(factor):
        code = sweep.forward[0] + factor * move
        term = (sweep.codes[1] - code @ weight.T - bias).square().sum()
        return term + (factor * move).square().sum()

    assert value(1.0) < min(value(0.95), value(1.05))


# Memories


def test_memories_equal_the_batch_formulas():
    """Eq. 7: after several batches the memories are the sums over all of them, and the decayed ones are weighted."""
    layer = nn.Linear(4, 3).double()
    for decay in (1.0, 0.7):
        memory = Memory(layer, "layer")
        data = [(torch.randn(5, 4).double(), torch.randn(5, 3).double()) for _ in range(4)]
        for x, c in data:
            memory.forget(decay)
            memory.add(*rows(layer, (x,), c))
        a = torch.cat([x for x, _ in data])
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        c = torch.cat([c for _, c in data])
        weight = torch.tensor([decay ** (3 - k) for k in range(4) for _ in range(5)]).double()
        torch.testing.assert_close(memory.a, torch.einsum("n,ni,nj->ij", weight, a, a))
        torch.testing.assert_close(memory.b, torch.einsum("n,ni,nj->ij", weight, c, a))


def test_training_remembers_every_batch_as_it_was_coded():
    """The memories of a run are the sums over its batches' activations and moved codes."""
    model = perceptron()
    data = [batch() for _ in range(3)]
    chain = hp.Chain.from_model(model, data[0], blocks=[""])
    method = AlternatingMinimization(memory=True)
    memories = method.prepare(chain, data[0])
    optimizer = torch.optim.AdamW(model.parameters())
    a = b = 0
    for one in data:
        sweep = method._sweep(one, method.mu)
        sweep.encode()
        with sweep.rest():
            sweep.move()
        read = torch.cat([torch.tanh(sweep.codes[0]), torch.ones(7, 1)], 1)
        a, b = a + read.T @ read, b + sweep.codes[1].T @ read
        method.step(chain, one, optimizer)
    torch.testing.assert_close(memories[1].a, a)
    torch.testing.assert_close(memories[1].b, b)


def test_coordinate_descent_is_column_after_column():
    x = torch.randn(20, 6, dtype=torch.double)
    x[:, 2] = 0  # a silent input
    a, b, weight = x.T @ x, torch.randn(4, 6, dtype=torch.double), torch.randn(4, 6, dtype=torch.double)
    torch.testing.assert_close(coordinate_descent(weight, a, b), columns(weight, a, b))
    assert torch.equal(coordinate_descent(weight, a, b)[:, 2], weight[:, 2])


def test_a_fixed_linear_layer_is_fitted_to_least_squares():
    layer = nn.Linear(5, 3).double()
    memory = Memory(layer, "layer")
    x, c = torch.randn(40, 5, dtype=torch.double), torch.randn(40, 3, dtype=torch.double)
    memory.add(*rows(layer, (x,), c))
    before = (layer(x) - c).square().sum()
    for _ in range(200):
        write(layer, memory.fitted(layer))
        after = (layer(x) - c).square().sum()
        assert after <= before + 1e-9
        before = after
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), c).solution
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach(), solution.T)


@pytest.mark.parametrize("low", [1e-4, 1.0])
def test_columns_of_any_scale_are_fitted_in_single_precision(low):
    """Columns from ``low`` to 1e4, the bias among the smallest: relative to their scale, least squares."""
    scale = torch.logspace(torch.tensor(low).log10().item(), 4, 6)
    layer = nn.Linear(6, 3)
    memory = Memory(layer, "layer")
    x, c = torch.randn(60, 6) * scale, torch.randn(60, 3)
    memory.add(*rows(layer, (x,), c))
    for _ in range(100):
        write(layer, memory.fitted(layer))
    solution = torch.linalg.lstsq(torch.cat([x / scale, torch.ones(60, 1)], 1).double(), c.double()).solution
    found = torch.cat([layer.weight * scale, layer.bias.unsqueeze(1)], 1).detach()
    torch.testing.assert_close(found, solution.T.float(), rtol=1e-3, atol=1e-3)


LAYERS = {
    "linear": (nn.Linear(4, 3), (torch.randn(2, 5, 4),)),
    "linear, no bias": (nn.Linear(4, 3, bias=False), (torch.randn(6, 4),)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), (torch.randn(4, 2, 9),)),
    "conv2d": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (torch.randn(4, 2, 9, 8),)),
    "cell": (nn.RNNCell(3, 4), (torch.randn(6, 3), torch.randn(6, 4))),
    "cell, no bias": (nn.RNNCell(3, 4, bias=False), (torch.randn(6, 3), torch.randn(6, 4))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_linear_in_its_rows(name):
    """A memory of what a layer computed itself, rows in order, brings other weights back to computing that."""
    from horizonplan.algorithms.code_layers import cell

    layer, read = LAYERS[name]
    layer, read = copy.deepcopy(layer).double(), tuple(x.double() for x in read)

    def output():
        return (cell(layer, *read) if isinstance(layer, nn.RNNCell) else layer(*read)).detach()

    code = output()
    memory = Memory(layer, name)
    memory.add(*rows(layer, read, code))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    assert torch.dist(output(), code) > 1
    for _ in range(3000):
        write(layer, memory.fitted(layer))
    torch.testing.assert_close(output(), code, rtol=1e-4, atol=1e-4)


def test_mu_grows_as_in_the_appendix():
    penalty = Penalty(0.01, add=1e-3, factor=1.1, every=5, cap=0.05)
    mu, expected = 0.01, []
    for step in range(60):
        expected.append(mu)
        mu += 1e-3
        if (step + 1) % 5 == 0:
            mu *= 1.1
        mu = min(mu, 0.05)
    assert [penalty(step) for step in range(60)] == pytest.approx(expected)
    assert expected[-1] == 0.05 != expected[20]
    assert Penalty(1.0, factor=2.0, every=1)(10**6) == 1.5


@pytest.mark.parametrize(
    "bad",
    [{"start": 0}, {"start": 2.0}, {"start": 1, "add": -1}, {"start": 1, "factor": 0.5}, {"start": 1, "factor": 1.1}],
)
def test_a_penalty_that_does_not_grow_is_refused(bad):
    with pytest.raises(ValueError, match="give"):
        Penalty(**bad)
