"""Small chains on which local learning is tested, its gradients on them, and Algorithm 1's."""

import itertools

import local_oracle
import torch
from local_oracle import LossAt, Run
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import horizonplan as hp
from horizonplan.algorithms import SGR
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
