"""What the trainer adds to a bare loop, each thing against that loop written out."""

import copy
import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from families import ResidualMLP
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

import horizonplan as hp
from horizonplan import algorithms
from horizonplan.gradient import horizon_backward
from horizonplan.training import PlanWarning, TrainingWarning
from horizonplan.training.thrift import thriftier

DEPTH = 4
METHODS = [
    algorithms.BackPropagation(),
    algorithms.Horizon(1),
    algorithms.Horizon(2, 2),
    algorithms.LoCo(2, summed=True),
]


def task(p=0.1, count=4, rows=16):
    torch.manual_seed(4)
    model = ResidualMLP(DEPTH, width=12, p=p)
    truth = torch.randn(4, 3)
    inputs = [torch.randn(rows, 4) for _ in range(count)]
    return model, [(x, (x @ truth).argmax(1)) for x in inputs]


def samplewise():
    """A model whose samples do not see each other."""
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(DEPTH)), nn.Linear(4, 3))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def trained(model, data, **options):
    return hp.train(model, data, **{"optimizer": sgd, "progress": False, **options})


def assert_same_weights(model, other):
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def bare_loop(model, data, method, epochs, optimizer=sgd, around=None):
    """A loop around ``horizon_backward``; ``around(model, optimizer, backward, batch)`` makes a step."""
    torch.manual_seed(0)
    model.train()
    chain = hp.Chain.from_model(model, data[0])
    schedule = method.schedule(chain.depth)
    made = optimizer(model.parameters())

    def plain(model, optimizer, backward, batch):
        backward(batch)
        optimizer.step()

    for epoch in range(epochs):
        for batch in data:
            made.zero_grad()
            step = around or plain
            step(model, made, lambda b, scale=1.0: horizon_backward(chain, b, schedule, scale=scale), batch)
        if hasattr(made, "after_epoch"):
            made.after_epoch(epoch)
    return made


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_clipping_is_torch_s(method):
    model, data = task()

    def around(model, optimizer, backward, batch):
        backward(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()

    bare_loop(model, data, method, 2, around=around)
    twin, _ = task()
    trained(twin, data, algorithm=method, epochs=2, max_grad_norm=0.05)
    assert_same_weights(twin, model)
    unclipped, _ = task()
    trained(unclipped, data, algorithm=method, epochs=2)
    assert any(not torch.equal(a, b) for a, b in zip(unclipped.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_accumulated_gradients_are_those_of_the_joint_batch(method):
    model, data = samplewise(), task(count=6, rows=8)[1]
    data[1] = tuple(part[:5] for part in data[1])
    joint = [tuple(torch.cat(parts) for parts in zip(*data[i : i + 4], strict=True)) for i in (0, 4)]
    expected = trained(model, joint, algorithm=method, epochs=3)
    twin = samplewise()
    found = trained(twin, data, algorithm=method, epochs=3, accumulate=4)
    assert [h["step"] for h in found.history] == list(range(6))
    assert [h["loss"] for h in found.history] == pytest.approx([h["loss"] for h in expected.history], rel=1e-4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_autocast_around_forwards(method, precision):
    model, data = task()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")

    def around(model, optimizer, backward, batch):
        with torch.autocast("cpu", dtype):
            backward(batch, scale=scaler.scale(torch.tensor(1.0)) if precision == "fp16" else 1.0)
        scaler.step(optimizer)
        scaler.update()

    bare_loop(model, data, method, 2, around=around)
    twin, _ = task()
    trained(twin, data, algorithm=method, epochs=2, precision=precision)
    assert_same_weights(twin, model)
    assert all(p.dtype == torch.float32 for p in twin.parameters())


def test_back_propagation_in_bf16_is_a_plain_autocast_loop():
    model, data = task(p=0.3)
    torch.manual_seed(0)
    model.train()
    made = sgd(model.parameters())
    for x, y in data:
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        made.step()
    twin, _ = task(p=0.3)
    trained(twin, data, precision="bf16")
    assert_same_weights(twin, model)


def test_fp16_skips_steps_whose_scaled_gradients_overflow():
    model, data = task(p=0.0)
    before = copy.deepcopy(model)

    def steep(output, target):
        return 1000 * F.cross_entropy(output, target)

    def run(epochs):
        trained(model, data[:1], loss=steep, precision="fp16", optimizer=adam, epochs=epochs)
        return [torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]

    assert all(run(1))  # the first scale of 2^16 is too large for this
    assert not any(run(16))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def rates(model, data, **options):
    seen = []

    class Note(hp.Callback):
        def on_step_end(self, run, step):
            seen.append(run.learning_rate)

    trained(model, data, callbacks=[Note()], **options)
    return seen


def test_a_scheduler_is_stepped_after_each_epoch_or_step():
    model, data = task()
    by_epoch = rates(model, data, epochs=3, scheduler=lambda o: CosineAnnealingLR(o, 3))
    assert by_epoch == pytest.approx([0.1] * 4 + [0.075] * 4 + [0.025] * 4)
    by_step = rates(model, data, epochs=2, scheduler=lambda o: CosineAnnealingLR(o, 8), scheduler_every="step")
    assert by_step == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 9)])


def test_a_scheduler_of_the_user_s_own_optimiser():
    model, data = task()
    optimizer = sgd(model.parameters())
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=9)
    trained(model, data, optimizer=optimizer, scheduler=scheduler, epochs=2, scheduler_every="step")
    assert scheduler.last_epoch == 8
    with pytest.raises(ValueError, match="scheduler: it was made for another optimizer"):
        trained(model, data, scheduler=scheduler)


def test_schedulers_that_compare_losses_get_them():
    model, data = task(p=0.0)
    seen = []

    class Plateau(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    with_val = trained(model, data, epochs=2, scheduler=lambda o: Plateau(o), val_data=data[:2])
    assert seen == [v["loss"] for v in with_val.validations]
    seen.clear()
    trained(model, data, epochs=2, scheduler=lambda o: Plateau(o))
    assert len(seen) == 2
    grows = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    found = rates(model, grows, epochs=12, optimizer=lambda p: torch.optim.SGD(p, lr=3.0), scheduler=hp.DecayOnGrowth)
    assert found[0] == 3.0
    assert len({round(rate, 9) for rate in found}) > 1
    assert all(math.isclose(b, a) or math.isclose(b, 0.9 * a) for a, b in pairwise(found))


class Mean:
    """A metric as torchmetrics has them."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.seen = []

    def update(self, output, target):
        self.seen.append((output.argmax(1) == target).float())

    def compute(self):
        return torch.cat(self.seen).mean()


def test_metrics_of_the_user_s_own():
    model, data = task()
    uneven = [data[0], tuple(part[:5] for part in data[1])]
    metrics = {"hits": Mean(), "error": lambda output, target: (output.argmax(1) != target).float().mean()}
    result = trained(model, data, val_data=uneven, metrics=metrics, epochs=2)
    found = result.val_metrics
    assert found["hits"] == pytest.approx(found["accuracy"])
    assert found["error"] == pytest.approx(1 - found["accuracy"])
    assert list(found) == ["loss", "accuracy", "error", "hits"]
    with pytest.raises(ValueError, match=r"metrics\['bad'\] returned a tensor of shape \(16, 3\)"):
        trained(model, data, val_data=data, metrics={"bad": lambda output, target: output})
    with pytest.raises(ValueError, match="there is no val_data"):
        trained(model, data, metrics=metrics)


def test_early_stopping_ends_the_run_and_says_why():
    model, data = task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stop = hp.EarlyStopping(patience=2, metric="val_accuracy")
    result = trained(model, data, optimizer=optimizer, epochs=9, val_data=data[:1], callbacks=[stop])
    assert len(result.validations) == 3
    assert "val_accuracy has not improved for 2 epochs" in result.stopped
    with pytest.raises(ValueError, match=r"metric='val_f1': an epoch has loss, val_loss, val_accuracy"):
        trained(model, data, val_data=data[:1], callbacks=[hp.EarlyStopping(metric="val_f1", higher_is_better=True)])
    with pytest.raises(ValueError, match="metric='val_error': say whether higher_is_better"):
        hp.EarlyStopping(metric="val_error")
    again = trained(model, data, optimizer=optimizer, epochs=9, val_data=data[:1], callbacks=[stop])
    assert len(again.validations) == 3  # the same object in another run begins anew


def test_callbacks_are_called_in_order_and_can_stop(tmp_path):
    model, data = task()
    seen = []

    class Spy:
        def on_train_begin(self, run):
            seen.append("begin")

        def on_step_end(self, run, step):
            assert step == run.history[-1]
            seen.append(step["step"])
            if step["step"] == 5:
                run.stop("enough")

        def on_epoch_end(self, run, epoch):
            assert {"epoch", "step", "loss", "lr", "val_loss", "val_accuracy"} == set(epoch)
            seen.append(f"epoch {epoch['epoch']}")

        def on_save(self, run, path):
            assert path.is_dir()
            seen.append("save")

        def on_train_end(self, run):
            seen.append("end")

    result = trained(model, data, epochs=4, val_data=data[:1], run_dir=tmp_path, callbacks=[Spy()])
    assert seen == ["begin", 0, 1, 2, 3, "save", "epoch 0", 4, 5, "save", "epoch 1", "end"]
    assert result.stopped == "enough"
    assert len(result.history) == 6


def test_compiled_blocks_train_alike_and_are_given_back():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model, data = task(p=0.0)
    trained(model, data, algorithm=algorithms.Horizon(2))
    twin, _ = task(p=0.0)
    result = trained(twin, data, algorithm=algorithms.Horizon(2), compile=backend)
    assert len(compiled) >= 1
    assert result.peak_bytes == 0  # unknown, rather than that of something else
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(block._compiled_call_impl is None for block in twin.blocks)


@pytest.mark.parametrize("kind", ["sequential", "encoder"])
def test_blocks_whose_forward_is_torch_s_own_are_compiled_too(kind):
    """``nn.Module.compile`` passes over them without a word."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def block():
        if kind == "sequential":
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    torch.manual_seed(0)
    model = nn.Sequential(*(block() for _ in range(4)), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    data = [(torch.randn(8, 5, 4), torch.randn(8, 5, 3)) for _ in range(2)]
    for one, compile in ((model, False), (twin, backend)):
        hp.train(one, data, epochs=1, algorithm=algorithms.Horizon(2), compile=compile, progress=False)
    assert graphs
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_deterministic_algorithms_are_used_and_set_back():
    model, data = task()
    seen = []

    class Note(hp.Callback):
        def on_step_end(self, run, step):
            seen.append(torch.are_deterministic_algorithms_enabled())

    trained(model, data, deterministic=True, callbacks=[Note()])
    assert seen == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture(scope="module")
def plan():
    model, data = task()
    return hp.plan_horizon(
        model, data, objective=hp.AccuracyConstraint(0.6), rollout_steps=8, optimizer=sgd, progress=False
    )


def events_of(folder, kind=None):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def test_a_run_that_keeps_to_its_plan_is_not_warned_of(plan, tmp_path):
    model, data = task()
    trained(model, data, plan=plan, run_dir=tmp_path, epochs=3, watch_every=5)
    seen = events_of(tmp_path, "memory")
    assert [event["step"] for event in seen] == [0, 1, 5, 10]
    assert seen[1]["peak_bytes"] == seen[1]["planned_bytes"] == plan.row.memory_bytes
    assert not events_of(tmp_path, "beyond_plan")


def test_a_peak_beyond_the_plan_is_an_event_and_a_warning(plan, tmp_path):
    model, _ = task()
    _, data = task(rows=64)
    with pytest.warns(PlanWarning, match=r"step 1: a step needs .*, the plan has"):
        trained(model, data, plan=plan, run_dir=tmp_path, watch_every=2)
    assert [event["step"] for event in events_of(tmp_path, "beyond_plan")] == [1, 2]


@pytest.mark.filterwarnings("ignore:step .* the cosine is")  # it falls as training goes on
def test_a_cosine_below_the_plan_s_is_an_event_and_a_warning(plan, tmp_path):
    model, data = task()
    result = trained(model, data, plan=plan, epochs=2)
    twin, _ = task()
    watched = trained(twin, data, plan=plan, epochs=2, cosine_every=3, run_dir=tmp_path / "a")
    assert_same_weights(twin, model)  # watching changes nothing
    assert watched.history == result.history
    found = events_of(tmp_path / "a", "cosine")
    assert [event["step"] for event in found] == [0, 3, 6]
    assert all(-1 <= event["cosine"] <= 1 for event in found)
    low = copy.deepcopy(plan)
    object.__setattr__(low.row, "cosine", 1.0)
    object.__setattr__(low.row, "cosine_stderr", 0.0)
    noise = [(x, torch.randint(0, 3, y.shape)) for x, y in data]
    third, _ = task()
    for p in third.head.parameters():
        nn.init.normal_(p, std=5.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(third, noise, plan=low, cosine_every=1, run_dir=tmp_path / "b", epochs=3)
    below = [e for e in events_of(tmp_path / "b", "cosine") if e["cosine"] < e["lowest_planned"]]
    told = [w for w in caught if issubclass(w.category, PlanWarning) and "cosine" in str(w.message)]
    assert bool(below) == bool(told)
    assert below, "the task is meant to leave the plan"


def test_methods_without_a_horizon_have_no_cosine_to_watch():
    model, data = task()
    with pytest.raises(ValueError, match="cosine_every: LoCo"):
        trained(model, data, algorithm=algorithms.LoCo(3, summed=True), cosine_every=2)


def wide(depth=8):
    torch.manual_seed(1)
    model = ResidualMLP(depth, width=8, p=0.0)
    x = torch.randn(4096, 4)
    return model, [(x, (x[:, :3]).argmax(1))] * 3


def peak(method):
    model, data = wide()
    return trained(model, data, algorithm=method).peak_bytes


def test_out_of_memory_goes_on_in_a_thriftier_way_and_says_so(tmp_path):
    exact, recomputed = peak(algorithms.BackPropagation()), peak(algorithms.BackPropagation(2))
    halved = peak(algorithms.Fixed(thriftier(thriftier(hp.Schedule.exact(8)))))
    assert exact > recomputed > halved
    model, data = wide()
    with pytest.warns(TrainingWarning, match=r"step 0 ran out of memory with BackPropagation\(recompute=0\); going on"):
        result = trained(model, data, device=f"emulated:{(exact + recomputed) // 2}", run_dir=tmp_path)
    assert result.peak_bytes <= (exact + recomputed) // 2
    twin, _ = wide()
    trained(twin, data, algorithm=algorithms.BackPropagation(2))
    assert_same_weights(model, twin)
    assert [event["horizon"] for event in events_of(tmp_path, "out_of_memory")] == [8]
    third, _ = wide()
    with pytest.warns(TrainingWarning, match="ran out of memory"):
        trained(third, data, device=f"emulated:{(recomputed + halved) // 2}")
    fourth, _ = wide()
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(TrainingWarning, match="ran out of memory"):
        trained(fourth, data, device=f"emulated:{(recomputed + halved) // 2}", oom_retries=1)
    with pytest.raises(torch.OutOfMemoryError):
        trained(fourth, data, device=f"emulated:{(recomputed + halved) // 2}", oom_retries=0)
    assert all(p.grad is None for p in fourth.parameters())


def test_a_retried_step_is_as_if_it_had_not_been_tried(tmp_path):
    """With dropout and running statistics: the thrifty run from the start gives the same weights."""

    def normed():
        torch.manual_seed(2)
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)) for _ in range(6)]
        return nn.Sequential(*blocks, nn.Linear(16, 3))

    torch.manual_seed(3)
    data = [(torch.randn(512, 16), torch.randint(0, 3, (512,))) for _ in range(4)]
    plain, thrifty = normed(), normed()
    most = trained(plain, data).peak_bytes
    least = trained(thrifty, data, algorithm=algorithms.BackPropagation(2), epochs=2).peak_bytes
    model = normed()
    with pytest.warns(TrainingWarning, match="step 0 ran out of memory"):
        trained(model, data, device=f"emulated:{(most + least) // 2}", epochs=2)
    assert_same_weights(model, thrifty)


def poisoned(data, place):
    found = [(x.clone(), y) for x, y in data]
    found[place][0][0] = math.nan
    return found


def with_statistics():
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(4, 3))


def test_statistics_that_a_first_step_spoils_are_taken_back():
    _, data = task()
    model, twin = with_statistics(), with_statistics()
    trained(twin, [data[1], data[3]])
    with pytest.warns(TrainingWarning):
        trained(model, poisoned(poisoned(data, 0), 2), nonfinite="skip")
    assert_same_weights(model, twin)


@pytest.mark.parametrize("owner", [False, True])
def test_an_update_that_was_not_finite_is_rolled_back(owner, tmp_path):
    """A gradient that is not finite with a loss that is, in a step that has updated weights by then."""
    model, data = task(p=0.0)
    before = copy.deepcopy(model)

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.nan

    how = {"algorithm": Owner()} if owner else {"fused": True}
    with pytest.warns(TrainingWarning, match="a gradient is not finite; rollback"):
        trained(
            model,
            data[:1],
            loss=lambda output, target: F.cross_entropy(Bad.apply(output), target),
            nonfinite="rollback",
            run_dir=tmp_path,
            **how,
        )
    assert_same_weights(model, before)


@pytest.mark.parametrize("method", [algorithms.BackPropagation(), algorithms.Horizon(1)], ids=str)
def test_a_skipped_step_leaves_nothing_behind(method, tmp_path):
    _, data = task()
    model, twin = with_statistics(), with_statistics()
    trained(twin, [*data[:2], data[3]], algorithm=method)
    with pytest.warns(TrainingWarning, match="step 2: loss is nan; skip"):
        result = trained(model, poisoned(data, 2), algorithm=method, nonfinite="skip", run_dir=tmp_path)
    assert_same_weights(model, twin)
    assert math.isnan(result.history[2]["loss"])
    assert math.isfinite(result.final_loss)
    assert [e["updated"] for e in events_of(tmp_path, "step")] == [True, True, False, True]


def test_skipping_is_bounded():
    model, data = task()
    bad = poisoned(poisoned(data, 0), 1)
    with (
        pytest.raises(FloatingPointError, match=r"step 1: loss is nan, which is fault 2 with max_nonfinite=1"),
        pytest.warns(TrainingWarning),
    ):
        trained(model, bad, nonfinite="skip", max_nonfinite=1)


def test_rollback_goes_back_to_the_last_checkpoint(tmp_path):
    _, data = task()
    model, twin = with_statistics(), with_statistics()
    trained(twin, [*data[:2], data[3]], optimizer=adam)  # the checkpoint is that after two steps
    with pytest.warns(TrainingWarning, match="step 2: loss is nan; rollback"):
        trained(model, poisoned(data, 2), optimizer=adam, nonfinite="rollback", run_dir=tmp_path, save_every=2)
    assert_same_weights(model, twin)
    assert [(e["step"], e["to"]) for e in events_of(tmp_path, "rollback")] == [(2, 2)]
    first, start = with_statistics(), with_statistics()
    with pytest.warns(TrainingWarning, match="step 0: loss is nan; rollback"):
        trained(first, poisoned(data, 0)[:1], nonfinite="rollback", run_dir=tmp_path / "b")
    assert_same_weights(first, start)  # there is a checkpoint of the start


def test_statistics_are_taken_back_before_a_step_that_is_not_finite_is_raised():
    _, data = task()
    model, twin = with_statistics(), with_statistics()
    trained(twin, data[:2])
    with pytest.raises(FloatingPointError):
        trained(model, poisoned(data, 2))
    assert_same_weights(model, twin)


def test_a_warm_up_grows_the_horizon(tmp_path):
    model, data = task()
    trained(model, data, algorithm=algorithms.BackPropagation(), warmup=4, epochs=5, run_dir=tmp_path)
    assert [event["horizon"] for event in events_of(tmp_path, "epoch_begin")] == [1, 1, 2, 2, 4]
    twin, _ = task()
    stages = {0: algorithms.Horizon(1), 2: algorithms.Horizon(2, 2), 4: algorithms.BackPropagation()}
    trained(twin, data, algorithm=stages, epochs=5)
    assert_same_weights(twin, model)


def test_frozen_and_low_rank_parameters_pay_for_their_windows_only():
    def peak_of(frozen):
        torch.manual_seed(0)
        model = ResidualMLP(8, width=16, p=0.0)
        for block in model.blocks[:frozen]:
            block.requires_grad_(False)
        if frozen:
            model.stem.requires_grad_(False)
        data = [(torch.randn(2048, 4), torch.randint(0, 3, (2048,)))] * 3
        return trained(model, data).peak_bytes

    assert peak_of(6) < 0.5 * peak_of(0)


def test_progress_tells_loss_pace_memory_and_horizon():
    model, data = task()
    told = []
    trained(model, data, algorithm=algorithms.Horizon(2), epochs=2, progress=lambda *stage: told.append(stage))
    message = told[0][0]
    assert message.startswith("epoch 0: loss ")
    assert "steps/s" in message
    assert "peak" in message
    assert message.endswith("horizon 2")


def test_trainer_is_train_in_two_steps():
    model, data = task()
    result = trained(model, data, epochs=2)
    twin, _ = task()
    trainer = hp.Trainer(twin, data, epochs=2, optimizer=sgd, progress=False)
    assert trainer.train().history == result.history
    assert_same_weights(twin, model)


def test_tensorboard_has_what_the_log_has(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, data = task()
    result = trained(model, data, epochs=2, val_data=data[:1], run_dir=tmp_path, callbacks=[hp.TensorBoard()])
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [e.value for e in seen.Scalars("loss")] == pytest.approx([h["loss"] for h in result.history])
    assert {"lr", "peak_bytes", "horizon", "epoch/val_accuracy"} <= set(seen.Tags()["scalars"])


class Owner(algorithms.Algorithm):
    """Owns its step."""

    def step(self, chain, batch, optimizer):
        optimizer.zero_grad()
        loss = chain.loss(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()


def test_a_method_that_owns_its_step_makes_it():
    model, data = task()
    trained(model, data)
    twin, _ = task()
    trained(twin, data, algorithm=Owner())
    assert_same_weights(twin, model)


class Returns(algorithms.GradientMethod):
    """Returns something."""

    def __init__(self, what):
        self.what = what

    def backward(self, chain, batch, scale=1.0):
        return self.what


BAD = [
    ({"precision": "fp8"}, "precision='fp8': give 'fp32', 'bf16', 'fp16'"),
    ({"accumulate": 0}, "accumulate=0"),
    ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
    ({"max_grad_norm": math.nan}, "max_grad_norm=nan"),
    ({"save_every": 3}, "save_every: it needs a run_dir"),
    ({"resume": True}, "resume: it needs a run_dir"),
    ({"nonfinite": "ignore"}, "nonfinite='ignore'"),
    ({"nonfinite": "rollback"}, "nonfinite='rollback': it needs a run_dir"),
    ({"scheduler": 3}, "scheduler=3"),
    ({"scheduler_every": "batch"}, "scheduler_every='batch'"),
    ({"scheduler": ReduceLROnPlateau, "scheduler_every": "step"}, "ReduceLROnPlateau compares epochs"),
    ({"callbacks": [print]}, "has none of the methods on_train_begin"),
    ({"callbacks": [hp.EarlyStopping]}, "EarlyStopping is a class; give an object"),
    ({"callbacks": hp.EarlyStopping()}, "give a list of them"),
    ({"loss": "mse"}, "loss='mse': give a function"),
    ({"loss": nn.MSELoss}, "loss=MSELoss: this is a class"),
    ({"warmup": 3, "epochs": 3}, "warmup=3: it is to end before the 3 epochs do"),
    ({"warmup": -1}, "warmup=-1"),
    ({"algorithm": {1: algorithms.Horizon(1)}}, "are not first epochs"),
    ({"algorithm": {0: "BP"}}, "algorithm='BP'"),
    ({"algorithm": {0: algorithms.Horizon(1)}, "warmup": 1, "epochs": 2}, "the mapping of algorithms has its own"),
    ({"algorithm": algorithms.LoCo(3, summed=True), "warmup": 1, "epochs": 2}, "has no horizon to grow to"),
    ({"fused": True, "max_grad_norm": 1.0}, "fused and max_grad_norm=1.0: the norm of all gradients"),
    ({"fused": True, "accumulate": 2}, "fused and accumulate=2"),
    ({"fused": True, "precision": "fp16"}, "fused and precision='fp16'"),
    ({"fused": True, "nonfinite": "skip"}, "fused and nonfinite='skip'"),
    ({"algorithm": Owner(), "accumulate": 2}, "accumulate=2: Owner owns its step and does not take it"),
    ({"algorithm": Owner(), "max_grad_norm": 1.0}, "max_grad_norm=1.0: Owner owns its step"),
    ({"algorithm": Owner(), "precision": "bf16"}, "precision='bf16': Owner owns its step"),
    ({"metrics": {"a": 1}, "val_data": [0]}, r"metrics['a']=1"),
    ({"seed": -1}, "seed=-1"),
    ({"algorithm": Owner(), "nonfinite": "skip"}, "nonfinite='skip': Owner owns its step"),
    ({"algorithm": Returns(None)}, "returned NoneType; return the terminal loss"),
    ({"algorithm": Returns(1.5)}, "returned float; return the terminal loss"),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS.step needs a closure"),
    ({"scheduler": lambda o: ReduceLROnPlateau(o, mode="max")}, "give it mode='min'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_honoured_is_refused_with_the_reason(options, message):
    model, data = task()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        trained(model, data, **options)
    assert message in str(caught.value)
    assert_same_weights(model, before)
