"""How far the memory fold is from the tracker: predicted against measured peak bytes of real steps.

    python benchmarks/memory_fold.py            # all families, a few minutes on one core
    python benchmarks/memory_fold.py llama gpt2

For every family a small model is profiled once. Then each schedule is predicted by the fold and executed
under the tracker, and the two peaks (activations and gradients of one forward and backward) are compared:
all h, s in {1, 2, h}, recompute 0, 1, 2, and 30 lists of random windows, half of them with recompute.
Errors are in per cent of the measured peak; negative ones are underestimates.
"""

import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tf
from torch import nn

from horizonplan import Chain, Schedule, Window
from horizonplan.gradient import execute
from horizonplan.models import Patches, ResidualCNN, ResidualMLP, SequenceClassifier
from horizonplan.predict import activation_bytes
from horizonplan.probes import LiveBytes, Profile, profile

COLUMNS = ("windows", "windows, recompute", "random", "random, recompute")
RANDOM_LISTS = 30


def tokens() -> torch.Tensor:
    return torch.randint(0, 100, (4, 32))


def classes(count: int = 3) -> torch.Tensor:
    return torch.randint(0, count, (4,))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64)


def causal(model: Any, config: Any) -> tuple[nn.Module, Any]:
    ids = tokens()
    return model(config), {"input_ids": ids, "labels": ids}


def decoder(name: str, **more: Any) -> tuple[nn.Module, Any]:
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = getattr(tf, f"{name}Config")(**sizes, num_key_value_heads=2, vocab_size=100, **more)
    return causal(getattr(tf, f"{name}ForCausalLM"), config)


def gpt2() -> tuple[nn.Module, Any]:
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 100}
    return causal(tf.GPT2LMHeadModel, tf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> tuple[nn.Module, Any]:
    return decoder("Llama")


def gemma2() -> tuple[nn.Module, Any]:
    return decoder("Gemma2", head_dim=8, sliding_window=4)


def encoder_sizes() -> dict[str, int]:
    return {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def bert() -> tuple[nn.Module, Any]:
    config = tf.BertConfig(**encoder_sizes(), vocab_size=100, num_labels=3)
    return tf.BertForSequenceClassification(config), {"input_ids": tokens(), "labels": classes()}


def distilbert() -> tuple[nn.Module, Any]:
    config = tf.DistilBertConfig(n_layers=4, dim=32, hidden_dim=64, n_heads=4, vocab_size=100, num_labels=3)
    return tf.DistilBertForSequenceClassification(config), {"input_ids": tokens(), "labels": classes()}


def vit() -> tuple[nn.Module, Any]:
    config = tf.ViTConfig(**encoder_sizes(), image_size=64, patch_size=16, num_labels=3, hidden_dropout_prob=0.1)
    return tf.ViTForImageClassification(config), {"pixel_values": images(), "labels": classes()}


def resnet() -> tuple[nn.Module, Any]:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic", num_labels=3)
    return tf.ResNetForImageClassification(config), {"pixel_values": images(), "labels": classes()}


def convnext() -> tuple[nn.Module, Any]:
    config = tf.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[2, 2, 3, 2], num_labels=3, drop_path_rate=0.1)
    return tf.ConvNextForImageClassification(config), {"pixel_values": images(), "labels": classes()}


def residual_mlp() -> tuple[nn.Module, Any]:
    return ResidualMLP(20, 32, 3, depth=8), (torch.randn(64, 20), torch.randint(0, 3, (64,)))


def residual_cnn() -> tuple[nn.Module, Any]:
    return ResidualCNN(3, (4, 8, 16), blocks_per_stage=2), (images(), classes())


def transformer() -> tuple[nn.Module, Any]:
    model = nn.Sequential(Patches(8), SequenceClassifier(192, length=64, classes=3, width=32, depth=6))
    return model, (images(), classes())


def sequential_cnn() -> tuple[nn.Module, Any]:
    layers: list[nn.Module] = []
    for wide, wider in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(wide, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)), (images(), classes())


HUGGING_FACE = (gpt2, llama, gemma2, bert, distilbert, vit, resnet, convnext)
FAMILIES = (*HUGGING_FACE, residual_mlp, residual_cnn, transformer, sequential_cnn)


def random_windows(depth: int, recompute: int, draw: random.Random) -> Schedule:
    """A valid list of windows that overlap as they like."""
    ends = sorted(draw.choices(range(1, depth), k=draw.randint(0, 4))) if depth > 1 else []
    windows = []
    for end in ends:
        first = draw.randrange(end)
        windows.append(Window(first, draw.randint(first + 1, end), end))
    missing = set(range(depth)) - {t for w in windows for t in range(w.first, w.stop)}
    first = draw.randint(0, min(missing, default=depth - 1))
    stop = draw.randint(max(missing, default=first) + 1, depth)
    return Schedule(depth, (*windows, Window(first, max(stop, first + 1), depth)), recompute)


def schedules(depth: int) -> Iterator[tuple[str, Schedule]]:
    """Every schedule to be compared, with its column."""
    for h in range(1, depth + 1):
        for s in sorted({1, min(2, h), h}):
            for k in (0, 1, 2):
                yield COLUMNS[k > 0], Schedule.horizon(depth, h, s, k)
    draw = random.Random(0)
    for i in range(RANDOM_LISTS):
        k = (0, 1, 0, 2)[i % 4]
        yield COLUMNS[2 + (k > 0)], random_windows(depth, k, draw)


def error(chain: Chain, batch: Any, costs: Profile, schedule: Schedule) -> float:
    """Predicted over measured peak, less one, in per cent."""
    ops = costs.ops(schedule)
    for p in chain.parameters():
        p.grad = None
    with LiveBytes() as tracker:
        execute(chain, batch, ops)
    return (activation_bytes(ops, costs) / tracker.peak - 1) * 100


def compare(family: Callable[[], tuple[nn.Module, Any]]) -> tuple[int, dict[str, list[float]]]:
    """Depth and errors by column of one family."""
    torch.manual_seed(0)
    model, batch = family()
    chain = Chain.from_model(model.train(), batch)
    costs = profile(chain, batch, repeats=0)
    errors: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for column, schedule in schedules(chain.depth):
        errors[column].append(error(chain, batch, costs, schedule))
    return chain.depth, errors


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    known = {family.__name__: family for family in FAMILIES}
    print("median and worst error in per cent of the tracker's peak")
    print(f"{'':15}{'T':>3}" + "".join(f"{column:>22}" for column in COLUMNS))
    for name in names or known:
        depth, errors = compare(known[name])
        cells = [f"{statistics.median(map(abs, e)):.2f} {max(e, key=abs):+.2f}" for e in errors.values()]
        print(f"{name:15}{depth:3}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
