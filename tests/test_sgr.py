"""SGR's gradient against Algorithm 1 written out, against finite differences, and against what it contains."""

import local_oracle
import pytest
import torch
from local_oracle import LossAt, Run
from sgr_cases import MODELS, assert_close, built, cross_entropy, model_parts, own, prepared, written_out
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import LocalLearning


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_algorithm_1_written_out(name, normalize):
    chain, batch = built(name)
    method, auxiliary = prepared(chain, batch, 3, weight=0.7, normalize=normalize)
    found = own(method, chain, auxiliary, batch)
    wanted, values, terms = written_out(chain, batch, method.bounds, auxiliary, weight=0.7, normalize=normalize)
    assert_close(found, wanted)
    torch.testing.assert_close(torch.stack(method.local_losses), torch.stack(values))
    torch.testing.assert_close(torch.stack(method.terms), torch.stack(terms))


def test_each_module_is_compared_with_the_one_right_before_it():
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3)
    how = {"weight": 1.0, "normalize": True}
    found = own(method, chain, auxiliary, batch)
    printed, _, _ = written_out(chain, batch, method.bounds, auxiliary, **how, only_first_delta=True)
    last = chain.blocks[-1].linear.weight
    assert not torch.allclose(found[last], printed[last], rtol=1e-3)
    second = chain.blocks[method.bounds[1]].linear.weight
    torch.testing.assert_close(found[second], printed[second])


@pytest.mark.parametrize("name", MODELS)
def test_without_weight_and_with_the_models_own_head_it_is_plain_local_learning(name):
    chain, batch = built(name, torch.float32)
    method, none = prepared(chain, batch, 3, weight=0, heads="own", split="blocks")
    assert none is None
    found = own(method, chain, None, batch)
    wanted = own(LocalLearning(3), chain, None, batch)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[p], g) for p, g in wanted.items())


@pytest.mark.parametrize("name", MODELS)
def test_without_weight_each_module_has_its_local_losss_gradient(name):
    chain, batch = built(name)
    method, auxiliary = prepared(chain, batch, 3, weight=0)
    found = own(method, chain, auxiliary, batch)
    wanted, values, _ = written_out(chain, batch, method.bounds, auxiliary, weight=0, normalize=True)
    assert_close(found, wanted)
    torch.testing.assert_close(torch.stack(method.local_losses), torch.stack(values))
    assert method.terms == ()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_regularisers_gradient_is_that_of_finite_differences(normalize):
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 2, weight=3.0, normalize=normalize, split="blocks")
    found = own(method, chain, auxiliary, batch)
    stem, blocks, head = model_parts(chain)
    first, second = Run(*stem.parts, *blocks[:3]), Run(*blocks[3:])
    _, value, _, x = local_oracle.objective(
        first, LossAt(auxiliary[0], cross_entropy, batch[1]), batch[0], None, 0, True
    )
    (delta,) = torch.autograd.grad(value, x)

    def objective():
        last = LossAt(head, cross_entropy, batch[1])
        return local_oracle.objective(second, last, x.detach(), delta, 3.0, normalize, create_graph=False)[0].item()

    step = 1e-5
    for p in (blocks[3].linear.weight, blocks[5].linear.bias, head.parts[0].weight):
        slopes = torch.zeros_like(p)
        with torch.no_grad():
            for i in range(min(p.numel(), 12)):
                entry = p.view(-1)[i : i + 1]
                entry += step
                with torch.enable_grad():
                    high = objective()
                entry -= 2 * step
                with torch.enable_grad():
                    low = objective()
                entry += step
                slopes.view(-1)[i] = (high - low) / (2 * step)
        torch.testing.assert_close(found[p].view(-1)[:12], slopes.view(-1)[:12], rtol=1e-6, atol=1e-9)


def test_no_gradient_reaches_earlier_modules():
    chain, batch = built("cnn")
    method, auxiliary = prepared(chain, batch, 3, weight=1.0)
    before = own(method, chain, auxiliary, batch)
    with torch.no_grad():
        chain.model.head.weight.mul_(-5)  # module 2's loss is another one now
    after = own(method, chain, auxiliary, batch)
    first = [p for t in range(method.bounds[2]) for p in chain.blocks[t].parameters()]
    assert all(torch.equal(before[p], after[p]) for p in (*first, *chain.model.stem.parameters()))
    last = chain.blocks[-1].conv2.weight
    assert not torch.equal(before[last], after[last])


@pytest.mark.parametrize("normalize", [True, False])
def test_scale_is_a_factor_on_the_gradient(normalize):
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, normalize=normalize)
    plain = own(method, chain, auxiliary, batch)
    for scale in (3.0, torch.tensor(2.0**16, dtype=torch.float64)):
        assert_close(own(method, chain, auxiliary, batch, scale), {p: scale * g for p, g in plain.items()}, 1e-7)
    for nothing in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert all((g == 0).all() for g in own(method, chain, auxiliary, batch, nothing).values())


def test_weights_of_several_modules_get_the_sum_at_once():
    chain, batch = built("gpt")
    model = chain.model
    model.head = nn.Linear(16, 11, bias=False).double()
    model.head.weight = model.stem[0].weight
    chain = hp.Chain.from_model(model, batch)
    method, auxiliary = prepared(chain, batch, 3)
    fired = []
    hook = model.head.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    found = own(method, chain, auxiliary, batch)
    hook.remove()
    wanted, _, _ = written_out(chain, batch, method.bounds, auxiliary, weight=1.0, normalize=True)
    assert_close(found, wanted)
    assert len(fired) == 1


def test_one_module_can_be_trained_alone():
    chain, batch = built("cnn")
    for k in range(3):
        method, auxiliary = prepared(chain, batch, 3, weight=0, only=k, split="blocks")
        found = own(method, chain, auxiliary, batch)
        trained = {p for t in range(2 * k, 2 * k + 2) for p in chain.blocks[t].parameters()}
        edge = chain.model.stem.parameters() if k == 0 else chain.model.head.parameters() if k == 2 else ()
        assert set(found) == trained | set(edge) | set(auxiliary.parameters() if auxiliary else ())


def test_frozen_modules_pass_their_gradient_on():
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, split="blocks")
    full = own(method, chain, auxiliary, batch)
    frozen = [p for t in (0, 1) for p in chain.blocks[t].parameters()] + list(chain.model.stem.parameters())
    for p in frozen:
        p.requires_grad_(False)
    found = own(method, chain, auxiliary, batch)
    assert_close(found, {p: g for p, g in full.items() if not any(p is other for other in frozen)})
