"""horizonplan's gradients inside transformers' Trainer: everything but the gradient is the Trainer's.

Oracles: ``horizonplan.train``, ``transformers.Trainer`` (for an exact gradient), a torch loop written out. All
comparisons are bit for bit. What goes for Lightning is in test_integrations_lightning.py.
"""

import subprocess
import sys

import peft
import pytest
import torch
import transformers
from families import ResidualMLP
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import Algorithm, BackPropagation, Horizon
from horizonplan.integrations import LazyGradient
from horizonplan.integrations.hugging_face import HorizonTrainer

SEED = 3
METHODS = [Horizon(2), Horizon(2, stride=2), BackPropagation(recompute=1)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def trained(model, data, **kwargs):
    return hp.train(model, data, optimizer=sgd, seed=SEED, progress=False, **kwargs)


class Whole(Algorithm):
    def step(self, chain, batch, optimizer):
        raise AssertionError


class Stateful(BackPropagation):
    def state_dict(self):
        return {"seen": 1}


class WithHeads(BackPropagation):
    def prepare(self, chain, batch):
        return nn.Linear(2, 2)


def gpt2(p=0.2, seed=5):
    torch.manual_seed(seed)
    config = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config, **ids, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p)
    )


def texts(count=16):
    """Sequences with labels of uneven length, so that items a batch differ."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (count, 12), generator=generator)
    rows = []
    for number, row in enumerate(ids):
        labels = row.clone()
        labels[: number % 7] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


asked_by_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def lora():
    model = gpt2()
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.2, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


class Scores(nn.Module):
    """A model that takes no loss arguments: the Trainer divides its loss by the steps of an accumulation."""

    def __init__(self, p=0.2, seed=5):
        super().__init__()
        torch.manual_seed(seed)
        self.net = ResidualMLP(4, width=12, p=p)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def points(count=16):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(n % 3)} for n in range(count)]


class SeedAtStart(transformers.TrainerCallback):
    """Torch's generator as ``horizonplan.train(seed=...)`` has it: seeded when all data are there."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            torch.manual_seed(SEED)


def trainer(folder, model, data, kind=HorizonTrainer, optimizer=sgd, **settings):
    own = {name: settings.pop(name) for name in ("algorithm", "plan", "blocks") if name in settings}
    own |= {name: settings.pop(name) for name in ("compute_loss_func", "model_init") if name in settings}
    defaults = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"per_device_train_batch_size": 4, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    defaults |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "learning_rate": 0.1}
    args = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    if optimizer is not None and model is not None:
        own["optimizers"] = (optimizer([p for p in model.parameters() if p.requires_grad]), None)
    made = kind(model=model, args=args, train_dataset=data, callbacks=[SeedAtStart()], **own)
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


def batches(data, size=4):
    return [torch.utils.data.default_collate(data[i : i + size]) for i in range(0, len(data), size)]


def loss_of(made):
    """The Trainer's loss of one batch: the sum over tokens, divided by what the Trainer counts them to be."""

    def compute(model, batch):
        _, items = made.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        return model(**batch, num_items_in_batch=items)["loss"]

    return compute


def history(made):
    timed = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in made.state.log_history]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_trainer_trains_as_horizonplan_does(tmp_path, method):
    model = gpt2()
    made = trainer(tmp_path, model, texts(), algorithm=method)
    made.train()
    twin = gpt2()
    run = trained(twin, batches(texts()), algorithm=method, compute_loss=loss_of(made))
    assert_same(weights(model), weights(twin))
    assert [e["loss"] for e in made.state.log_history if "loss" in e] == [step["loss"] for step in run.history]


def halved(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch / 2


EXACT = BackPropagation()
SETTINGS = {
    "AdamW, cosine": (gpt2, texts, EXACT, {"optimizer": None, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}),
    "accumulation": (gpt2, texts, EXACT, {"gradient_accumulation_steps": 3}),
    "accumulation, no loss arguments": (Scores, points, EXACT, {"gradient_accumulation_steps": 3}),
    "accumulation, clipping, bf16": (
        gpt2,
        texts,
        BackPropagation(recompute=1),
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1, "bf16": True},
    ),
    "bf16, no loss arguments": (Scores, points, EXACT, {"bf16": True}),
    "label smoothing": (gpt2, texts, EXACT, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
    "compute_loss_func": (gpt2, texts, EXACT, {"compute_loss_func": halved, "gradient_accumulation_steps": 3}),
    "LoRA": (lora, texts, EXACT, {"max_grad_norm": 0.1}),
    "noise in the embedding": (gpt2, texts, EXACT, {"neftune_noise_alpha": 2.0, "torch_empty_cache_steps": 2}),
}


@asked_by_peft
@pytest.mark.parametrize(("network", "data", "method", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_an_exact_gradient_is_the_trainer_s_own_bit_for_bit(tmp_path, network, data, method, settings):
    plain = trainer(tmp_path, network(), data(), transformers.Trainer, **settings)
    plain.train()
    own = trainer(tmp_path, network(), data(), algorithm=method, **settings)
    own.train()
    assert_same(weights(own.model), weights(plain.model))
    assert history(own) == history(plain)
    assert own.evaluate(data(8))["eval_loss"] == plain.evaluate(data(8))["eval_loss"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_accumulation_and_clipping_of_a_truncated_gradient_are_a_loop_written_out(tmp_path, method):
    model = Scores()
    made = trainer(
        tmp_path,
        model,
        points(),
        algorithm=method,
        blocks="net.blocks",
        gradient_accumulation_steps=3,
        max_grad_norm=0.1,
    )
    made.train()
    twin, data = Scores(), batches(points())
    chain = hp.Chain.from_model(twin, data[0], "net.blocks")
    optimizer = sgd(twin.parameters())
    torch.manual_seed(SEED)
    for group, steps in ((data[:3], 3), (data[3:], 1)):
        for batch in group:
            divided = hp.Chain.from_model(
                twin, batch, "net.blocks", compute_loss=lambda m, b, n=steps: m(**b)["loss"] / n
            )
            hp.horizon_backward(divided, batch, method.schedule(chain.depth))
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(weights(model), weights(twin))


def test_bf16_of_a_truncated_gradient_is_autocast_around_the_model(tmp_path):
    model = gpt2()
    made = trainer(tmp_path, model, texts(), algorithm=Horizon(2), bf16=True)
    made.train()
    inner, twin = loss_of(made), gpt2()

    def compute(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(model, batch)

    trained(twin, batches(texts()), algorithm=Horizon(2), compute_loss=compute)
    assert_same(weights(model), weights(twin))


class Overflow(transformers.TrainerCallback):
    """A gradient that fp16 cannot hold, in the second step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.transformer.ln_f.bias.grad.fill_(torch.inf)


def test_the_fp16_scaler_scales_the_gradient(tmp_path):
    """On CPU the Trainer has no scaler: one of ours stands in."""
    found, start = [], 2.0**10
    for kind, own in ((transformers.Trainer, {}), (HorizonTrainer, {"algorithm": BackPropagation(recompute=1)})):
        made = trainer(tmp_path, gpt2(), texts(), kind, gradient_accumulation_steps=2, num_train_epochs=2, **own)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=100)
        made.add_callback(Overflow())
        made.train()
        found.append((weights(made.model), history(made), made.accelerator.scaler.state_dict()))
    assert_same(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]
    assert found[1][2]["scale"] == start / 2
    assert found[1][1][0]["grad_norm"] > start / 10  # scaled, as it is not unscaled before the optimiser's step here


def test_a_subclass_s_own_loss_is_trained_on(tmp_path):
    class Doubled(HorizonTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(x=inputs.pop("x"))
            loss = 2 * F.cross_entropy(outputs["logits"], inputs.pop("labels"))
            return (loss, outputs) if return_outputs else loss

    class NoLoss(Scores):
        def forward(self, x):
            return {"logits": self.net(x)}

    model = NoLoss()
    made = trainer(tmp_path, model, points(), Doubled, algorithm=Horizon(2), remove_unused_columns=False)
    made.train()
    twin = NoLoss()
    trained(
        twin,
        batches(points()),
        algorithm=Horizon(2),
        compute_loss=lambda m, b: 2 * F.cross_entropy(m(b["x"])["logits"], b["labels"]),
    )
    assert_same(weights(model), weights(twin))


@asked_by_peft
@pytest.mark.parametrize("method", [Horizon(2), BackPropagation(recompute=1)], ids=str)
def test_lora_trains_its_adapters_only(tmp_path, method):
    model = lora()
    made = trainer(tmp_path, model, texts(), algorithm=method)
    made.train()
    twin = lora()
    trained(twin, batches(texts()), algorithm=method, compute_loss=loss_of(made))
    assert_same(weights(model), weights(twin))
    start = weights(lora())
    assert {name for name, value in weights(model).items() if not torch.equal(value, start[name])} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    made.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    assert_same(weights(loaded), weights(model))


def test_a_run_goes_on_from_the_trainer_s_checkpoint(tmp_path):
    settings = {"algorithm": Horizon(2), "optimizer": None, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "whole", gpt2(), texts(), save_strategy="steps", save_steps=2, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", gpt2(seed=9), texts(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert history(resumed)[:-1] == history(whole)[:-1]  # the last is the mean loss of this call


def test_a_plan_trains_as_its_schedule_does(tmp_path):
    model, data = Scores(p=0.0), batches(points())
    plan = hp.plan_horizon(
        model, data, objective=hp.AccuracyConstraint(0.6), rollout_steps=4, optimizer=sgd, progress=False
    )
    found = []
    for own in ({"plan": plan}, {"algorithm": Horizon(plan.horizon, plan.stride, plan.recompute)}):
        made = trainer(tmp_path, Scores(), points(), **own)
        made.train()
        found.append(weights(made.model))
    assert_same(*found)
    with pytest.raises(ValueError, match="plan: it was made for 4 blocks"):
        trainer(tmp_path, gpt2(), texts(), plan=plan).train()
    with pytest.raises(ValueError, match="plan and algorithm are both given"):
        trainer(tmp_path, Scores(), points(), plan=plan, algorithm=Horizon(2))
    with pytest.raises(ValueError, match=r"blocks='net.blocks': a plan brings its own"):
        trainer(tmp_path, Scores(), points(), plan=plan, blocks="net.blocks")


def test_every_run_of_a_model_init_trains_its_own_model(tmp_path):
    made = trainer(tmp_path, None, points(), model_init=lambda: Scores(), algorithm=Horizon(2))
    found = []
    for _ in range(2):
        made.train()
        found.append(made.model)
    assert found[0] is not found[1]
    assert_same(weights(found[0]), weights(found[1]))


def test_what_is_unfrozen_on_the_way_is_trained(tmp_path):
    class Unfreeze(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.net.head.requires_grad_(state.global_step >= 2)

    found = []
    for kind, own in ((transformers.Trainer, {}), (HorizonTrainer, {"algorithm": BackPropagation()})):
        made = trainer(tmp_path, Scores(), points(), kind, **own)
        made.add_callback(Unfreeze())
        made.train()
        found.append(weights(made.model))
    assert_same(*found)
    assert not torch.equal(found[0]["net.head.1.weight"], weights(Scores())["net.head.1.weight"])


def set_args(**values):
    return lambda monkeypatch: [monkeypatch.setattr(transformers.TrainingArguments, k, v) for k, v in values.items()]


def pretend(**values):
    """What an installation that is not there would have set on the Trainer."""

    def change(monkeypatch):
        made = transformers.Trainer.create_accelerator_and_postprocess

        def create(self):
            made(self)
            for name, value in values.items():
                setattr(self, name, value)

        monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", create)

    return change


def several_processes(monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)


REFUSED = [
    (pretend(is_deepspeed_enabled=True), {}, "deepspeed: it owns the backward pass; train without it."),
    (pretend(is_fsdp_enabled=True), {"optimizer": None}, "fsdp: it shards the blocks' weights"),
    (several_processes, {}, "2 processes: DistributedDataParallel .* or use horizonplan.train"),
    (set_args(n_gpu=2), {}, r"n_gpu=2: DataParallel copies the model .*CUDA_VISIBLE_DEVICES=0"),
    (None, {"activation_checkpointing": True}, "gradient_checkpointing=True: .*recompute=1"),
    (None, {"torch_compile": True}, r"torch_compile=True: .*block.compile\(\)"),
    (None, {"optim": "lomo"}, "optim='lomo': it makes the backward pass itself"),
    (None, {"algorithm": 3}, "algorithm=3: give a GradientMethod such as"),
    (None, {"plan": 3}, "plan is a int: give a Plan"),
]


@pytest.mark.parametrize(("change", "settings", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED])
def test_the_trainer_refuses_what_would_take_the_gradient_away(tmp_path, monkeypatch, change, settings, message):
    if change is not None:
        change(monkeypatch)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, Scores(), points(), **settings)


def test_the_trainer_refuses_a_model_spread_over_devices(tmp_path):
    model = Scores()
    model.hf_device_map = {"net": "cpu", "stem": 0, "head": 1}
    with pytest.raises(ValueError, match="hf_device_map: the model is spread over several devices; put it on one"):
        trainer(tmp_path, model, points())


def test_the_trainer_refuses_a_model_that_was_wrapped_on_its_way(tmp_path):
    made = trainer(tmp_path, Scores(), points())
    with pytest.raises(ValueError, match="model: the Trainer wrapped it in a DataParallel"):
        made.training_step(nn.DataParallel(made.model), batches(points())[0])


def test_a_method_that_is_more_than_a_gradient_is_refused():
    with pytest.raises(ValueError, match="makes its whole step itself"):
        LazyGradient(None, Whole())
    with pytest.raises(ValueError, match="keeps a state of its own"):
        LazyGradient(None, Stateful())
    with pytest.raises(ValueError, match="trains modules of its own"):
        LazyGradient(None, WithHeads()).backward(Scores(), batches(points())[0], lambda m, b: m(**b)["loss"])


IMPORTS = """
import sys
import horizonplan.integrations
assert not {"transformers", "lightning", "accelerate"} & set(sys.modules)
extras = {"transformers": ("hugging_face", "hugging-face"), "lightning": ("lightning", "lightning")}
for library, (module, extra) in extras.items():
    sys.modules[library] = None
    try:
        __import__("horizonplan.integrations." + module)
    except ImportError as error:
        assert f"pip install 'horizonplan[{extra}]'" in str(error), error
    else:
        raise AssertionError(library)
"""


def test_neither_library_is_imported_before_it_is_asked_for():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=60)
