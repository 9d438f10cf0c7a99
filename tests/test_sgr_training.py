"""Local learning with reconciled gradients in the trainer: everything around a gradient works with it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sgr_jobs import CASES, batches, joint, trained
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import DGL, SGR, InfoPro, InformationPropagation, greedy, infopro
from horizonplan.datasets import digits
from horizonplan.models import CharacterGPT, ResidualCNN, ResidualMLP
from horizonplan.training.state import FOLDER

HERE = Path(__file__).parent


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


def images(count=2, rows=8, size=8):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 1, size, size, generator=generator), torch.arange(rows) % 10) for _ in range(count)]


def cnn():
    torch.manual_seed(0)
    return ResidualCNN(1, (4, 8), 2)


def fast(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class Watch(hp.Callback):
    """Keeps every step's local losses, and the parameters of model and heads as they were."""

    def __init__(self, method):
        self.method, self.losses = method, []

    def on_train_begin(self, run):
        self.modules = (run.model, run.extra)
        self.start = [p.detach().clone() for m in self.modules for p in m.parameters()]

    def on_step_end(self, run, step):
        self.losses.append([loss.item() for loss in self.method.local_losses])


def assert_all_learn(model, data, method, factor, **options):
    """Every module's loss falls, from the first epoch to the last, and whatever can be trained has moved."""
    watch = Watch(method)
    result = hp.train(model, data, algorithm=method, callbacks=[watch], **options)
    steps = len(watch.losses) // options["epochs"]
    losses = torch.tensor(watch.losses)
    assert losses.shape[1] == method.modules
    first, last = losses[:steps].mean(0), losses[-steps:].mean(0)
    assert (last < factor * first).all(), last / first
    now = [p for m in watch.modules for p in m.parameters()]
    assert all(torch.equal(p, before) != p.requires_grad for p, before in zip(now, watch.start, strict=True))
    return result


@pytest.mark.slow
def test_with_all_defaults_it_learns_the_digits():
    torch.manual_seed(0)
    train, validation = digits()
    model = ResidualMLP(64, 32, 10, depth=6)
    result = assert_all_learn(model, train, SGR(modules=3), 0.5, epochs=12, val_data=validation)
    assert result.val_metrics["accuracy"] > 0.92


@pytest.mark.parametrize("heads", ["light", "conv", "dgl", "infopro", "etf", "own"])
def test_every_head_trains(heads):
    """The losses on two batches, seen again and again, fall."""
    assert_all_learn(cnn(), images(), SGR(2, heads=heads), 0.8, epochs=15, optimizer=fast)


@pytest.mark.parametrize("name", [n for n in CASES if n != "accumulated"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    whole = trained(batches(), epochs=3, run_dir=tmp_path / "whole", **CASES[name])
    trained(batches(), epochs=2, run_dir=tmp_path / "cut", **CASES[name])
    resumed = trained(batches(), epochs=3, run_dir=tmp_path / "cut", resume=True, **CASES[name])
    assert same(resumed, whole)


def test_checkpoints_hold_the_heads(tmp_path):
    model = cnn()
    method = SGR(2, heads="conv")
    hp.train(model, images(), algorithm=method, epochs=1, run_dir=tmp_path)
    from safetensors.torch import load_file

    (found,) = (tmp_path / FOLDER).glob("*/*.safetensors")
    stored = load_file(found)
    (head,) = (m for m in method._ready.heads)
    own = {f"extra.0.0.{n}": v for n, v in (*head.named_parameters(), *head.named_buffers())}
    assert own
    assert all(torch.equal(stored[n], v) for n, v in own.items())


def test_a_run_that_was_cut_elsewhere_is_not_resumed(tmp_path):
    hp.train(cnn(), images(), algorithm=SGR(2, heads="etf", weight=0), epochs=1, run_dir=tmp_path)
    other = SGR(2, heads="etf", weight=0, split=[3])
    with pytest.raises(ValueError, match="algorithm"):
        hp.train(cnn(), images(), algorithm=other, epochs=2, run_dir=tmp_path, resume=True)
    method = SGR(2, heads="etf", weight=0)
    model = cnn()
    method.prepare(hp.Chain.from_model(model, images()[0]), images()[0])
    with pytest.raises(ValueError, match=r"split: modules began at \[0, 3, 4\]"):
        method.load_state_dict({"bounds": [0, 3, 4]})


def test_accumulated_batches_are_one_batch():
    whole = trained(joint(batches(), 2), epochs=2, **CASES["plain"])
    parts = trained(batches(), epochs=2, **CASES["accumulated"])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


def test_a_fused_step_is_the_plain_one_bit_for_bit():
    plain = trained(batches(), epochs=2, **CASES["plain"])
    assert same(trained(batches(), epochs=2, **CASES["plain"], fused=True), plain)


@pytest.mark.parametrize(("model", "precision"), [("cnn", "bf16"), ("gpt", "bf16"), ("cnn", "fp16")])
def test_it_trains_under_autocast(model, precision):
    if model == "gpt":
        tokens = torch.randint(0, 11, (4, 13))
        made, data = CharacterGPT(11, width=16, depth=4, heads=2, context=12), [(tokens[:, :-1], tokens[:, 1:])] * 2
    else:
        made, data = cnn(), images()
    options = {"epochs": 15, "precision": precision, "max_grad_norm": 1.0, "optimizer": fast}
    assert_all_learn(made, data, SGR(3), 0.8, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_frames_train_under_autocast(weight, precision):
    method = SGR(2, heads="etf", weight=weight)
    assert_all_learn(cnn(), images(1), method, 0.8, epochs=20, precision=precision, optimizer=fast)


def test_heads_have_the_models_type_under_autocast():
    batch = images(1)[0]
    chain = hp.Chain.from_model(cnn(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        made = SGR(2).prepare(chain, batch)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_greedy_training_goes_from_module_to_module():
    model = cnn()
    seen = {}

    class Look(hp.Callback):
        def on_epoch_end(self, run, metrics):
            seen[run.epoch] = {n: p.detach().clone() for n, p in model.named_parameters()}

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    hp.train(model, images(), algorithm=greedy(2, 2, split=[2]), epochs=4, callbacks=[Look()])
    first = {n for n in before if n.startswith(("stem", "blocks.0", "blocks.1"))}
    for n in before:
        early = not torch.equal(before[n], seen[1][n])
        late = not torch.equal(seen[1][n], seen[3][n])
        assert (early, late) == (n in first, n not in first), n


@pytest.mark.parametrize("method", [DGL, InfoPro])
def test_the_named_methods_are_plain_local_learning_with_other_heads(method):
    made = method(modules=2)
    assert isinstance(made, SGR)
    assert made.weight == 0
    hp.train(cnn(), images(), algorithm=made, epochs=1)
    assert len(made.local_losses) == 2
    assert made.terms == ()


def test_infopros_weights_are_interpolated_and_its_losses_add_up():
    batch = images(1)[0]
    chain = hp.Chain.from_model(cnn(), batch)
    factory = InformationPropagation(reconstruct=(4.0, 0.0), classify=(0.5, 1.5))
    method = SGR(4, weight=0, heads=factory)
    heads = method.prepare(chain, batch)
    weights = [w for h in heads for w in (h.reconstruct, h.classify)]
    assert weights == pytest.approx([4, 0.5, 8 / 3, 0.5 + 1 / 3, 4 / 3, 0.5 + 2 / 3])
    head, state = heads[1].eval(), torch.randn(8, 4, 8, 8)
    image = (batch[0] - batch[0].min()) / (batch[0].max() - batch[0].min())
    drawn = head.decode(F.interpolate(state, (8, 8), mode="bilinear", align_corners=True))
    wanted = (0.5 + 1 / 3) * F.cross_entropy(head(state), batch[1])
    wanted = wanted + 4 * 2 / 3 * F.binary_cross_entropy(drawn.sigmoid(), image)
    found = head.local_loss(state, batch, lambda output, batch: F.cross_entropy(output, batch[1]))
    torch.testing.assert_close(found, wanted)


def test_the_contrast_is_the_mean_over_pairs_of_one_class():
    torch.manual_seed(0)
    outputs, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    unit = outputs / outputs.norm(dim=1, keepdim=True)
    total, counted = 0.0, 0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        alike = [j for j in others if target[j] == target[i]]
        if alike:
            scores = torch.stack([unit[i] @ unit[j] / 0.07 for j in others]).logsumexp(0)
            total -= sum(unit[i] @ unit[j] / 0.07 - scores for j in alike) / len(alike)
            counted += 1
    torch.testing.assert_close(infopro.contrast(outputs, target), total / counted)


def test_heads_for_images_are_refused_elsewhere():
    train, _ = digits()
    for heads in ("dgl", "infopro"):
        with pytest.raises(ValueError, match=f"heads='{heads}': it classifies images"):
            hp.train(ResidualMLP(64, 8, 10, depth=3), train, algorithm=SGR(2, heads=heads))


def low_rank(encoder):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an outdated way
        return peft.get_peft_model(encoder, config)


@pytest.mark.slow
def test_low_rank_adapters_are_fine_tuned():
    """A BERT of MiniLM's kind; only adapters, classifier and auxiliary heads move."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    sizes = {"num_hidden_layers": 6, "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=50, num_labels=3, hidden_dropout_prob=0.0)
    model = low_rank(transformers.BertForSequenceClassification(config))
    ids = torch.randint(0, 50, (12, 10))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(12) % 3}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    method = SGR(3)
    assert_all_learn(model, [batch], method, 0.9, epochs=20, optimizer=fast)
    assert len(method.terms) == 2
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_probes_measure_a_method_and_leave_the_model_as_it_was():
    model, batch = cnn(), images(1)[0]
    chain = hp.Chain.from_model(model, batch)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    memory, time = hp.probes.method(chain, [batch], SGR(2, heads="conv"), repeats=2)
    assert (memory.quantity, memory.unit, time.quantity, time.unit) == ("memory", "bytes", "time", "seconds")
    assert time.value > 0
    assert same(dict(model.state_dict()), before)
    assert torch.equal(rng, torch.get_rng_state())
    (head,) = SGR(2, heads="conv").prepare(chain, batch)
    assert memory.detail["extra_parameters"] == sum(p.numel() for p in head.parameters())
    # What the trainer sees with the same optimiser.
    result = hp.train(cnn(), [batch] * 3, algorithm=SGR(2, heads="conv"))
    assert abs(result.peak_bytes - memory.value) < 0.01 * memory.value


def test_a_schedules_bytes_are_those_of_the_schedule_probes():
    batch = images(1)[0]
    chain = hp.Chain.from_model(cnn(), batch)
    (wanted,) = hp.probes.memory(chain, [batch], [2], ["horizon"])
    found, _ = hp.probes.method(chain, [batch], hp.algorithms.Horizon(2, 2), repeats=1)
    assert found.value == wanted.value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler asks for it
def test_compiled_blocks_have_no_second_derivative():
    model, data = ResidualMLP(64, 8, 10, depth=4), [(torch.randn(6, 64), torch.arange(6) % 10)] * 2
    hp.train(model, data, algorithm=SGR(2, weight=0), compile="aot_eager")
    with pytest.raises(hp.ChainError, match=r"weight=1.0: compiled blocks have no second derivative; set weight=0"):
        hp.train(model, data, algorithm=SGR(2), compile="aot_eager")


@pytest.mark.slow
def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    run = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*run, str(HERE / "sgr_jobs.py"), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, options in CASES.items():
        alone = trained(joint(batches(), 2 * options.get("accumulate", 1)), epochs=2, **{**options, "accumulate": 1})
        for part in found:
            torch.testing.assert_close(part[name]["model"], alone["model"], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(part[name]["losses"], alone["losses"], rtol=1e-9, atol=1e-11)
