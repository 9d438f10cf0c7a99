"""SGR on models as they come: where they are cut, local losses of a user's own, and what is refused by name."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sgr_cases import built, own, prepared
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import SGR, partition
from horizonplan.models import ResidualMLP


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
        prepared(chain, batch, 2, split=[6])
    with pytest.raises(ValueError, match="modules=7: give a whole number between 1 and 6"):
        prepared(chain, batch, 7)


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
    config = transformers.GPT2Config(n_layer=3, n_embd=20, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    model, ids = transformers.GPT2LMHeadModel(config).train(), torch.randint(0, 20, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    chain = hp.Chain.from_model(model, batch)
    with pytest.raises(ValueError, match=r"loss: the model's is .* give the local losses' function"):
        prepared(chain, batch, 2)
    with pytest.raises(ValueError, match="heads='etf': a frame's loss is the cross-entropy with the batch's target"):
        prepared(chain, batch, 2, heads="etf")

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
        ({"modules": 2, "split": [1.5]}, r"split=\[1.5\]"),
        ({"modules": 2, "split": 3}, "split=3"),
        ({"modules": 2, "split": ("a",)}, "split="),
        ({"modules": 2, "loss": "mse"}, "loss='mse'"),
        ({"modules": 2, "loss": nn.MSELoss}, "loss=MSELoss"),
        ({"modules": 2, "normalize": "no"}, "normalize='no'"),
        ({"modules": 2, "weight": True}, "weight=True"),
        ({"modules": 2, "heads": nn.Linear(2, 2)}, "heads=Linear"),
        ({"modules": 2, "only": 2, "weight": 0}, "only=2"),
        ({"modules": 2, "only": 1}, "only=1"),
        ({"modules": 2, "heads": "etf", "loss": F.mse_loss}, "loss: heads='etf'"),
    ],
)
def test_bad_settings_are_named(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        SGR(**settings)


def test_a_head_may_overwrite_its_input():
    chain, batch = built("mlp")
    made = []
    for inplace in (False, True):
        torch.manual_seed(1)
        method, auxiliary = prepared(
            chain, batch, 3, heads=lambda p, i=inplace: nn.Sequential(nn.ReLU(inplace=i), nn.Linear(8, 4))
        )
        made.append(list(own(method, chain, auxiliary, batch).values()))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("heads", ["light", "conv", "dgl", "infopro", "etf", "own"])
def test_a_batch_of_one_trains(heads):
    chain, batch = built("cnn")
    method, auxiliary = prepared(chain, batch, 2, heads=heads, split=[3])
    found = own(method, chain, auxiliary, (batch[0][:1], batch[1][:1]))
    assert len(found) > 8
    assert all(torch.isfinite(g).all() for g in found.values())


def test_a_balanced_split_is_taken_over_from_a_checkpoint():
    chain, batch = built("mlp")
    method, _ = prepared(chain, batch, 2)
    assert method.bounds == (0, 5, 6)
    method.load_state_dict({"bounds": [0, 4, 6]})
    assert method.bounds == (0, 4, 6)
    with pytest.raises(ValueError, match="split: modules began"):
        method.load_state_dict({"bounds": [0, 4, 7]})
    method, _ = prepared(chain, batch, 2, split=[2])
    with pytest.raises(ValueError, match=r"split: modules began at \[0, 5, 6\] and do at \[0, 2, 6\]"):
        method.load_state_dict({"bounds": [0, 5, 6]})


def test_settings_are_told_alike_in_every_process():
    class Loss:
        def __call__(self, output, target):
            return F.cross_entropy(output, target)

    assert repr(SGR(2, loss=Loss())) == repr(SGR(2, loss=Loss()))


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


class Channels(nn.Module):
    """A network of 3 blocks between two functions that turn the axes."""

    def __init__(self, stem, block, turn, mean):
        super().__init__()
        self.stem, self.turn, self.mean = stem, turn, mean
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        x = self.turn(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(self.mean))


def attention():
    return nn.TransformerEncoderLayer(24, 2, 8, dropout=0.0)


ORDERS = {
    "signal": ((nn.Conv1d, 2, 24, 1), lambda: nn.Conv1d(24, 24, 1), lambda x: x, 2, (4, 2, 50), "on the second axis"),
    "channels last": ((nn.Linear, 3, 24), lambda: nn.Linear(24, 24), lambda x: x, (1, 2), (4, 8, 8, 3), "on the last"),
    "positions first": ((nn.Linear, 3, 24), attention, lambda x: x.transpose(0, 1), 0, (4, 9, 3), "not have the 4"),
    "as many": ((nn.Linear, 3, 24), attention, lambda x: x.transpose(0, 1), 0, (4, 4, 3), "may have positions first"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_states_whose_axes_are_in_another_order_are_refused(name):
    (kind, *sizes), block, turn, mean, shape, complaint = ORDERS[name]
    model = Channels(kind(*sizes), block, turn, mean)
    batch = (torch.randn(shape), torch.arange(4) % 3)
    chain = hp.Chain.from_model(model, batch)
    with pytest.raises(ValueError, match=f"heads='light': .* {complaint}"):
        prepared(chain, batch, 2, split=[1])
    assert prepared(chain, batch, 2, split=[1], heads=lambda place: nn.Linear(2, 3))
