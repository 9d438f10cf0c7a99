"""Train a character GPT on the King James text from scratch: plan, train three ways, compare, print a sample.

    python examples/char_gpt.py            # some minutes on one core
    python examples/char_gpt.py --quick    # less than a minute; learns little

The objective is that of somebody who pays for memory: the cheapest horizon at which the loss falls at 80 % or more of
back-propagation's rate (`AccuracyConstraint(epsilon=0.2)`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from compare import start, table, train_all, verdict
from kjv import load, split
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from typer import BadParameter, Option

import horizonplan as hp
from horizonplan.models import CharacterGPT

CONTEXT, WIDTH, DEPTH, LEARNING_RATE = 64, 64, 8, 3e-3


def chunks(text: str, vocabulary: str) -> TensorDataset:
    """Pieces of CONTEXT characters and, as targets, the characters that follow each."""
    codes = torch.tensor([vocabulary.index(character) for character in text])
    count = (len(codes) - 1) // CONTEXT
    pieces = (codes[first : first + count * CONTEXT].view(count, CONTEXT) for first in (0, 1))
    return TensorDataset(*pieces)


def unigram_loss(train: Tensor, validation: Tensor, kinds: int) -> float:
    """Nats a character of a model that knows nothing but how frequent each character is in the training text.

    Each kind is counted once more, so that one which the training text lacks has a finite loss.
    """
    frequencies = (torch.bincount(train.flatten(), minlength=kinds) + 1.0) / (train.numel() + kinds)
    return float(-frequencies.log()[validation.flatten()].mean())


@torch.no_grad()
def sample(model: torch.nn.Module, vocabulary: str, prompt: str, length: int, seed: int) -> str:
    """Go on from a prompt, character by character, at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    codes = [vocabulary.index(character) for character in prompt]
    model.eval()
    for _ in range(length):
        scores = model(torch.tensor([codes[-CONTEXT:]]))[0, -1]
        codes.append(int(torch.multinomial((scores / 0.7).softmax(0), 1, generator=generator)))
    return "".join(vocabulary[code] for code in codes)


def main(
    steps: Annotated[int, Option(min=3, help="Training steps, each on new text.")] = 1000,
    batch_size: Annotated[int, Option(min=1, help=f"Pieces of {CONTEXT} characters a step.")] = 32,
    seed: Annotated[int, Option(help="Of the split, the weights, the order and the sample.")] = 0,
    out: Annotated[Path | None, Option(help="A folder for logs, weights and the plan.")] = None,
    quick: Annotated[bool, Option("--quick", help="A small run that only shows that all works.")] = False,
) -> None:
    """Plan and train a character GPT on the King James text; compare with back-propagation."""
    width, depth, steps, rollout_steps = (32, 4, min(steps, 20), 5) if quick else (WIDTH, DEPTH, steps, 50)
    texts = ["\n".join(verse.text for verse in part) for part in split(load(), seed)]
    vocabulary = "".join(sorted(set("".join(texts))))
    train, validation = (chunks(text, vocabulary) for text in texts)
    if steps * batch_size > len(train):
        raise BadParameter(f"{steps} steps of {batch_size} pieces: the text has {len(train)} pieces; take fewer")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: steps * batch_size]
    held = Subset(validation, range(0, len(validation), 100 if quick else 3))

    def make_model() -> CharacterGPT:
        torch.manual_seed(seed)
        return CharacterGPT(len(vocabulary), width, depth, context=CONTEXT)

    def make_data() -> DataLoader:
        return DataLoader(Subset(train, order.tolist()), batch_size)

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    plan = hp.plan_horizon(
        make_model(),
        make_data(),
        objective=hp.AccuracyConstraint(epsilon=0.2),
        rollout_steps=rollout_steps,
        optimizer=optimizer,
        seed=seed,
    )
    print(plan.explain(), "\n")
    runs = train_all(make_model, make_data, plan, out, val_data=held, optimizer=optimizer, seed=seed)
    known = unigram_loss(train.tensors[0], validation.tensors[0], len(vocabulary))
    print(f"\nafter {steps} steps of {batch_size} x {CONTEXT} characters; loss in nats a character")
    print(table(runs, "loss", ("character frequencies alone", known)))
    print(f"\n{verdict(runs)}")
    for run in (runs["plan"], runs["exact"]):
        print(f"\n--- a sample, trained with {run.name}\n{sample(run.model, vocabulary, 'And ', 300, seed)}")


if __name__ == "__main__":
    start(main)
