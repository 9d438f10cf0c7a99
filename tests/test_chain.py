"""A model is seen as the chain it is, by whatever name; what is none is refused with the place and the ways out."""

import re
from contextlib import suppress
from dataclasses import dataclass

import families as fm
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from horizonplan.chain import Chain, ChainError
from horizonplan.gradient import horizon_backward
from horizonplan.probes.budget import Budget


@pytest.mark.parametrize("family", fm.ALL)
def test_blocks_are_found(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    assert chain.depth == case.depth
    assert chain.names[0] == case.first
    assert chain.model is case.model
    assert list(chain.parameters()) == list(case.model.parameters())


@pytest.mark.parametrize("family", fm.ALL)
def test_every_parameter_is_in_the_stem_in_a_block_or_in_the_head(family):
    case = family()
    layout = Chain.from_model(case.model, case.batch).layout
    owned = [p for group in (*layout.before, *layout.block, layout.head) for p in group]
    assert {id(p) for p in owned} == {id(p) for p in case.model.parameters()}
    repeated = len(owned) - len({id(p) for p in owned})
    assert (repeated > 0) == (len(layout.shared) > 0)


def test_what_runs_between_blocks_belongs_to_the_block_after_it():
    case = fm.between()
    layout = Chain.from_model(case.model, case.batch).layout
    gains = list(case.model.gains)
    assert [[id(p) for p in group] for group in layout.before[1:]] == [[id(g)] for g in gains[:3]]
    assert [id(p) for p in layout.before[0]] == [id(case.model.embed.weight)]
    assert {id(p) for p in layout.head} == {id(gains[3]), *(id(p) for p in case.model.head.parameters())}


def test_convnext_s_downsampling_belongs_to_the_block_after_it():
    case = fm.convnext()
    layout = Chain.from_model(case.model, case.batch).layout
    names = {id(p): n for n, p in case.model.named_parameters()}
    between = {names[id(p)].rsplit(".", 2)[0] for group in layout.before[1:] for p in group}
    assert between == {f"convnext.encoder.stages.{i}.downsampling_layer" for i in (1, 2, 3)}


def test_block_parameters_leave_out_stem_head_and_frozen_ones():
    case = fm.residual_mlp()
    chain = Chain.from_model(case.model, case.batch)
    assert chain.block_parameters() == list(case.model.blocks.parameters())
    case.model.blocks[0].requires_grad_(False)
    assert chain.block_parameters() == list(case.model.blocks[1:].parameters())
    assert chain.trainable == (False, True, True, True, True)


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ("blocks.*", [f"blocks.{t}" for t in range(5)]),
        ("blocks", [f"blocks.{t}" for t in range(5)]),
        ("blocks.[0-2]", [f"blocks.{t}" for t in range(3)]),
        ("*.linear", [f"blocks.{t}.linear" for t in range(5)]),
        (["blocks.1", "blocks.3"], ["blocks.1", "blocks.3"]),
        (["stem", "blocks.0"], ["stem", "blocks.0"]),
        (["blocks.2"], ["blocks.2"]),
    ],
)
def test_blocks_are_named_by_pattern_container_or_list(blocks, names):
    case = fm.residual_mlp()
    if blocks == "*.linear":  # inside a residual block the state goes two ways
        with pytest.raises(ChainError, match="no chain there"):
            Chain.from_model(case.model, case.batch, blocks)
        return
    chain = Chain.from_model(case.model, case.batch, blocks)
    assert list(chain.names) == names
    loss, wanted = oracle.back_propagation(chain, case.batch)
    found_loss, found = oracle.step(lambda: horizon_backward(chain, case.batch, chain.depth), case.model)
    assert torch.equal(loss, found_loss)
    oracle.assert_same_gradients(found, wanted)
    _, local = oracle.step(lambda: horizon_backward(chain, case.batch, 1), case.model)
    assert set(local) == set(wanted)


@dataclass
class Record:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def encoding(batch):
    import transformers as tf

    return tf.BatchEncoding(batch)


def untouched(batch):
    return batch


@pytest.mark.parametrize(
    "kind", [untouched, lambda b: Record(**b), encoding, lambda b: tuple(b.values()), lambda b: list(b.values())]
)
def test_batches_of_every_kind_give_the_same_gradient(kind):
    case = fm.bert()
    case.batch = dict(
        sorted(case.batch.items(), key=lambda item: ["input_ids", "attention_mask", "labels"].index(item[0]))
    )
    wanted_chain = Chain.from_model(case.model, case.batch)
    batch = kind(case.batch)
    chain = Chain.from_model(case.model, batch)
    for h in (1, 2, 4):
        loss, wanted = oracle.step(lambda h=h: horizon_backward(wanted_chain, case.batch, h), case.model)
        found_loss, found = oracle.step(lambda h=h: horizon_backward(chain, batch, h), case.model)
        torch.testing.assert_close(found_loss, loss)
        oracle.assert_same_gradients(found, wanted, 1e-6)


def test_loss_and_compute_loss_reach_every_window():
    case = fm.residual_mlp()
    weights = torch.tensor([1.0, 5.0, 0.1])
    by_loss = Chain.from_model(case.model, case.batch, loss=lambda o, y: F.cross_entropy(o, y, weights))
    by_compute = Chain.from_model(
        case.model, case.batch, compute_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], weights)
    )
    plain = Chain.from_model(case.model, case.batch)
    for h in (1, 3, 5):
        runs = [
            oracle.step(lambda c=c, h=h: horizon_backward(c, case.batch, h), case.model)
            for c in (by_loss, by_compute, plain)
        ]
        assert torch.equal(runs[0][0], runs[1][0])
        assert not torch.equal(runs[0][0], runs[2][0])
        oracle.assert_same_gradients(runs[0][1], runs[1][1])


def test_a_chain_by_hand_and_the_same_model_found_agree():
    case = fm.residual_mlp()
    found = Chain.from_model(case.model, case.batch)
    by_hand = Chain(case.model.stem, case.model.blocks, case.model.head)
    for h, s, k in ((1, 1, 0), (2, 1, 0), (3, 3, 1), (5, 1, 2)):
        _, wanted = oracle.step(lambda h=h, s=s, k=k: horizon_backward(found, case.batch, h, s, k), case.model)
        _, other = oracle.step(lambda h=h, s=s, k=k: horizon_backward(by_hand, case.batch, h, s, k), case.model)
        oracle.assert_same_gradients(other, wanted)


class Sequence(nn.Module):
    """Five linear layers whose forward is the caller's."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.way = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.way(self, x)


BATCH = torch.randn(5, 4), torch.randint(0, 3, (5,))


def long_skip(model, x):
    x = start = model.stem(x)
    for block in model.blocks:
        x = block(x)
    return model.head(x + start)


def u_net(model, x):
    x = model.stem(x)
    saved = []
    for block in model.blocks[:2]:
        x = block(x)
        saved.append(x)
    for block in model.blocks[2:]:
        x = block(x + saved.pop())
    return model.head(x)


def dense_net(model, x):
    states = [model.stem(x)]
    for block in model.blocks:
        states.append(block(sum(states)))
    return model.head(states[-1])


def all_states_in_the_head(model, x):
    x, total = model.stem(x), 0
    for block in model.blocks:
        x = block(x)
        total = total + x
    return model.head(total)


def residual_outside(model, x):
    x = model.stem(x)
    for block in model.blocks:
        x = x + block(x)
    return model.head(x)


def one_block_twice(model, x):
    x = model.stem(x)
    for block in (*model.blocks, model.blocks[0]):
        x = block(x)
    return model.head(x)


def one_block_never(model, x):
    x = model.stem(x)
    for block in model.blocks[:3]:
        x = block(x)
    return model.head(x)


def out_of_order(model, x):
    x = model.stem(x)
    for t in (0, 2, 1, 3):
        x = model.blocks[t](x)
    return model.head(x)


def in_parallel(model, x):
    x = model.stem(x)
    return model.head(sum(block(x) for block in model.blocks))


def cut_by_the_model(model, x):
    x = model.stem(x)
    for block in model.blocks:
        x = block(x.detach())
    return model.head(x)


def reentrant(model, x):
    x = model.stem(x)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return model.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (long_skip, ["the head and loss", "no chain"]),
        (u_net, ["before block 'blocks.3'", "the output of block 'blocks.0'"]),
        (dense_net, ["before block 'blocks.1'", "no chain"]),
        (all_states_in_the_head, ["the head and loss", "no chain"]),
        (residual_outside, ["before block 'blocks.1'", "no chain"]),
        (one_block_twice, ["'blocks.0'", "more than once"]),
        (one_block_never, ["'blocks.3'", "never called"]),
        (out_of_order, ["'blocks.2'", "order"]),
        (in_parallel, ["before block 'blocks.1'", "one tensor shared by many blocks"]),
        (cut_by_the_model, ["'blocks.1'", "'blocks.0'"]),
        (reentrant, ["use_reentrant", "recompute"]),
    ],
)
def test_what_is_no_chain_is_refused_with_the_place_and_the_ways_out(forward, words):
    model = Sequence(forward)
    before = {n: list(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ChainError) as error:
        Chain.from_model(model, BATCH, blocks="blocks")
    assert all(word in str(error.value) for word in words), error.value
    assert {n: list(vars(m)) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("forward", [u_net, dense_net, residual_outside, in_parallel])
def test_what_is_no_chain_is_not_found_either(forward):
    with pytest.raises(ChainError, match=r"no run of blocks found in Sequence\. Tried: .*Ways out: "):
        Chain.from_model(Sequence(forward), BATCH)


def test_checkpointing_around_blocks_is_refused_in_a_step():
    def around(model, x):
        x = model.stem(x)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return model.head(x)

    model = Sequence(around)
    chain = Chain.from_model(model, BATCH)
    with pytest.raises(ChainError, match=r"called out of turn.*checkpointing around blocks.*recompute=1"):
        horizon_backward(chain, BATCH, 2)
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_inside_blocks_is_left_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(4)), nn.Linear(6, 3))
    chain = Chain.from_model(model, BATCH)
    _, wanted = oracle.back_propagation(chain, BATCH)
    for recompute in (0, 1):
        _, found = oracle.step(lambda k=recompute: horizon_backward(chain, BATCH, chain.depth, recompute=k), model)
        oracle.assert_same_gradients(found, wanted)
    _, plain = oracle.step(lambda: horizon_backward(chain, BATCH, 2), model)
    _, again = oracle.step(lambda: horizon_backward(chain, BATCH, 2, recompute=2), model)
    oracle.assert_same_gradients(again, plain)


class Keyword(nn.Module):
    """Takes its state by an unusual name, after another tensor, and overwrites it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, *, mask, hidden):
        hidden *= 1.5
        return {"out": hidden + self.linear(hidden) * mask, "mask": mask}


def test_the_state_is_found_among_keyword_arguments():
    def by_name(model, x):
        mask, x = (x[:, :1] > 0).to(x.dtype), model.stem(x)
        for block in model.blocks:
            x = block(mask=mask, hidden=x)["out"]
        return model.head(x)

    model = Sequence(by_name)
    model.blocks = nn.ModuleList(Keyword() for _ in range(4))
    chain = Chain.from_model(model, BATCH)
    assert chain.depth == 4
    loss, wanted = oracle.back_propagation(chain, BATCH)
    for recompute in (0, 1, 2):
        found_loss, found = oracle.step(lambda k=recompute: horizon_backward(chain, BATCH, 4, recompute=k), model)
        assert torch.equal(loss, found_loss)
        oracle.assert_same_gradients(found, wanted)


class Twins(nn.Module):
    """Blocks that return two tensors, both of which the next one uses."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, y):
            return self.a(x) + y, self.b(y) + x

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        x = y = self.stem(x)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x + y)


def test_two_states_are_refused():
    with pytest.raises(ChainError, match="second tensor that needs a gradient"):
        Chain.from_model(Twins(), BATCH, blocks="blocks")


def test_t5_s_shared_position_bias_is_refused():
    import transformers as tf

    config = tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, vocab_size=50)
    model = tf.T5EncoderModel(config)
    head = nn.Linear(16, 3)

    def compute(model, batch):
        return F.cross_entropy(head(model(batch[0]).last_hidden_state.mean(1)), batch[1])

    with pytest.raises(ChainError, match="Ways out: ") as error:
        Chain.from_model(model, (fm.ids(), fm.classes()), blocks="encoder.block", compute_loss=compute)
    assert "encoder.block.1" in str(error.value) or "encoder.block.0" in str(error.value)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hugging_face_checkpointing_is_refused(reentrant):
    case = fm.bert()
    case.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ChainError, match=r"checkpointing on.*activation_checkpointing_disable\(\).*recompute=1"):
        Chain.from_model(case.model, case.batch)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_inside_a_block_are_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return checkpoint(self.linear, x, use_reentrant=True)

    model = nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(3)), nn.Linear(6, 3))
    with pytest.raises(ChainError, match=r"use_reentrant=True.*recompute=1"):
        Chain.from_model(model, BATCH)


def test_data_parallel_and_compiled_models_are_refused_by_name():
    model = fm.residual_mlp().model
    with pytest.raises(ChainError, match=r"DataParallel.*model\.module"):
        Chain.from_model(nn.DataParallel(model), BATCH)
    with pytest.raises(ChainError, match=r"OptimizedModule.*block\.compile\(\)"):
        Chain.from_model(torch.compile(model), BATCH)


@pytest.mark.parametrize("model", [None, "bert", lambda x: x])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ValueError, match=r"model is a .*: give an nn\.Module"):
        Chain.from_model(model, BATCH)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("layers.*", "blocks='layers.*' matches no submodule; see model.named_modules()"),
        (["blocks.0", "blocks.9"], "blocks: 'blocks.9' is no submodule"),
        (["blocks.0", "blocks.0"], "blocks: 'blocks.0' is listed already"),
        ([], "blocks=[] is empty"),
        (["blocks.1", "blocks.0"], "list the blocks in the order in which they run"),
        (["blocks.0", "blocks.0.linear"], "blocks.0.linear"),
    ],
)
def test_names_that_fit_nothing_are_refused(blocks, words):
    case = fm.residual_mlp()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        Chain.from_model(case.model, case.batch, blocks)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.randn(5, 7), BATCH[1]), ["batch: ResidualMLP rejected a tuple", "(5, 7)"]),
        ({"z": torch.randn(5, 4), "labels": BATCH[1]}, ["batch: ResidualMLP rejected a dict"]),
        ((BATCH[0], BATCH[0], BATCH[1]), ["batch: ResidualMLP rejected a tuple"]),
        ((BATCH[0],), ["batch: no target in a tuple", "compute_loss"]),
        (BATCH[0], ["batch: no target in a Tensor", "compute_loss"]),
        ((torch.randn(5, 4), torch.randn(5, 9)), ["loss=None: no default loss", "(5, 9)"]),
        ((torch.randn(5, 4), torch.full((5,), 7)), ["batch: ResidualMLP rejected", "out of bounds"]),
    ],
)
def test_a_batch_that_the_model_rejects_is_refused_with_its_shapes(batch, words):
    model = fm.residual_mlp().model
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Chain.from_model(model, batch)
    assert all(word in str(error.value) for word in words), error.value


def test_a_loss_that_is_no_scalar_is_refused():
    case = fm.residual_mlp()
    with pytest.raises(ValueError, match=r"loss: expected one floating-point scalar, got shape \(6,\)"):
        Chain.from_model(case.model, case.batch, loss=lambda o, y: F.cross_entropy(o, y, reduction="none"))


def test_loss_and_compute_loss_together_are_refused():
    case = fm.residual_mlp()
    with pytest.raises(ValueError, match="loss and compute_loss are both given"):
        Chain.from_model(case.model, case.batch, loss=F.cross_entropy, compute_loss=lambda m, b: m(b[0]).sum())


def test_a_loss_under_no_grad_is_refused():
    case = fm.residual_mlp()

    def compute(model, batch):
        with torch.no_grad():
            return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ChainError, match="under no_grad"):
        Chain.from_model(case.model, case.batch, blocks="blocks", compute_loss=compute)


@pytest.mark.parametrize("blocks", [[], [1], [nn.Linear(2, 2), None]])
def test_a_chain_by_hand_needs_modules(blocks):
    with pytest.raises(ValueError, match=r"blocks: give a non-empty list of nn\.Modules"):
        Chain(None, blocks, None)


def test_a_chain_by_hand_refuses_one_module_as_two_blocks():
    block = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="blocks: one module is used as two blocks; give each block a module"):
        Chain(None, [block, nn.Linear(4, 4), block], None)


class SkipsAtRandom(nn.Module):
    def __init__(self, skip=None):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.skip = skip

    def forward(self, x):
        x = self.stem(x)
        for t, block in enumerate(self.blocks):
            if t != self.skip:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("skip", [0, 2, 3])
@pytest.mark.parametrize("h", [1, 2, 4])
def test_a_block_skipped_in_a_later_forward_is_refused_and_leaves_no_gradient(skip, h):
    model = SkipsAtRandom()
    chain = Chain.from_model(model, BATCH)
    model.skip = skip
    with pytest.raises(
        ChainError, match=r"block 'blocks.* was (called out of turn|not called)|the last block was not called"
    ):
        horizon_backward(chain, BATCH, h)
    assert all(p.grad is None for p in model.parameters())
    model.skip = None
    _, wanted = oracle.back_propagation(chain, BATCH)
    oracle.assert_same_gradients(oracle.step(lambda: horizon_backward(chain, BATCH, 4), model)[1], wanted)


def test_a_batch_that_the_model_rejects_in_a_step_leaves_no_gradient():
    case = fm.bert()
    chain = Chain.from_model(case.model, case.batch)
    case.batch["input_ids"] = case.batch["input_ids"] + 1000
    with pytest.raises(IndexError):
        horizon_backward(chain, case.batch, 2)
    assert all(p.grad is None for p in case.model.parameters())
    assert not any("_compiled_call_impl" in vars(m) for m in case.model.modules())


class Dropping(nn.Module):
    """Skips its third block at random in train mode."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))

    def forward(self, x):
        for t, block in enumerate(self.blocks):
            if not (self.training and t == 2 and torch.rand(()) >= self.keep):
                x = block(x)
        return x


def test_a_block_that_train_mode_skips_is_refused_at_once():
    model = Dropping(keep=0.0)
    batch = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(ChainError, match=r"\['blocks.2'\] run in eval mode but not in train mode"):
        Chain.from_model(model, batch)
    assert model.training
    assert Chain.from_model(model.eval(), batch).depth == 5


def test_layer_drop_in_a_config_is_refused_by_name():
    model = Dropping(keep=1.0)
    model.config = type("Config", (), {"layerdrop": 0.1})()
    with pytest.raises(ChainError, match=r"config.layerdrop=0.1: .* set it to 0"):
        Chain.from_model(model, (torch.randn(3, 4), torch.randn(3, 4)))


class Positive(nn.Module):
    """A head that is only defined for positive states."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Softplus()) for _ in range(4))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x.log())


def test_a_head_that_needs_what_real_states_have_is_accepted():
    batch = torch.rand(6, 4), torch.randint(0, 3, (6,))
    assert Chain.from_model(Positive(), batch).depth == 4


def test_a_model_is_traced_inside_autocast():
    batch = torch.rand(6, 4), torch.randint(0, 3, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Chain.from_model(Positive(), batch).depth == 4


def test_finding_blocks_does_not_hold_the_whole_graph():
    from horizonplan.models import SequenceClassifier
    from horizonplan.probes import LiveBytes

    model = SequenceClassifier(8, 16, 4, width=32, depth=12, heads=4)
    batch = torch.randn(16, 16, 8), torch.randint(0, 4, (16,))
    with LiveBytes() as plain:
        model(batch[0]).sum().backward()
    with LiveBytes() as finding:
        chain = Chain.from_model(model, batch)
    assert chain.depth == 12
    assert finding.peak < 0.5 * plain.peak


def test_running_out_of_memory_is_no_fault_of_the_chain():
    """A head that is large beside its blocks: whichever trial does not fit, memory is what ran out."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Linear(8, 5000))
    batch = torch.randn(64, 8), torch.randint(0, 5000, (64,))
    for limit_bytes in range(2**19, 2**22, 2**16):
        with Budget(limit_bytes), suppress(torch.OutOfMemoryError):
            Chain.from_model(model, batch)
