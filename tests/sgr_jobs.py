"""What tests/test_sgr_training.py trains, in one process or, started by torchrun, in several."""

import sys
from pathlib import Path

import torch
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import SGR, greedy
from horizonplan.training.team import team

CASES = {
    "plain": {"algorithm": ("sgr", 3, {"normalize": False})},
    "clipped": {"algorithm": ("sgr", 3, {}), "max_grad_norm": 0.05},
    "accumulated": {"algorithm": ("sgr", 3, {"normalize": False}), "accumulate": 2},
    "frame": {"algorithm": ("sgr", 2, {"heads": "etf", "weight": 0.0})},
    "greedy": {"algorithm": ("greedy", 2, {"epochs": 1})},
}


class Tied(nn.Module):
    """Blocks, the first and the last of which share a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        layers = [[nn.Linear(4, 4), nn.Tanh()] for _ in range(5)]
        layers[4][0].weight = layers[0][0].weight
        self.blocks = nn.ModuleList(nn.Sequential(*layer) for layer in layers)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count=4, rows=6):
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(rows, 4, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def joint(found, each):
    """Batches put together, ``each`` in one."""
    groups = [found[i : i + each] for i in range(0, len(found), each)]
    return [(torch.cat([x for x, _ in g]), torch.cat([y for _, y in g])) for g in groups]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def trained(data, epochs, algorithm, **options):
    """Weights and losses after training; the same weights at the start, those of heads included."""
    kind, modules, settings = algorithm
    made = greedy(modules, **settings) if kind == "greedy" else SGR(modules, split="blocks", **settings)
    model = Tied().double()
    torch.manual_seed(3)
    options = {"optimizer": adam, "progress": False, **options}
    result = hp.train(model, data, algorithm=made, epochs=epochs, **options)
    weights = {n: v.detach().clone() for n, v in model.state_dict().items()}
    return {"model": weights, "losses": [entry["loss"] for entry in result.history]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with team(torch.device("cpu")) as processes:
        seen = {name: trained(batches(), epochs=2, **options) for name, options in CASES.items()}
    torch.save(seen, Path(sys.argv[1], f"{processes.rank}.pt"))
