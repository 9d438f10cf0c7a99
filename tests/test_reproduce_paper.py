"""``--scale paper``: its sizes, its networks on the meta device, and a whole run on a CIFAR of 40 images."""

from dataclasses import replace

import pytest
import torch
from miniature import ALL_CASES, write_cifar
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset
from typer.testing import CliRunner

import horizonplan as hp
from horizonplan.cli import app
from horizonplan.reproduce import EXPERIMENTS, Sources, cases, e1, pretrained, theorem
from horizonplan.reproduce import lab as lab_module
from horizonplan.reproduce.run import check

BACKBONE = {"ResNet-50": 23_508_032, "ViT-B/16": 85_798_656}  # parameters, as published
HEAD = {"ResNet-50": 2048 * 100 + 100, "ViT-B/16": 768 * 100 + 100}
LORA = 12 * 2 * 2 * 768 * 8  # layers, query and value, two factors, width, rank


def test_paper_s_sizes():
    full = ALL_CASES("paper", Sources())
    models = {name: full[name].make() for name in ("M1", "M2", "M3")}
    layers = {
        name: [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)] for name, model in models.items()
    }
    assert [len(layers[name]) for name in ("M1", "M2", "M3")] == [15, 15, 62]
    assert all(layer.bias is None for layer in layers["M1"])
    assert [full[name].depth for name in full] == [13, 13, 30, 16, 12]
    assert [full[name].learning_rate for name in full] == [0.03, 0.01, 0.01, 0.001, 0.001]
    assert [full[name].batch for name in full] == [100, 100, 32, 64, 64]
    assert [full[name].epochs for name in full] == [40, 40, 40, 30, 30]
    with pytest.raises(ValueError, match="--weights"):
        full["ResNet-50"].make()
    with pytest.raises(ValueError, match="--data"):
        full["ResNet-50"].data()


def on_meta(name):
    """The network of the paper's size, from its configuration; nothing is allocated."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    with torch.device("meta"):
        if name == "ResNet-50":
            config = transformers.ResNetConfig(num_labels=100)
            return pretrained.in_full(transformers.ResNetForImageClassification(config))
        config = transformers.ViTConfig(num_labels=100)
        return pretrained.by_adapters(transformers.ViTForImageClassification(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONE)
def test_pretrained_networks_at_their_sizes_have_the_blocks_that_are_expected(name):
    model = on_meta(name)
    batch = torch.zeros(2, 3, 32, 32, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    chain = hp.Chain.from_model(model, batch, loss=F.cross_entropy)
    assert chain.depth == ALL_CASES("paper", Sources())[name].depth
    assert model(batch[0]).shape == (2, 100)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    held = sum(p.numel() for p in model.parameters())
    if name == "ResNet-50":
        assert sum(trained.values()) == held == BACKBONE[name] + HEAD[name]
    else:
        assert sum(trained.values()) == LORA + HEAD[name]
        assert held == BACKBONE[name] + LORA + 2 * HEAD[name]  # the head's first weights stay beside the trained copy
        assert all("lora" in n or "classifier" in n for n in trained)


def write_resnet(folder):
    """A network as deep as ResNet-50, a few channels wide, as Hugging Face keeps it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 12], layer_type="bottleneck")
    transformers.ResNetForImageClassification(config).save_pretrained(folder / pretrained.RESNET)


def write_vit(folder):
    """A network as deep as ViT-B/16, a few features wide, as Hugging Face keeps it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16, patch_size=56)
    transformers.ViTForImageClassification(config).save_pretrained(folder / pretrained.VIT)


@pytest.mark.slow
def test_pretrained_networks_are_read_from_a_folder(tmp_path):
    write_resnet(tmp_path)
    with pytest.raises(pretrained.WeightsError, match="vit-base-patch16-224"):
        pretrained.resnet50(tmp_path)
    write_vit(tmp_path)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([3, 99])
    for make, depth in ((pretrained.resnet50, 16), (pretrained.vit, 12)):
        model = make(tmp_path)
        chain = hp.Chain.from_model(model, batch, loss=F.cross_entropy)
        assert chain.depth == depth
        assert model(batch[0]).shape == (2, 100)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora" in name for name in trained)
    assert all("lora" in name or "classifier" in name for name in trained)


def brief_cases(scale, sources):
    """The paper's cases and networks; one epoch, three horizons, few samples."""
    brief = {}
    for name, case in ALL_CASES(scale, sources).items():
        half = (case.depth + 1) // 2
        sizes = {"horizons": (1, half, case.depth), "disjoint": (half,), "epochs": 1, "batch": 4, "seeds": 1}
        brief[name] = replace(case, data=few(case), **sizes)
    return brief


def few(case):
    def data():
        found = case.data()
        parts = (Subset(part, range(8)) for part in (found.training, found.validation))
        return cases.Data(*parts)

    return data


@pytest.mark.slow
def test_whole_run_at_scale_paper_on_a_cifar_of_forty_images(tmp_path, monkeypatch):
    """All experiments with ResNet-62, and networks as deep as ResNet-50 and ViT-B/16, from files in the real forms."""
    data, weights, out = (tmp_path / name for name in ("cifar", "weights", "out"))
    data.mkdir()
    write_cifar(data / "cifar-10-batches-py", 10, binary=False)
    write_cifar(data / "cifar-100-binary", 100, binary=True)
    write_resnet(weights)
    write_vit(weights)
    monkeypatch.setattr(cases, "IMAGES", {**cases.IMAGES, "paper": (40, 8)})
    monkeypatch.setattr(cases, "HUNDRED", (40, 8))
    monkeypatch.setattr(lab_module, "cases", brief_cases)
    monkeypatch.setattr(lab_module, "ROUNDS", 1)
    monkeypatch.setattr(lab_module, "SECONDS", 0.0)
    for name, value in (("GRID", (1, 15, 30)), ("IMAGES", 2)):
        monkeypatch.setattr(e1, name, value)
    for name, value in (("DEPTHS", (32, 64)), ("SEEDS", 2)):
        monkeypatch.setattr(theorem, name, value)
    arguments = ["--scale", "paper", "--data", str(data), "--weights", str(weights), "--out", str(out), "--debug"]
    result = CliRunner().invoke(app, ["reproduce", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    assert all(f"id='{name}'" in page for name in EXPERIMENTS)
    for words in ("ResNet-62", "ResNet-50", "ViT-B/16", "of CIFAR-10;", "of CIFAR-100;"):
        assert words in page
    assert "MNIST" not in page
    assert {path.name for path in (out / "cells" / "runs").iterdir()} == {"M1", "M2", "M3", "ResNet-50", "ViT-B"}


def test_everything_is_looked_for_before_a_run_at_scale_paper(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", 10, binary=False)
    with pytest.raises(ValueError, match="CIFAR-100"):
        check(EXPERIMENTS, "paper", Sources(images=tmp_path), None)
    write_cifar(tmp_path / "cifar-100-python", 100, binary=False)
    with pytest.raises(ValueError, match="--weights"):
        check(EXPERIMENTS, "paper", Sources(images=tmp_path), None)
    check(["fig2", "e2", "fig5"], "paper", Sources(images=tmp_path), None)
    for name in (pretrained.RESNET, pretrained.VIT):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    check(EXPERIMENTS, "paper", Sources(images=tmp_path, weights=tmp_path), None)
