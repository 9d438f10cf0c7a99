"""The models that ship: shapes, the depth a chain finds, and back-propagation as the longest horizon."""

import pytest
import torch
from torch import nn

from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.models import CharacterGPT, Patches, ResidualCNN, ResidualLinear, ResidualMLP, SequenceClassifier


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def classes(*shape, of=10):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(2))


def image_transformer():
    return nn.Sequential(Patches(4), SequenceClassifier(16, length=4, classes=10, width=16, depth=3, heads=2))


# name: make the model, a batch, the depth, the shapes of its states
FAMILIES = {
    "mlp": (lambda: ResidualMLP(6, 8, 4, depth=5), (values(3, 6), values(3, 4)), 5, [(3, 8)] * 6),
    "linear": (lambda: ResidualLinear(8, 8, 8, depth=13), (values(3, 8), values(3, 8)), 13, [(3, 8)] * 14),
    "cnn": (
        lambda: ResidualCNN(1, (3, 5, 8), blocks_per_stage=3),
        (values(4, 1, 11, 11), classes(4)),
        9,
        [(4, 3, 11, 11)] * 4 + [(4, 5, 6, 6)] * 3 + [(4, 8, 3, 3)] * 3,
    ),
    "one stage": (
        lambda: ResidualCNN(3, (4,), blocks_per_stage=2),
        (values(4, 3, 6, 6), classes(4)),
        2,
        [(4, 4, 6, 6)] * 3,
    ),
    "sequence": (
        lambda: SequenceClassifier(5, length=7, classes=10, width=16, depth=4),
        (values(3, 6, 5), classes(3)),
        4,
        [(3, 6, 16)] * 5,
    ),
    "patches": (image_transformer, (values(3, 1, 9, 8), classes(3)), 3, [(3, 4, 16)] * 4),
    "gpt": (
        lambda: CharacterGPT(11, width=16, depth=4, heads=2, context=8),
        (classes(2, 6, of=11), classes(2, 6, of=11)),
        4,
        [(2, 6, 16)] * 5,
    ),
}
families = pytest.mark.parametrize(("make", "batch", "depth", "states"), FAMILIES.values(), ids=FAMILIES)


def fresh(make):
    torch.manual_seed(0)
    return make().train()


@families
def test_chain_finds_every_residual_block(make, batch, depth, states):
    chain = Chain.from_model(fresh(make), batch)
    assert chain.depth == depth
    assert [name.rsplit(".", 2)[-2] for name in chain.names] == ["blocks"] * depth
    assert chain.stem_trains
    assert chain.layout.head
    assert not chain.layout.glue


@families
def test_states_have_the_documented_shapes(make, batch, depth, states):
    model = fresh(make)
    seen = []
    for block in Chain.from_model(model, batch).blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    model(batch[0])
    assert [tuple(x) for x, _ in seen] == states[:-1]
    assert [tuple(y) for _, y in seen] == states[1:]


@families
def test_longest_horizon_is_back_propagation(make, batch, depth, states):
    model, twin = fresh(make), fresh(make)
    loss = horizon_backward(Chain.from_model(model, batch), batch, horizon=depth)
    expected = Chain.from_model(twin, batch).loss(batch)
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=0, atol=0, msg=name)


@families
@pytest.mark.parametrize("stride", [1, 2])
def test_short_horizons_reach_every_parameter(make, batch, depth, states, stride):
    model = fresh(make)
    horizon_backward(Chain.from_model(model, batch), batch, horizon=2, stride=stride)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_linear_model_is_a_product_of_matrices():
    model = ResidualLinear(3, 4, 2, depth=5)
    product = model.stem.weight
    for block in model.blocks:
        product = (torch.eye(4) + block.linear.weight) @ product
    x = values(6, 3)
    torch.testing.assert_close(model(x), x @ (model.head.weight @ product).T)


def test_resnet_62_has_62_layers():
    model = ResidualCNN(3, (16, 32, 64), blocks_per_stage=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 62


def test_small_gain_starts_near_the_identity():
    x = values(4, 1, 8, 8)
    torch.manual_seed(0)
    model = ResidualCNN(1, (4,), blocks_per_stage=3, gain=1e-4)
    torch.testing.assert_close(model(x), model.head(model.stem(x).mean(dim=(2, 3))), atol=1e-2, rtol=0)


def test_gpt_sees_no_later_token():
    model = CharacterGPT(11, width=16, depth=2, heads=2, context=8)
    tokens = classes(1, 8, of=11)
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 11
    before, after = model(tokens), model(later)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_patches_hold_each_pixel_once():
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    cut = Patches(3)(image)
    assert cut[0, 1].reshape(3, 3).tolist() == image[0, 0, :3, 3:].tolist()
    assert sorted(cut.flatten().tolist()) == list(range(36))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualCNN(1, (8, 4)), "channels=4"),
        (lambda: CharacterGPT(5, width=10, heads=4), "heads=4"),
        (lambda: SequenceClassifier(2, 3, 2, depth=1)(values(1, 4, 2)), "4 positions .* 3"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
