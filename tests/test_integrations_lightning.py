"""horizonplan's gradients inside Lightning's loop: everything but the gradient is Lightning's.

Oracles: ``horizonplan.train``, Lightning's automatic optimisation (for an exact gradient), a torch loop written out.
Comparisons are bit for bit where nothing else is said.
"""

import copy
import pickle

import lightning
import pytest
import torch
from families import ResidualMLP
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.algorithms import Algorithm, BackPropagation, Horizon
from horizonplan.integrations.lightning import HorizonMixin

SEED = 3
# Lightning's: no workers in the loader, few batches to log, torch's deprecated names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]
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


def pairs():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2] * 2)) for _ in range(5)]


def network(p=0.2, seed=5):
    torch.manual_seed(seed)
    return ResidualMLP(4, width=12, p=p)


class Automatic(lightning.LightningModule):
    """Lightning's own loop, and what the modules under test share with it."""

    def __init__(self, optimizer=sgd, scheduler=None, seed=5):
        super().__init__()
        self.model = network(seed=seed)
        self.make, self.schedule = optimizer, scheduler
        self.losses, self.rates = [], []

    def on_train_start(self):
        torch.manual_seed(SEED + self.current_epoch)

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        return (
            optimizer if self.schedule is None else {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}
        )


class Module(HorizonMixin, Automatic):
    def __init__(self, algorithm=None, step=None, **kwargs):
        super().__init__(**kwargs)
        self.algorithm, self.step = algorithm, step or {}

    def training_step(self, batch, batch_idx):
        loss = self.horizon_step(batch, **self.step)
        self.losses.append(loss.item())
        self.log("loss", loss)


def fitted(folder, module, data=None, ckpt_path=None, **settings):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": folder}
    made = lightning.Trainer(**{**defaults, **settings})
    made.fit(module, DataLoader(data or pairs(), batch_size=None, generator=torch.Generator()), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_module_trains_as_horizonplan_does(tmp_path, method):
    module = fitted(tmp_path, Module(method))
    twin = network()
    run = trained(twin, pairs(), algorithm=method)
    assert_same(weights(module.model), weights(twin))
    assert module.losses == [step["loss"] for step in run.history]
    assert module.trainer.global_step == 5
    assert module.trainer.callback_metrics["loss"].item() == module.losses[-1]


def half_precision():
    """16-mixed on the CPU. Some of five steps overflow and are skipped, some are made."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2))


def linear(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4), "interval": "step"}


def every_epoch(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def every_other_epoch(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "frequency": 2}


LOOPS = {
    "two epochs": ({"max_epochs": 2}, {}, None),
    "accumulation": ({"accumulate_grad_batches": 2, "max_epochs": 2}, {"accumulate": 2}, linear),
    "clipping": ({"gradient_clip_val": 0.1}, {"max_grad_norm": 0.1}, linear),
    "bf16": ({"precision": "bf16-mixed"}, {}, None),
    "fp16": ({"plugins": half_precision}, {}, None),
    "doubles": ({"precision": "64-true", "max_epochs": 3}, {}, every_epoch),
    "every other epoch": ({"max_epochs": 4, "limit_train_batches": 2}, {}, every_other_epoch),
}


@pytest.mark.parametrize(("settings", "step", "schedule"), LOOPS.values(), ids=LOOPS)
def test_an_exact_gradient_is_lightning_s_own_bit_for_bit(tmp_path, settings, step, schedule):
    made = [{k: v() if callable(v) else v for k, v in settings.items()} for _ in range(2)]
    for refused in ("accumulate_grad_batches", "gradient_clip_val"):
        made[1].pop(refused, None)
    plain = fitted(tmp_path, Automatic(scheduler=schedule), **made[0])
    own = fitted(tmp_path, Module(step=step, scheduler=schedule), **made[1])
    assert own.losses == plain.losses
    assert own.rates == plain.rates
    assert own.trainer.global_step == plain.trainer.global_step
    assert_same(weights(own), weights(plain))


def test_clipping_is_of_the_unscaled_gradient(tmp_path):
    """Clipped while it is scaled by a power of two, to a norm scaled likewise: equal but for clip_grad_norm_'s 1e-6."""
    plain = fitted(tmp_path, Automatic(), plugins=half_precision(), gradient_clip_val=0.1)
    own = fitted(tmp_path, Module(step={"max_grad_norm": 0.1}), plugins=half_precision())
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(own)[name], value, rtol=1e-4, atol=1e-6)
    assert own.trainer.scaler.state_dict() == plain.trainer.scaler.state_dict()
    assert own.trainer.scaler.get_scale() == 2.0**13  # three of the five steps are skipped


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_accumulation_and_clipping_in_a_module_are_a_loop_written_out(tmp_path, method):
    module = fitted(tmp_path, Module(method, {"accumulate": 2, "max_grad_norm": 0.1}))
    twin, data = network(), pairs()
    chain = hp.Chain.from_model(twin, data[0])
    optimizer = sgd(twin.parameters())
    torch.manual_seed(SEED)
    for group in (data[:2], data[2:4], data[4:]):
        for batch in group:
            hp.horizon_backward(chain, batch, method.schedule(chain.depth), scale=0.5)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(weights(module.model), weights(twin))
    assert module.trainer.global_step == 3


def test_bf16_of_a_truncated_gradient_in_a_module_is_autocast_around_the_loss(tmp_path):
    module = fitted(tmp_path, Module(Horizon(2)), precision="bf16-mixed")
    twin = network()

    def compute(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    trained(twin, pairs(), algorithm=Horizon(2), compute_loss=compute)
    assert_same(weights(module.model), weights(twin))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # lightning, of what it resumes
def test_a_module_goes_on_from_lightning_s_checkpoint(tmp_path):
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    def keeping():
        return {
            "callbacks": [ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)],
            "enable_checkpointing": True,
        }

    settings = {"optimizer": adam, "scheduler": linear}

    class Seeded(Module):
        def on_train_epoch_start(self):
            torch.manual_seed(self.current_epoch)

    whole = Seeded(Horizon(2), **settings)
    fitted(tmp_path, whole, max_epochs=2, **keeping())
    resumed = Seeded(Horizon(2), seed=9, **settings)
    fitted(tmp_path, resumed, max_epochs=2, ckpt_path=tmp_path / "kept" / "epoch=0.ckpt", **keeping())
    assert_same(weights(resumed), weights(whole))
    assert resumed.losses == whole.losses[5:]
    assert resumed.rates == whole.rates[5:]
    assert resumed.trainer.global_step == whole.trainer.global_step == 10


def test_lightning_s_hooks_are_called_with_the_gradient_there(tmp_path):
    class Told(Module):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.told = []

        def on_before_backward(self, loss):
            self.told.append(("before backward", loss.item()))

        def on_after_backward(self):
            self.told.append(("after backward", all(p.grad is not None for p in self.model.parameters())))

        def on_before_optimizer_step(self, optimizer):
            self.told.append(("before step", type(optimizer).__name__))

    module = fitted(tmp_path, Told(step={"accumulate": 2}))
    losses = [("before backward", loss / 2) for loss in module.losses]
    after, step = ("after backward", True), ("before step", "SGD")
    expected = [
        losses[0],
        after,
        losses[1],
        after,
        step,
        losses[2],
        after,
        losses[3],
        after,
        step,
        losses[4],
        after,
        step,
    ]
    assert module.told == expected


def test_a_module_s_method_may_change_on_the_way(tmp_path):
    class Growing(Module):
        def on_train_epoch_start(self):
            self.algorithm = Horizon(1 + self.current_epoch)

    module = fitted(tmp_path, Growing(), max_epochs=2)
    twin = network()
    optimizer = sgd(twin.parameters())
    chain = hp.Chain.from_model(twin, pairs()[0])
    torch.manual_seed(SEED)
    for horizon in (1, 2):
        for batch in pairs():
            Horizon(horizon).step(chain, batch, optimizer)
    assert_same(weights(module.model), weights(twin))


def test_a_module_whose_own_layers_are_the_blocks_takes_a_plan_and_a_loss(tmp_path):
    class Own(HorizonMixin, lightning.LightningModule):
        def __init__(self, plan=None):
            super().__init__()
            torch.manual_seed(5)
            self.plan = plan
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

        def training_step(self, batch, batch_idx):
            self.horizon_step(batch, model=self, loss=F.l1_loss)

        def configure_optimizers(self):
            return sgd(self.parameters())

    data = [(x, x.roll(1)) for x, _ in pairs()]
    plan = hp.plan_horizon(
        Own(),
        data,
        objective=hp.AccuracyConstraint(0.6),
        rollout_steps=4,
        optimizer=sgd,
        loss=F.l1_loss,
        progress=False,
    )
    module = fitted(tmp_path, Own(plan), data)
    twin = Own()
    hp.train(twin, data, plan=plan, optimizer=sgd, loss=F.l1_loss, progress=False)
    assert_same(weights(module), weights(twin))


def test_a_copy_of_a_trained_module_trains_itself(tmp_path):
    module = fitted(tmp_path, Module(Horizon(2)))
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    kept = weights(module)
    for twin in twins:
        fitted(tmp_path, twin)
        assert_same(weights(module), kept)
    fitted(tmp_path, module)
    for twin in twins:
        assert_same(weights(twin), weights(module))


def test_schedulers_are_left_to_the_user_who_asks_for_it(tmp_path):
    module = fitted(tmp_path, Module(step={"step_schedulers": False}, scheduler=linear))
    assert set(module.rates) == {0.1 / 3}  # LinearLR's start


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def two(parameters):
    return [sgd(list(parameters)), sgd([nn.Parameter(torch.zeros(1))])]


BAD_STEPS = [
    ({"accumulate": 0}, {}, "accumulate=0: give a whole number >= 1"),
    ({"accumulate": True}, {}, "accumulate=True: give a whole number >= 1"),
    ({"max_grad_norm": 0.0}, {}, "max_grad_norm=0.0: give a number > 0, or None"),
    ({"model": 3}, {}, "model is a int: give the network as self.model"),
    ({"loss": F.l1_loss, "compute_loss": F.l1_loss}, {}, "loss and compute_loss are both given"),
    ({"blocks": "nowhere.*"}, {}, "blocks='nowhere.*' matches no submodule"),
    ({}, {"algorithm": Whole()}, "makes its whole step itself"),
    ({}, {"optimizer": two}, "configure_optimizers returned 2 optimisers: horizon_step makes one update"),
    ({}, {"scheduler": plateau}, "step_schedulers=True: ReduceLROnPlateau waits for a metric"),
]


@pytest.mark.parametrize(("step", "settings", "message"), BAD_STEPS, ids=[message[:20] for *_, message in BAD_STEPS])
def test_a_step_refuses_what_it_does_not_go_with(tmp_path, step, settings, message):
    module = Module(step=step, **settings)
    kept = weights(module)
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        fitted(tmp_path, module)
    assert_same(weights(module), kept)


def test_a_step_refuses_automatic_optimisation_and_strategies_that_wrap():
    module = Module()
    module.trainer = lightning.Trainer(accelerator="cpu", devices=1, strategy="ddp", logger=False, barebones=True)
    with pytest.raises(ValueError, match=r"strategy: DDPStrategy wraps .*devices=1.* or horizonplan.train"):
        module.horizon_step(pairs()[0])
    module.automatic_optimization = True
    with pytest.raises(ValueError, match="automatic_optimization=True: horizon_step updates by itself"):
        module.horizon_step(pairs()[0])


def test_a_compiled_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch.compile\(module\): it hides the blocks; compile the blocks"):
        fitted(tmp_path, torch.compile(Module(), backend="eager"))
