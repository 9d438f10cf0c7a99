"""SGR against Algorithm 1 written out, against finite differences, and against the methods that it contains."""

import itertools

import local_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_oracle import LossAt, Run
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import horizonplan as hp
from horizonplan.algorithms import SGR, LocalLearning, SimplexETF, etf, heads, input_effects, partition, reconcile
from horizonplan.models import CharacterGPT, Patches, ResidualCNN, ResidualMLP, SequenceClassifier


def mlp(depth=6, width=8):
    return ResidualMLP(5, width, 4, depth, activation=torch.tanh), (torch.randn(7, 5), torch.arange(7) % 4)


def cnn():
    return ResidualCNN(1, (4, 6, 8), 2), (torch.randn(6, 1, 8, 8), torch.arange(6) % 10)


def vit():
    model = nn.Sequential(Patches(4), SequenceClassifier(16, 4, 10, width=12, depth=4, heads=2))
    return model, (torch.randn(5, 1, 8, 8), torch.arange(5) % 10)


def gpt():
    tokens = torch.randint(0, 11, (3, 7))
    return CharacterGPT(11, width=16, depth=4, heads=2, context=6), (tokens[:, :-1], tokens[:, 1:].clone())


MODELS = {"mlp": mlp, "cnn": cnn, "vit": vit, "gpt": gpt}


def built(name, dtype=torch.float64):
    torch.manual_seed(3)
    model, (x, y) = MODELS[name]()
    batch = (x.to(dtype) if x.is_floating_point() else x, y)
    model = model.to(dtype)
    return hp.Chain.from_model(model, batch), batch


def prepared(chain, batch, *arguments, **settings):
    method = SGR(*arguments, **settings)
    return method, method.prepare(chain, batch)


def own(method, chain, heads_module, batch, scale=1.0):
    """The gradients that the method accumulates, by parameter; everything cleared before and after."""
    every = [*chain.model.parameters(), *(heads_module.parameters() if heads_module is not None else [])]
    for p in every:
        p.grad = None
    method.backward(chain, batch, scale)
    found = {p: p.grad for p in every if p.grad is not None}
    for p in every:
        p.grad = None
    return found


def model_parts(chain):
    """Stem, blocks and head of the models above, as callables."""
    model = chain.model
    outer = None
    if isinstance(model, nn.Sequential):
        outer, model = model
    heads_of = {
        ResidualMLP: lambda: Run(model.head),
        ResidualCNN: lambda: Run(lambda x: x.mean((2, 3)), model.head),
        SequenceClassifier: lambda: Run(model.norm, lambda x: x.mean(1), model.head),
        CharacterGPT: lambda: Run(model.norm, model.head),
    }
    return Run(outer, model.stem), list(model.blocks), heads_of[type(model)]()


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def written_out(chain, batch, bounds, auxiliary, **how):
    """Algorithm 1 on a chain."""
    stem, blocks, head = model_parts(chain)
    x, y = batch
    runs = [Run(*blocks[a:b]) for a, b in itertools.pairwise(bounds)]
    runs[0].parts = [*stem.parts, *runs[0].parts]
    losses = [LossAt(part, cross_entropy, y) for part in auxiliary]
    last = LossAt(head, cross_entropy, y)
    last.parts = [head, *head.parts]
    buffers = {b: b.clone() for b in (*chain.model.buffers(), *(b for h in auxiliary for b in h.buffers()))}
    if not x.is_floating_point():  # tokens: the first module's input takes no gradient
        tokens, x = x, torch.zeros(1, dtype=torch.float64)
        runs[0].parts = [lambda _: tokens, *runs[0].parts]
    with sdpa_kernel(SDPBackend.MATH):
        found, values, terms = local_oracle.gradients(runs, [*losses, last], x, **how)
    with torch.no_grad():
        for b, value in buffers.items():
            b.copy_(value)
    return local_oracle.summed(found), values, terms


def assert_close(found, wanted, tolerance=1e-9):
    assert set(found) == set(wanted)
    for p, g in wanted.items():
        torch.testing.assert_close(found[p], g, rtol=tolerance, atol=tolerance)


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


def linear_chain(depth=4, width=5):
    """Linear blocks, and a head for each state such that all local losses are one function of the input."""
    torch.manual_seed(1)
    blocks = [nn.Linear(width, width, bias=False).double() for _ in range(depth)]
    head = nn.Linear(width, 3, bias=False).double()
    chain = hp.Chain(None, blocks, head, nn.CrossEntropyLoss())
    weights = [head.weight.detach()]
    for block in reversed(blocks[1:]):
        weights.insert(0, weights[0] @ block.weight.detach())

    def factory(place):
        made = nn.Linear(width, 3, bias=False).double()
        made.weight.data.copy_(weights[place.module])
        return made

    return chain, factory, (torch.randn(6, width, dtype=torch.float64), torch.arange(6) % 3)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_where_all_plain_regularisers_are_zero_the_gradient_is_back_propagations(weight):
    """Proposition 3.4."""
    chain, factory, batch = linear_chain()
    method, auxiliary = prepared(chain, batch, 4, weight=weight, normalize=False, heads=factory)
    found = own(method, chain, auxiliary, batch)
    assert all(term < 1e-28 for term in method.terms)
    exact = own(hp.algorithms.BackPropagation(), chain, None, batch)
    assert_close({p: g for p, g in found.items() if p in exact}, exact, 1e-12)


def test_where_only_the_normalised_regularisers_are_zero_it_is_another_gradient():
    chain, factory, batch = linear_chain()

    def loud(output, target):
        return 2 * F.cross_entropy(output, target)

    method, auxiliary = prepared(chain, batch, 4, weight=1.0, heads=factory, loss=loud)
    found = own(method, chain, auxiliary, batch)
    assert all(abs(term) < 1e-15 for term in method.terms)
    exact = own(hp.algorithms.BackPropagation(), chain, None, batch)
    torch.testing.assert_close(found[chain.blocks[0].weight], 2 * exact[chain.blocks[0].weight])


def two_linear_layers(seed, features=12, classes=4, rate=1e-2):
    """Proposition 3.5's model after one step, with the regulariser's part of it once as descent, once as Eq. 30 has it.

    The matrices carry one frame nearly onto itself, so that the regulariser is small.
    """
    torch.manual_seed(seed)
    frame = etf.simplex(features, classes, torch.float64)
    x0, y = torch.randn(features, dtype=torch.float64), torch.randint(0, classes, ())
    first = torch.randn(features, features, dtype=torch.float64) / features**0.5
    second = torch.eye(features, dtype=torch.float64) + 0.05 * torch.randn_like(first) / features**0.5

    def error(x):
        return frame.T @ ((frame @ x).softmax(0) - F.one_hot(y, classes))

    x1 = first @ x0
    x2 = second @ x1
    d1, d2 = error(x1), error(x2)
    gap = second.T @ d2 - d1
    new = (first - rate * d1.outer(x0)) @ x0
    plain = second - rate * d2.outer(x1)
    loss = [
        F.cross_entropy(frame @ w @ new, y) for w in (plain, plain - rate * d2.outer(gap), plain + rate * d2.outer(gap))
    ]
    assert 0.5 * gap.square().sum() < 0.02
    grown = (frame @ x2)[y] > (frame @ x1)[y]
    return grown, d1 @ x1 - d2 @ x2, -gap @ new, loss


def test_proposition_3_5_numerically():
    """One step's loss falls by the regulariser if, and only if, it moves x2 against the frame's gradient.

    The step of Eq. 30 adds ``-rate d2 (d1 - W2' d2)'``, which climbs the regulariser; with it the proposition holds
    where its proof's inequality does, ``d2 x2 <= d1 x1``. For a descent, which Eq. 35 and Algorithm 1 make, it holds
    where that inequality is reversed.
    """
    found = [two_linear_layers(seed) for seed in range(300)]
    for _, order, push, (plain, descent, printed) in found:
        assert (descent < plain) == (push < 0)
        assert (printed < plain) == (push > 0)
        if abs(order) > 0.05:  # otherwise the terms that the proof leaves out decide
            assert (descent < plain) == (order < 0)
    assert sum(abs(order) > 0.05 for _, order, _, _ in found) > 80
    grown = [losses for grown, _, _, losses in found if grown]
    assert sum(printed < plain for plain, _, printed in grown) > 0.7 * len(grown)
    assert sum(descent < plain for plain, descent, _ in grown) < 0.3 * len(grown)


@given(st.integers(2, 12), st.integers(0, 20), st.integers(0, 1000))
def test_the_frame_is_equiangular(classes, more, seed):
    """Eq. 7."""
    torch.manual_seed(seed)
    frame = etf.simplex(classes - 1 + more, classes, torch.float64)
    wanted = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(frame @ frame.T, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(frame.sum(0), torch.zeros(classes - 1 + more, dtype=torch.float64), rtol=0, atol=1e-12)


def test_too_few_features_for_a_frame_are_refused():
    with pytest.raises(ValueError, match="features=3: 10 classes need 2 classes and 9 features"):
        SimplexETF(3, 10)


class ThroughAutograd(nn.Module):
    """A frame whose gradient is not a formula."""

    def __init__(self, frame):
        super().__init__()
        self.frame = frame

    def forward(self, state):
        return self.frame(state)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_formulas_gradient_is_autograds(name, weight):
    chain, batch = built(name)
    if name == "gpt":
        batch[1][0, 2] = -100  # does not count
    torch.manual_seed(5)
    method, frames = prepared(chain, batch, 3, weight=weight, heads="etf", split="blocks")
    assert not list(frames.parameters())
    found = own(method, chain, frames, batch)
    torch.manual_seed(5)
    other, wrapped = prepared(
        chain, batch, 3, weight=weight, heads=lambda p: ThroughAutograd(heads.fixed(p)), split="blocks"
    )
    assert all(torch.equal(a.weight, b.frame.weight) for a, b in zip(frames, wrapped, strict=True))
    assert_close(found, own(other, chain, wrapped, batch))
    torch.testing.assert_close(torch.stack(method.local_losses), torch.stack(other.local_losses))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_the_split_in_memory_is_the_best_of_all(kept, data):
    modules = data.draw(st.integers(1, len(kept)))
    factor = data.draw(st.sampled_from([1, 2]))

    def sizes(inner):
        parts = [sum(kept[a:b]) for a, b in itertools.pairwise((0, *inner, len(kept)))]
        return [parts[0], *(factor * part for part in parts[1:])]

    def badness(bounds):
        found = sizes(bounds[1:-1])
        return max(found), sum(part**2 for part in found)

    every = [(0, *inner, len(kept)) for inner in itertools.combinations(range(1, len(kept)), modules - 1)]
    assert badness(partition.balanced(kept, modules, factor)) == min(map(badness, every))


def test_modules_can_be_cut_by_blocks_by_resolution_or_by_hand():
    chain, batch = built("cnn")
    for split, bounds in {"blocks": (0, 2, 4, 6), "resolution": (0, 2, 4, 6), (1, 5): (0, 1, 5, 6)}.items():
        assert prepared(chain, batch, 3, split=split)[0].bounds == bounds
    assert prepared(chain, batch, 2, weight=0)[0].bounds == (0, 1, 6)  # the first block keeps the stem's too
    with pytest.raises(ValueError, match="modules=2: the states have 3 resolutions"):
        prepared(chain, batch, 2, split="resolution")
    with pytest.raises(ValueError, match=r"give 1 growing numbers of blocks in 1\.\.5"):
        prepared(chain, batch, 2, split=[0])
    with pytest.raises(ValueError, match="modules=7: give a whole number between 1 and 6"):
        prepared(chain, batch, 7)


@pytest.mark.parametrize("normalize", [True, False])
def test_scale_is_a_factor_on_the_gradient(normalize):
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, normalize=normalize)
    plain = own(method, chain, auxiliary, batch)
    for scale in (3.0, torch.tensor(2.0**16, dtype=torch.float64)):
        assert_close(own(method, chain, auxiliary, batch, scale), {p: scale * g for p, g in plain.items()}, 1e-7)
    for nothing in (0.0, torch.tensor(0.0, dtype=torch.float64)):
        assert all((g == 0).all() for g in own(method, chain, auxiliary, batch, nothing).values())


def test_a_gradient_of_zero_is_in_no_direction():
    now = torch.tensor([[0.0, 0, 0], [3.0, 0, 0], [0, 0, 0]], requires_grad=True)
    value = reconcile.distance(now, torch.tensor([[1.0, 2, 2], [0, 0, 0], [0, 0, 0]]), normalize=True)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(2 / 9))  # a unit vector in two of three samples of three features
    assert torch.isfinite(now.grad).all()


def test_the_effect_of_earlier_updates_on_each_module():
    """Figure 3's diagnostic, for updates whose effect is known."""
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, split="blocks")
    first, last = chain.blocks[0].linear.weight, chain.blocks[5].linear.weight
    buffers = {n: v.clone() for n, v in chain.model.state_dict().items()}

    def moved(*parameters):
        def update():
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.1)

        return update

    assert input_effects(method, chain, batch, lambda: None) == [0, 0]
    assert input_effects(method, chain, batch, moved(last, *auxiliary.parameters())) == [0, 0]
    before = method.losses_on(chain, batch)
    found = input_effects(method, chain, batch, moved(first))
    after = method.losses_on(chain, batch)
    assert found == [after[1] - before[1], after[2] - before[2]]
    assert all(abs(effect) > 1e-6 for effect in found)
    wanted = {n: v + 0.1 * (n in ("blocks.0.linear.weight", "blocks.5.linear.weight")) for n, v in buffers.items()}
    assert all(torch.equal(v, wanted[n]) for n, v in chain.model.state_dict().items())


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


def test_local_losses_need_not_be_supervised():
    """Two views of each input are to be alike in their features, and the features unlike each other."""

    def twins(z, _):
        one, other = ((part - part.mean(0)) / (part.std(0) + 1e-3) for part in z.chunk(2))
        return (one.T @ other / len(one) - torch.eye(z.shape[1])).square().sum()

    torch.manual_seed(0)
    model = ResidualMLP(5, 8, 6, depth=4)
    batch = (torch.randn(16, 5), torch.zeros(16, dtype=torch.long))
    chain = hp.Chain.from_model(model, batch, loss=twins)
    method, auxiliary = prepared(chain, batch, 2, heads=lambda place: nn.Linear(8, 12), loss=twins)
    optimizer = torch.optim.Adam([*model.parameters(), *auxiliary.parameters()], lr=1e-2)
    start = method.losses_on(chain, batch)
    for _ in range(30):
        method.step(chain, batch, optimizer)
    assert all(after < 0.7 * before for before, after in zip(start, method.losses_on(chain, batch), strict=True))


def test_a_model_that_computes_its_own_loss_is_not_second_guessed():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    model, ids = transformers.GPT2LMHeadModel(config).train(), torch.randint(0, 20, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    chain = hp.Chain.from_model(model, batch)
    with pytest.raises(ValueError, match=r"loss: the model's is .* give the local losses' function"):
        prepared(chain, batch, 2)

    def next_token(scores, labels):
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    for settings in ({"heads": "own"}, {"loss": next_token}):
        method, auxiliary = prepared(chain, batch, 2, **settings)
        assert all(torch.isfinite(g).all() for g in own(method, chain, auxiliary, batch).values())
        assert len(method.terms) == 1


def test_an_operator_without_a_second_derivative_is_named():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Block(nn.Linear):
        def forward(self, x):
            return Twice.apply(super().forward(x))

    chain = hp.Chain(None, [Block(3, 3), Block(3, 3)], None, nn.MSELoss())
    batch = (torch.randn(2, 3), torch.randn(2, 3))
    method, auxiliary = prepared(chain, batch, 2)
    with pytest.raises(hp.ChainError, match=r"weight=1.0: .*set weight=0"):
        own(method, chain, auxiliary, batch)
    assert all(p.grad is None for p in chain.parameters())
    method, auxiliary = prepared(chain, batch, 2, weight=0)
    assert own(method, chain, auxiliary, batch)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"modules": 0}, "modules=0"),
        ({"modules": 2, "weight": -1}, "weight=-1"),
        ({"modules": 2, "weight": float("nan")}, "weight=nan"),
        ({"modules": 2, "heads": "big"}, "heads='big'"),
        ({"modules": 2, "heads": 3}, "heads=3"),
        ({"modules": 2, "split": "even"}, "split='even'"),
        ({"modules": 2, "only": 2, "weight": 0}, "only=2"),
        ({"modules": 2, "only": 1}, "only=1"),
        ({"modules": 2, "heads": "etf", "loss": F.mse_loss}, "loss: heads='etf'"),
    ],
)
def test_bad_settings_are_named(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        SGR(**settings)


def test_it_has_to_be_prepared_for_the_chain():
    chain, batch = built("mlp")
    with pytest.raises(ValueError, match="prepare"):
        SGR(2).backward(chain, batch)
    method, _ = prepared(chain, batch, 2)
    other, _ = built("mlp")
    with pytest.raises(ValueError, match="prepare"):
        method.backward(other, batch)


def test_a_chain_built_by_hand_trains_what_its_head_reads():
    torch.manual_seed(0)
    readout = nn.Linear(4, 3)
    relu = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    chain = hp.Chain(
        nn.Linear(2, 4), [nn.Linear(4, 4), relu, nn.Linear(4, 4)], lambda x: readout(x), nn.CrossEntropyLoss()
    )
    batch = (torch.randn(5, 2), torch.arange(5) % 3)
    method, auxiliary = prepared(chain, batch, 3)
    method.backward(chain, batch)
    assert all(p.grad is not None for p in (*readout.parameters(), *chain.parameters(), *auxiliary.parameters()))


def test_frozen_modules_pass_their_gradient_on():
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, split="blocks")
    full = own(method, chain, auxiliary, batch)
    frozen = [p for t in (0, 1) for p in chain.blocks[t].parameters()] + list(chain.model.stem.parameters())
    for p in frozen:
        p.requires_grad_(False)
    found = own(method, chain, auxiliary, batch)
    assert_close(found, {p: g for p, g in full.items() if not any(p is other for other in frozen)})
