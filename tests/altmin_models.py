"""Small networks of every kind that alternating minimisation takes, with batches for them."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def perceptron(activation=nn.Tanh, widths=(6, 5, 4, 3)):
    modules = []
    for a, b in pairwise(widths):
        modules += [nn.Linear(a, b), activation()]
    return nn.Sequential(*modules[:-1]).double()


class Elman(nn.Module):
    """Rows of an image -> hidden states -> an output sequence -> classes (Appendix C)."""

    def __init__(self, cell=nn.RNN, last=False):
        super().__init__()
        self.cell = nn.RNN(3, 5, batch_first=True) if cell is nn.RNN else cell(3, 5)
        self.v = None if last else nn.Linear(5, 2)
        self.c = nn.Linear(5 if last else 8, 3)

    def states(self, x):
        if isinstance(self.cell, nn.RNN):
            return self.cell(x)[0]
        hidden, found = None, []
        for row in x.unbind(1):
            hidden = self.cell(row, hidden)
            found.append(hidden)
        return torch.stack(found, 1)

    def forward(self, x):
        states = self.states(x)
        return self.c(states[:, -1]) if self.v is None else self.c(F.relu(self.v(states)).flatten(1))


class LeNet(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.n1 = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.f1, self.f2 = nn.Linear(16, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.n1(self.c1(x))), 2)
        x = F.relu(self.c2(x), inplace=True)
        return self.f2(torch.tanh(self.f1(x.flatten(1))))


def images(rows=6):
    return torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10


class Sign(nn.Module):
    def forward(self, x):
        return torch.sign(x)


class Threshold(nn.Module):
    """The same values, with no graph behind them."""

    def forward(self, x):
        return torch.where(x > 0, 1.0, -1.0)


class Heaviside(nn.Module):
    """A function that autograd refuses."""

    def forward(self, x):
        return torch.heaviside(x, x.new_zeros(()))


def sign_network(inputs, first, second, classes, step=Sign):
    return nn.Sequential(
        nn.Linear(inputs, first), step(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, classes)
    )


MODELS = {
    "perceptron": (lambda: perceptron().float(), lambda: (torch.randn(6, 6), torch.randint(0, 3, (6,)))),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)),
        lambda: (torch.randn(6, 6), torch.randint(0, 3, (6,))),
    ),
    "norms": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 9), nn.LayerNorm(9), nn.PReLU(), nn.BatchNorm1d(9), nn.Linear(9, 7), nn.ReLU(inplace=True)),
            nn.Linear(7, 3),
        ),
        lambda: (torch.randn(6, 6), torch.randint(0, 3, (6,))),
    ),
    "cnn": (LeNet, images),
    "batch norm": (lambda: LeNet(norm=True), images),
    "elman": (Elman, lambda: (torch.randn(6, 4, 3), torch.randint(0, 3, (6,)))),
    "last state": (lambda: Elman(last=True), lambda: (torch.randn(6, 4, 3), torch.randint(0, 3, (6,)))),
    "sign": (lambda: sign_network(6, 9, 4, 3), lambda: (torch.randn(6, 6), torch.randint(0, 3, (6,)))),
}
