"""What the tracker does not see: memory that an operator allocates and frees inside itself.

    python benchmarks/inside_operators.py

Compares the tracker's peak of activations and gradients with the peak of torch.profiler's own
allocation events on CPU, on one step each.
"""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import horizonplan as hp
from horizonplan.models import Patches, ResidualCNN, ResidualMLP, SequenceClassifier


def profiled_peak(step) -> int:
    """Peak of the allocator's running total, over where it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as trace:
        step()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    """Print one row a model and horizon."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    cases = {
        "residual MLP": (ResidualMLP(64, 64, 10, depth=8), (torch.randn(512, 64), torch.randint(0, 10, (512,)))),
        "transformer": (
            nn.Sequential(Patches(8), SequenceClassifier(192, 16, 10, depth=6)),
            images,
        ),
        "residual CNN": (ResidualCNN(3, (16, 32, 64), 3), images),
    }
    print(f"{'model':<14}{'h':>3}{'s':>3}{'tracker':>14}{'allocated':>14}{'tracker/allocated':>20}")
    for name, (model, batch) in cases.items():
        chain = hp.Chain.from_model(model, batch)
        depth = chain.depth
        for h, s in ((1, 1), (depth // 2, depth // 2), (depth, 1)):

            def step(chain=chain, batch=batch, h=h, s=s) -> None:
                hp.horizon_backward(chain, batch, h, s)

            for _ in range(2):
                step()
                model.zero_grad(set_to_none=True)
            with hp.probes.LiveBytes() as tracker:
                step()
            model.zero_grad(set_to_none=True)
            allocated = profiled_peak(step)
            model.zero_grad(set_to_none=True)
            print(f"{name:<14}{h:>3}{s:>3}{tracker.peak:>14,}{allocated:>14,}{tracker.peak / allocated:>20.3f}")


if __name__ == "__main__":
    main()
