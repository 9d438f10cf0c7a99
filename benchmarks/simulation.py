"""How far a step on fake tensors is from a real one, and what a model too large for this machine takes to judge.

    python benchmarks/simulation.py            # all families, then a Llama of 6.7 billion parameters
    python benchmarks/simulation.py bert vit   # some families only

Every small model is profiled on real tensors and on fake ones, and the fold predicts M(h), a whole AdamW step, from
both at all h with s in {1, h}. `CPU` are fakes that keep for the backward what CPU kernels keep: they should agree.
`CUDA` are fakes that keep what CUDA's kernels keep, with foreach optimisers: their difference from the real CPU step is
no error, but how much a prediction made on CPU terms would be off for CUDA.
"""

import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import families
import torch
import transformers as tf
from memory_fold import FAMILIES
from torch import nn

import horizonplan as hp
from horizonplan.predict import step_bytes
from horizonplan.probes import profile
from horizonplan.probes.simulation import simulated


def peaks(chain: hp.Chain, batch: Any, optimizer: Any = None) -> list[int]:
    """M(h) at all h, s in {1, h}."""
    costs, depth = profile(chain, batch, optimizer, repeats=0), chain.depth
    return [step_bytes(hp.Schedule.horizon(depth, h, s), costs) for h in range(1, depth + 1) for s in sorted({1, h})]


def fakes(model: nn.Module, batch: Any, cuda: bool) -> list[int]:
    with simulated(model, cuda=cuda) as simulation:
        shapes = simulation.batch(batch)
        chain = hp.Chain.from_model(model, shapes)
        return peaks(chain, shapes, simulation.optimizer(None) if cuda else None)


def compare(family: Callable[[], tuple[nn.Module, Any]]) -> str:
    torch.manual_seed(0)
    model, batch = family()
    real = peaks(hp.Chain.from_model(model.train(), batch), batch)
    cells = []
    for cuda in (False, True):
        errors = [(f / r - 1) * 100 for f, r in zip(fakes(model, batch, cuda), real, strict=True)]
        cells.append(f"{statistics.median(errors):+9.2f} {min(errors):+7.2f} {max(errors):+7.2f}")
    return "".join(f"{cell:>28}" for cell in cells)


def judge_a_large_model() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig())
    ids = torch.zeros(1, 512, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    print(f"\nLlama, {sum(p.numel() for p in model.parameters()) / 1e9:.1f} billion parameters on meta")
    for name, how in (("BP", {}), ("h = 4", {"horizon": 4}), ("checkpointed", {"recompute": 1})):
        began = time.perf_counter()
        found = hp.fits(model, batch, "80GiB", **how)
        print(f"  {name:14}{found.predicted_bytes / 2**30:8.1f} GiB predicted in {time.perf_counter() - began:5.1f} s")
    began = time.perf_counter()
    hp.plan_horizon(model, [batch], device="simulated:200GiB", objective=hp.MemoryLimit("200GiB"), progress=False)
    print(f"  {'a whole plan':14}{'':22} in {time.perf_counter() - began:5.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  in all {time.perf_counter() - start:.1f} s; peak memory of this process {peak:.2f} GiB")


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    print("fakes over real tensors less one, in per cent: median, least, most")
    print(f"{'':15}{'CPU':>28}{'CUDA':>28}")
    for name in names or FAMILIES:
        print(f"{name:15}{compare(getattr(families, name))}", flush=True)
    if not names:
        judge_a_large_model()


if __name__ == "__main__":
    main(sys.argv[1:])
