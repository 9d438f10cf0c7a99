"""A fused step trains as the plain step does, bit for bit, with at most a block's gradients alive.

Oracles: the plain step written out, a count of what operators read, a step that drops its gradients, bytes.
"""

from copy import deepcopy

import pytest
import torch
from families import ALL, Case, ResidualMLP, between, classes, cnn, encoder, ids, in_place, residual_mlp, tied
from hypothesis import given, settings
from strategies import schedules
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.probes.steady import standing_bytes
from horizonplan.probes.tracker import LiveBytes, own_bytes
from horizonplan.schedule import Schedule, Window
from horizonplan.training.fused import check_schedule, fused

STEPS = 5

SCHEDULES = {
    "h=1": lambda depth: Schedule.horizon(depth, 1),
    "h=2": lambda depth: Schedule.horizon(depth, 2),
    "h=2, s=2": lambda depth: Schedule.horizon(depth, 2, 2),
    "BP": Schedule.exact,
    "h=2, recompute=1": lambda depth: Schedule.horizon(depth, 2, 1, 1),
    "h=3, recompute=2": lambda depth: Schedule.horizon(depth, 3, 1, 2),
    "BP, recompute=1": lambda depth: Schedule.exact(depth, 1),
    "BP, recompute=2": lambda depth: Schedule.exact(depth, 2),
    "LoCo": lambda depth: Schedule.loco(depth, 3),
    "LoCo, summed": lambda depth: Schedule.loco(depth, 2, summed=True),
    "local": lambda depth: Schedule.local(depth, 2),
}

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW, lr a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, lr_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], 0.01),
}


class TiedTransformer(nn.Module):
    """Embedding and output share a weight."""

    def __init__(self, vocabulary=20, width=8, depth=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 12, 0.1, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).flatten(0, 1)


def tied_transformer():
    tokens = ids(3, 6, 20)
    return Case(TiedTransformer(), (tokens, tokens.flatten()), 4, "layers.0")


def frozen():
    """Stem and every other block do not train."""
    case = residual_mlp()
    for module in (case.model.stem, *case.model.blocks[::2]):
        module.requires_grad_(False)
    return case


class Twice(nn.Module):
    """One weight in two modules of a block, another one without a gradient."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def used_twice():
    case = residual_mlp()
    case.model.blocks = nn.ModuleList(Twice(6) for _ in range(5))
    return case


def parametrized():
    case = residual_mlp()
    for block in case.model.blocks:
        weight_norm(block.linear)
    return case


def penalised():
    """The loss reads every weight."""
    case = residual_mlp()

    def compute(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss + 0.01 * sum(p.square().sum() for p in model.parameters())

    case.kwargs["compute_loss"] = compute
    return case


def autocast():
    case = residual_mlp()

    def compute(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    case.kwargs["compute_loss"] = compute
    return case


def checkpointed():
    """Blocks that check-point a part of themselves."""
    case = residual_mlp()

    class Checkpointed(Twice):
        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            inner = run(self.first, x, use_reentrant=False)
            return x + run(lambda y: self.second(torch.tanh(y)), inner, use_reentrant=False)

    case.model.blocks = nn.ModuleList(Checkpointed(6) for _ in range(5))
    return case


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width)

    def forward(self, x):
        return x + self.lstm(x)[0]


def recurrent():
    case = residual_mlp()
    case.model.blocks = nn.ModuleList(Recurrent(6) for _ in range(5))
    return case


MODELS = [residual_mlp, cnn, tied_transformer, frozen]
CORNERS = [between, in_place, tied, encoder, used_twice, parametrized, penalised, autocast, checkpointed, recurrent]


def built(make):
    torch.manual_seed(0)
    case = make()
    return Chain.from_model(case.model.train(), case.batch, **case.kwargs), case.batch


def trainable(chain):
    return [p for p in chain.parameters() if p.requires_grad]


def plain_step(chain, batch, optimizer, schedule):
    loss = horizon_backward(chain, batch, schedule)
    optimizer.step()
    chain.model.zero_grad(set_to_none=True)
    return loss


def fused_step(chain, batch, optimizer, schedule):
    with fused(optimizer):
        loss = horizon_backward(chain, batch, schedule)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None for p in chain.parameters() if id(p) in held)
    chain.model.zero_grad(set_to_none=True)
    return loss


def trained(step, make, optimizer, name):
    """Losses, weights with buffers, and optimiser state after some steps."""
    chain, batch = built(make)
    made, schedule = optimizer(trainable(chain)), SCHEDULES[name](chain.depth)
    check_schedule(chain, schedule)
    losses = []
    for seed in range(STEPS):
        torch.manual_seed(seed)
        losses.append(step(chain, batch, made, schedule))
    return losses, chain.model.state_dict(), made.state_dict()


def assert_equal(found, wanted, where=""):
    """Bit for bit, whatever the order of a dict's entries."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}.{i}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def assert_same_training(make, optimizer, name):
    wanted = trained(plain_step, make, optimizer, name)
    assert_equal(trained(fused_step, make, optimizer, name), wanted)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimiser_trains_as_in_plain_steps(optimizer):
    assert_same_training(residual_mlp, optimizer, "h=2")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", [residual_mlp, tied_transformer])
def test_every_schedule_trains_as_in_plain_steps(make, name):
    assert_same_training(make, OPTIMIZERS["AdamW, amsgrad"], name)


@pytest.mark.parametrize("name", ["h=1", "LoCo, summed"])
@pytest.mark.parametrize("make", [cnn, frozen, *CORNERS])
def test_shared_and_unusual_weights_train_as_in_plain_steps(make, name):
    assert_same_training(make, OPTIMIZERS["SGD"], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", CORNERS)
def test_shared_and_unusual_weights_train_as_in_plain_steps_with_every_schedule(make, name):
    assert_same_training(make, OPTIMIZERS["SGD"], name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", MODELS)
def test_every_optimiser_and_schedule_train_as_in_plain_steps(make, name, optimizer):
    assert_same_training(make, optimizer, name)


class ReadsAfterUpdate(TorchDispatchMode):
    """Counts operators that read a weight after its update in this step; the optimiser's own are left out."""

    def __init__(self, model):
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.updated, self.late, self.updating = {}, set(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not self.updating:
            keys = {t.untyped_storage()._cdata for t in read}
            self.late |= {self.updated[key] for key in keys & self.updated.keys()}
        return func(*args, **(kwargs or {}))

    def optimizer(self, parameters):
        outer = self

        class Told(torch.optim.SGD):
            def step(self, closure=None):
                outer.updating = True
                super().step()
                outer.updating = False
                for p in self.param_groups[0]["params"]:
                    outer.updated[p.untyped_storage()._cdata] = outer.names[id(p)]

        return Told(parameters, 0.01)


def late_reads(chain, batch, schedule):
    """Names of weights that are read after their update, and of those that are updated."""
    watch = ReadsAfterUpdate(chain.model)
    with fused(watch.optimizer(trainable(chain))), watch:
        horizon_backward(chain, batch, schedule)
    return watch.late, set(watch.updated.values())


def assert_no_late_reads(make):
    chain, batch = built(make)
    for name, schedule in SCHEDULES.items():
        late, updated = late_reads(chain, batch, schedule(chain.depth))
        assert not late, name
        assert updated == {n for n, p in chain.model.named_parameters() if p.requires_grad}, name


@pytest.mark.parametrize("make", [residual_mlp, tied_transformer, in_place, penalised])
def test_no_operator_reads_a_weight_after_its_update(make):
    assert_no_late_reads(make)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make for make in ALL if make is not between])  # whose heads run gains for nothing
def test_no_operator_reads_a_weight_after_its_update_in_any_family(make):
    assert_no_late_reads(make)


def by_hand(depth):
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth)]
    return Chain(nn.Linear(3, 6), blocks, nn.Linear(6, 4)), (torch.randn(4, 3), classes(4))


@settings(max_examples=80)
@given(schedule=schedules(max_depth=5))
def test_refused_are_exactly_the_schedules_that_read_a_weight_after_its_update(schedule):
    chain, batch = by_hand(schedule.depth)
    try:
        check_schedule(chain, schedule)
    except ValueError:
        if schedule.recompute:
            assert late_reads(chain, batch, schedule)[0]
        else:  # the graph that was kept tells
            with pytest.raises(ValueError, match=r"fused: .*changed in place"):
                late_reads(chain, batch, schedule)
    else:
        assert late_reads(chain, batch, schedule) == (set(), {n for n, _ in chain.model.named_parameters()})


def test_a_window_that_passes_through_an_updated_block_is_refused_by_name():
    chain, _ = by_hand(4)
    schedule = Schedule(4, (Window(0, 2, 2), Window(0, 1, 3), Window(2, 4, 4)))
    with pytest.raises(ValueError, match=r"fused: .*pass through blocks \[1\]"):
        check_schedule(chain, schedule)


def drop(p):
    """In the optimiser's place: a gradient is freed when it is complete, and nothing is updated."""
    p.grad = None


def dominated_by_weights():
    return Case(ResidualMLP(8, width=64, p=0.0, norm=False), (torch.randn(2, 4), classes(2)), 8, "blocks.0")


def peak_bytes(step, optimizer, name):
    """The second step's peak, as the trainer has it: bytes alive when it begins, and what the tracker saw."""
    chain, batch = built(dominated_by_weights)
    made, schedule = optimizer(trainable(chain)), SCHEDULES[name](chain.depth)
    step(chain, batch, made, schedule)
    base = standing_bytes(chain, made, batch)
    with LiveBytes() as tracker:
        step(chain, batch, made, schedule)
    return base + tracker.peak, tracker.peak


def dropped_peak(name):
    chain, batch = built(dominated_by_weights)
    for p in trainable(chain):
        p.register_post_accumulate_grad_hook(drop)
    schedule = SCHEDULES[name](chain.depth)
    horizon_backward(chain, batch, schedule)
    with LiveBytes() as tracker:
        horizon_backward(chain, batch, schedule)
    return tracker.peak


def momentum(parameters):
    """An optimiser that needs no temporaries from its second step on."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_fused_step_needs_as_much_as_one_that_drops_its_gradients(name):
    assert peak_bytes(fused_step, momentum, name)[1] == dropped_peak(name)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW, amsgrad", "Adagrad", "RAdam"])
@pytest.mark.parametrize("name", ["h=1", "BP"])
def test_an_optimiser_adds_at_most_the_temporaries_of_one_parameter(name, optimizer):
    gradients = own_bytes(trainable(built(dominated_by_weights)[0]))
    temporaries = peak_bytes(plain_step, OPTIMIZERS[optimizer], name)[1] - gradients
    assert peak_bytes(fused_step, OPTIMIZERS[optimizer], name)[1] <= dropped_peak(name) + temporaries


@pytest.mark.parametrize("optimizer", [momentum, OPTIMIZERS["AdamW, amsgrad"]], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", ["h=1", "BP"])
def test_all_gradients_but_a_blocks_are_saved_unless_activations_hide_it(name, optimizer):
    """Activations, and their gradients, which are as large at most, may stand where weights' gradients stood."""
    chain, batch = built(dominated_by_weights)
    gradients, block = own_bytes(trainable(chain)), max(own_bytes(list(b.parameters())) for b in chain.blocks)
    with LiveBytes() as forward:
        chain.loss(batch)
    bound = gradients - block - 2 * forward.peak
    assert bound > 0.7 * gradients
    saved = peak_bytes(plain_step, optimizer, name)[0] - peak_bytes(fused_step, optimizer, name)[0]
    assert bound <= saved <= gradients


def test_schedulers_and_groups_of_other_settings_work_as_ever():
    def run(step):
        chain, batch = built(residual_mlp)
        named = list(chain.model.named_parameters())
        made = torch.optim.AdamW([{"params": named[:5], "lr": 0.1}, {"params": named[5:], "weight_decay": 0.3}])
        rate, schedule = torch.optim.lr_scheduler.StepLR(made, 1, 0.5), Schedule.horizon(chain.depth, 2)
        for seed in range(3):
            torch.manual_seed(seed)
            step(chain, batch, made, schedule)
            rate.step()  # it warns when it finds that no step was taken
        return chain.model.state_dict(), made.state_dict()

    assert_equal(run(fused_step), run(plain_step))


def test_plain_and_fused_steps_may_take_turns():
    def run(steps):
        chain, batch = built(residual_mlp)
        schedule = Schedule.horizon(chain.depth, 1)
        made = OPTIMIZERS["Adam"](trainable(chain))
        for seed, step in enumerate(steps):
            torch.manual_seed(seed)
            state, made = made.state_dict(), OPTIMIZERS["Adam"](trainable(chain))
            made.load_state_dict(deepcopy(state))
            step(chain, batch, made, schedule)
        return chain.model.state_dict(), made.state_dict()

    assert_equal(run([fused_step, plain_step, fused_step, fused_step]), run([plain_step] * 4))


def test_two_optimisers_and_sparse_gradients():
    def run(step_both):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Flatten(), nn.Linear(30, 6))
        chain = Chain(stem, [nn.Linear(6, 6) for _ in range(3)], nn.Linear(6, 4))
        batch = ids(4, 5, 20), classes(4)
        sparse = torch.optim.SparseAdam(stem[0].parameters(), 0.1)
        dense = torch.optim.Adam([p for p in chain.parameters() if p is not stem[0].weight], 0.1)
        for _ in range(3):
            step_both(chain, batch, sparse, dense)
            assert all(p.grad is None for p in chain.parameters())
        return chain.model.state_dict(), sparse.state_dict(), dense.state_dict()

    def plain(chain, batch, sparse, dense):
        horizon_backward(chain, batch, 1)
        for optimizer in (sparse, dense):
            optimizer.step()
            optimizer.zero_grad()

    def both_fused(chain, batch, sparse, dense):
        with fused(sparse), fused(dense):
            horizon_backward(chain, batch, 1)

    assert_equal(run(both_fused), run(plain))


def test_a_parameter_in_no_group_keeps_its_gradient():
    chain, batch = by_hand(3)
    horizon_backward(chain, batch, 3)
    wanted = [p.grad for p in chain.blocks[1].parameters()]
    chain.model.zero_grad()
    with fused(torch.optim.SGD(chain.blocks[0].parameters(), 0.1)):
        horizon_backward(chain, batch, 3)
    assert_equal([p.grad for p in chain.blocks[1].parameters()], wanted)
    assert all(p.grad is None for p in chain.blocks[0].parameters())


def clip(p):
    p.grad.clamp_(-1e-3, 1e-3)


def test_hooks_that_were_there_before_run_first():
    def run(step):
        chain, batch = built(residual_mlp)
        for p in trainable(chain):
            p.register_post_accumulate_grad_hook(clip)
        step(chain, batch, torch.optim.SGD(trainable(chain), 0.1), Schedule.horizon(chain.depth, 2))
        return chain.model.state_dict()

    torch.manual_seed(1)
    wanted = run(plain_step)
    torch.manual_seed(1)
    assert_equal(run(fused_step), wanted)


class Counting(torch.optim.SGD):
    """Counts its steps in the group, so once for all parameters."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


def hooked(parameters, register):
    made = torch.optim.SGD(parameters, 0.1)
    getattr(made, register)(lambda *_: None)
    return made


REFUSED = {
    "step needs a closure": torch.optim.LBFGS,
    "SGD has hooks on its step, .*": lambda p: hooked(p, "register_step_post_hook"),
    ".* once a parameter instead of once a step": lambda p: hooked(p, "register_step_pre_hook"),
    r"changes \['k'\] of its parameter group": Counting,
    "give a torch.optim.Optimizer": lambda p: "adam",
}


@pytest.mark.parametrize(("reason", "make"), REFUSED.items(), ids=REFUSED)
def test_optimisers_that_cannot_be_fused_are_refused(reason, make):
    chain, batch = by_hand(3)
    with pytest.raises(ValueError, match=f"fused: .*{reason}"), fused(make(trainable(chain))):
        horizon_backward(chain, batch, 1)


def test_hooks_on_the_steps_of_all_optimisers_are_refused():
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="fused: SGD has hooks"), fused(torch.optim.SGD([nn.Parameter()], 0.1)):
            pass
    finally:
        handle.remove()


def test_gradients_of_an_earlier_backward_pass_are_refused():
    chain, batch = by_hand(3)
    horizon_backward(chain, batch, 1)
    with pytest.raises(ValueError, match=r"fused: .*zero_grad"), fused(torch.optim.SGD(trainable(chain), 0.1)):
        pass


def test_a_second_backward_pass_is_refused_and_no_hook_stays():
    chain, batch = by_hand(3)
    optimizer = torch.optim.SGD(trainable(chain), 0.1)

    def twice():
        with fused(optimizer):
            horizon_backward(chain, batch, 1)
            horizon_backward(chain, batch, 1)

    with pytest.raises(ValueError, match=r"fused: a second gradient of a parameter of shape \(6,"):
        twice()
    chain.model.zero_grad()
    horizon_backward(chain, batch, 1)
    assert all(p.grad is not None for p in chain.parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in chain.parameters()}


@pytest.mark.parametrize("h", [1, 3])
def test_a_head_that_reads_a_block_unseen_is_refused(h):
    """A chain built by hand learns in its first step what a callable head reads: too late for a fused one."""
    blocks = [nn.Linear(6, 6) for _ in range(3)]
    chain = Chain(None, blocks, lambda x: x @ blocks[0].weight)
    batch = torch.randn(4, 6), classes(4, 6)
    with pytest.raises(ValueError, match="fused: a second gradient"):
        fused_step(chain, batch, momentum(trainable(chain)), Schedule.horizon(3, h))
    chain.model.zero_grad()
    fused_step(chain, batch, momentum(trainable(chain)), Schedule.horizon(3, h))  # now it is known


def test_a_weight_that_the_graph_reads_unseen_is_refused():
    weight = nn.Parameter(torch.randn(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    loss = ((x @ weight.detach()).tanh() @ weight).sum()
    with pytest.raises(ValueError, match=r"fused: .*changed in place"), fused(torch.optim.SGD([weight], 0.1)):
        loss.backward()


def test_other_errors_of_a_backward_pass_stay_as_they_are():
    loss = nn.Parameter(torch.ones(3)) * 2
    with pytest.raises(RuntimeError, match="scalar outputs"), fused(torch.optim.SGD([nn.Parameter()], 0.1)):
        loss.backward()
