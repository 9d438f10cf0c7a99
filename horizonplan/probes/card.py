"""What a process sees of a card that it has not used before: the context, the libraries' workspaces, the allocator.

It is to run in a fresh process (``isolated(observe, "cuda:0", ...)``); in one that has used the card, the context is
there already and the libraries have their workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horizonplan.models import CharacterGPT, ResidualCNN
from horizonplan.probes.nvml import Reading, read


@dataclass(frozen=True)
class Observed:
    """What a process that was fresh when it began saw of a card.

    Attributes:
        card: its name.
        memory_bytes: its memory.
        first: NVML's reading after the first tensor.
        first_reserved_bytes: of the allocator, at that time.
        worked: NVML's reading after each library had worked.
        worked_reserved_bytes: of the allocator, at that time.
        kept_bytes: still allocated then, when no tensor was left: workspaces that torch allocates for libraries.
        peaks: reserved and allocated bytes at the peaks of training steps, a pair for each network.
    """

    card: str
    memory_bytes: int
    first: Reading
    first_reserved_bytes: int
    worked: Reading
    worked_reserved_bytes: int
    kept_bytes: int
    peaks: tuple[tuple[int, int], ...]


def observe(name: str) -> Observed:
    """Look at a card that this process has not used before.

    Args:
        name: of a CUDA device, such as ``"cuda:0"``.
    """
    device = torch.device(name)
    kept = torch.zeros(1, device=device)
    first, first_reserved = _look(device)
    exercise(device)
    del kept
    worked, worked_reserved = _look(device)
    workspaces = torch.cuda.memory_allocated(device)
    peaks = tuple(_peaks(model, inputs, targets) for model, inputs, targets in networks(device))
    card = torch.cuda.get_device_properties(device)
    return Observed(card.name, card.total_memory, first, first_reserved, worked, worked_reserved, workspaces, peaks)


def _look(device: torch.device) -> tuple[Reading, int]:
    torch.cuda.synchronize(device)
    return read(device), torch.cuda.memory_reserved(device)


def exercise(device: torch.device) -> None:
    """A matrix product, a convolution and attention, forward and backward, in fp32 and bf16: each loads its library."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    for dtype in (torch.float32, torch.bfloat16) if bf16 else (torch.float32,):
        tensor = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
        product = tensor(512, 512) @ tensor(512, 512)
        convolution = F.conv2d(tensor(4, 64, 32, 32), tensor(64, 64, 3, 3), padding=1)
        attention = F.scaled_dot_product_attention(*tensor(3, 2, 4, 128, 64))
        torch.autograd.backward([product.sum(), convolution.sum(), attention.sum()])


def networks(device: torch.device, batch: int = 128) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """A convolutional network and a transformer, with inputs and targets.

    Steps on 128 images and 32 texts hold 0.55 and 0.85 GiB of tensors (counted by ``LiveBytes`` on fake tensors).
    """
    with device:
        images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        tokens = torch.randint(256, (max(1, batch // 4), 256))
        return [
            (ResidualCNN(3, (64, 128, 256), blocks_per_stage=2), images, labels),
            (CharacterGPT(256, width=256, depth=6, heads=8, context=256), tokens, tokens),
        ]


def train_steps(
    model: nn.Module, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Back-propagation and AdamW on one batch."""
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()))
        optimizer.step()


def _peaks(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """Reserved and allocated bytes at the peaks of three warm steps."""
    device, optimizer = inputs.device, torch.optim.AdamW(model.parameters())
    train_steps(model, inputs, targets, optimizer, steps=2)  # optimiser state and workspaces come with the first
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    train_steps(model, inputs, targets, optimizer, steps=3)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
