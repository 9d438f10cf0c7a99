"""What holds on a real card: isolated and predicted bytes, NVML's, running out of memory, plans, gradients.

    python -m pytest -m gpu tests

Everything here is skipped without a CUDA device. Let nothing else use the card meanwhile: where the driver hides
processes, NVML's bytes are the whole device's less those before.
"""

import gc
import math
import os

import families
import pytest
import torch
from test_isolated import children_of
from torch import nn

import horizonplan as hp
from horizonplan import probes
from horizonplan.models import CharacterGPT, ResidualCNN, ResidualMLP
from horizonplan.predict import step_bytes
from horizonplan.probes.budget import available_bytes
from horizonplan.probes.memory import OUT_OF_MEMORY
from horizonplan.probes.nvml import read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "ignore::horizonplan.curves.PoorFitWarning"
    ),  # small tasks: the fits are no concern here
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # the backward's thread, once a process
]

TOLD = ("process", "driver peak", "device used minus baseline")


def card():
    return torch.device("cuda", torch.cuda.current_device())


def transformer(samples=32):
    """Six blocks, 0.85 GiB a step under back-propagation with AdamW: far above the allocator's rounding."""
    torch.manual_seed(0)
    model = CharacterGPT(256, width=256, depth=6, heads=8, context=256).to(card())
    tokens = torch.randint(256, (samples, 256), device=card())
    batch = tokens, tokens.roll(-1, 1)
    return hp.Chain.from_model(model, batch), batch


@pytest.fixture(scope="module")
def alone():
    """A chain and a batch on the card, and three horizons measured in fresh processes."""
    chain, batch = transformer()
    return chain, batch, probes.memory(chain, [batch], [1, 3, chain.depth])


@pytest.fixture
def nothing_is_left():
    """After the test no process is left, and as many bytes are allocated as before."""
    product = torch.ones(64, 64, device=card(), requires_grad=True)
    torch.autograd.backward((product @ product).sum())  # cuBLAS's workspace is there from now on
    del product
    gc.collect()
    processes, allocated = children_of(os.getpid()), torch.cuda.memory_allocated()
    yield
    gc.collect()
    assert children_of(os.getpid()) <= processes
    assert torch.cuda.memory_allocated() == allocated


@pytest.fixture
def limited():
    """A function that leaves this process so many bytes of the card."""
    total = torch.cuda.get_device_properties(card()).total_memory

    def limit(count):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(count / total, card())

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, card())


def needs_nvml():
    seen = read(card())
    if seen.process_bytes is None and seen.used_bytes is None:
        pytest.skip(f"NVML shows no bytes here: {seen.reason}")


def fingerprint(model):
    """Copies of all that a probe could disturb, on the host."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}, {t.device for _, t in named}


def difference(left, right):
    return ((left - right).norm() / right.norm().clamp_min(1e-30)).item()


# memory


def test_isolated_measurement_equals_the_one_in_this_process(alone):
    chain, batch, isolated = alone
    here = probes.memory(chain, [batch], [1, 3, chain.depth], in_children=False)
    assert [s.horizon for s in isolated] == [s.horizon for s in here] == [1, 3, chain.depth]
    for apart, together in zip(isolated, here, strict=True):
        assert "in_process" not in apart.detail
        assert apart.detail["how"] == together.detail["how"] == "max_memory_allocated"
        assert apart.detail["base_bytes"] == together.detail["base_bytes"]
        assert apart.value == pytest.approx(together.value, rel=0.02)


def test_nvml_sees_what_the_allocator_reserves_and_a_context(alone):
    needs_nvml()
    for sample in alone[2]:
        assert sample.detail["nvml"] in TOLD, sample.detail["nvml_fallback"]
        assert sample.detail["nvml_bytes"] > sample.detail["reserved_bytes"] >= sample.value * 0.99


def test_measured_twice_is_the_same(alone):
    chain, batch, isolated = alone
    (again,) = probes.memory(chain, [batch], [3])
    assert again.value == pytest.approx(isolated[1].value, rel=0.01)


def test_probe_leaves_the_model_as_it_was(nothing_is_left):
    chain, batch = transformer(samples=4)
    chain.loss(batch).backward()
    before, places = fingerprint(chain.model)
    parameters, gradients = list(chain.parameters()), [p.grad.cpu() for p in chain.parameters()]
    rng = torch.cuda.get_rng_state(card())
    probes.memory(chain, [batch], [2])
    after, now = fingerprint(chain.model)
    assert places == now == {card()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p is q for p, q in zip(parameters, chain.parameters(), strict=True))
    assert all(torch.equal(g, p.grad.cpu()) for g, p in zip(gradients, parameters, strict=True))
    assert {p.grad.device for p in parameters} == {card()}
    assert torch.equal(rng, torch.cuda.get_rng_state(card()))


def test_state_of_the_user_s_optimizer_takes_no_part(alone):
    needs_nvml()
    chain, batch, isolated = alone
    used = torch.optim.AdamW(chain.parameters(), lr=0.0)
    for p in chain.parameters():
        p.grad = torch.zeros_like(p)
    used.step()
    used.zero_grad(set_to_none=True)
    (sample,) = probes.memory(chain, [batch], [3], optimizer=used)
    assert "in_process" not in sample.detail
    assert sample.value == pytest.approx(isolated[1].value, rel=0.01)
    assert sample.detail["nvml_bytes"] == pytest.approx(isolated[1].detail["nvml_bytes"], rel=0.01)


def test_autocast_around_a_probe_reaches_its_process(alone):
    chain, batch, isolated = alone
    depth = chain.depth
    with torch.autocast("cuda", torch.bfloat16):
        (apart,) = probes.memory(chain, [batch], [depth])
        (together,) = probes.memory(chain, [batch], [depth], in_children=False)
    assert apart.value == pytest.approx(together.value, rel=0.02)
    assert apart.value < 0.9 * isolated[-1].value


# prediction


def test_fold_predicts_the_card_s_bytes(alone):
    chain, batch, isolated = alone
    costs = probes.profile(chain, batch, repeats=0, summed=False)
    for sample in isolated:
        predicted = step_bytes(hp.Schedule.horizon(chain.depth, sample.horizon), costs)
        assert predicted == pytest.approx(sample.value, rel=0.08)


def test_fold_predicts_checkpointing_and_disjoint_windows():
    chain, batch = transformer()
    costs = probes.profile(chain, batch, repeats=0, summed=False)
    for h, s, k in ((chain.depth, 1, 1), (3, 3, 0)):
        (sample,) = probes.memory(chain, [batch], [h], [s], recompute=k, in_children=False)
        assert step_bytes(hp.Schedule.horizon(chain.depth, h, s, k), costs) == pytest.approx(sample.value, rel=0.08)


def test_fake_tensors_predict_the_card_s_bytes(alone):
    chain, batch, isolated = alone
    for sample in isolated:
        told = hp.fits(chain.model, batch, "24GiB", sample.horizon)
        assert told.how == "fake tensors"
        assert told.predicted_bytes == pytest.approx(sample.value, rel=0.08)


# running out of memory


@pytest.mark.parametrize("in_children", [True, False], ids=["in a process of its own", "in this process"])
def test_running_out_of_memory_is_a_measurement(nothing_is_left, limited, in_children):
    chain, batch = transformer()
    depth = chain.depth
    costs = probes.profile(chain, batch, repeats=0, summed=False)
    least, most = (step_bytes(hp.Schedule.horizon(depth, h), costs) for h in (1, depth - 1))
    before, _ = fingerprint(chain.model)
    held = torch.cuda.memory_allocated()
    limited((least + most) // 2)
    samples = probes.memory(chain, [batch], [1, depth - 1, depth], in_children=in_children)
    assert [s.horizon for s in samples] == [1, depth - 1]
    assert samples[0].source == "measured"
    assert samples[0].value == pytest.approx(least, rel=0.08)
    assert samples[1].source == OUT_OF_MEMORY
    assert math.isnan(samples[1].value)
    assert "out of memory" in samples[1].detail["message"]
    gc.collect()
    assert torch.cuda.memory_allocated() == held
    assert all(p.grad is None for p in chain.parameters())
    after, _ = fingerprint(chain.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fraction_limits_what_is_available(limited):
    whole = available_bytes(card())
    limited(2**30)
    assert available_bytes(card()) <= 1.01 * 2**30
    assert whole > available_bytes(card())


def test_plan_on_a_card_that_is_too_small_says_what_does_not_fit(nothing_is_left, limited):
    chain, batch = transformer()
    costs = probes.profile(chain, batch, repeats=0, summed=False)
    least, most = (step_bytes(hp.Schedule.horizon(chain.depth, h), costs) for h in (1, chain.depth))
    model = chain.model
    del chain
    limited((least + most) // 2)
    plan = hp.plan_horizon(model, [batch], objective=hp.Weighted(lam=0.1), rollout_steps=0, batches=1)
    exact = next(r for r in plan.rows if (r.horizon, r.stride, r.recompute) == (plan.depth, 1, 0))
    assert exact.fits is False
    assert exact.memory_source == "predicted"
    assert any(row.memory_source == "measured" for row in plan.rows)
    assert any("Memory ran out" in note or "checkpointing" in note for note in plan.notes)


# plans


def planned(**more):
    torch.manual_seed(0)
    model = ResidualMLP(64, 512, 10, depth=4)
    data = [(torch.randn(4096, 64), torch.randint(0, 10, (4096,))) for _ in range(2)]
    settings = {"device": "cuda", "rollout_steps": 4, "batches": 2, "objective": hp.AccuracyConstraint(0.5), **more}
    plan = hp.plan_horizon(model, data, **settings)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    return plan


@pytest.fixture(scope="module")
def plan():
    return planned()


def test_plan_has_the_driver_s_bytes_of_every_measured_row(plan):
    needs_nvml()
    measured = [row for row in plan.rows if row.memory_source == "measured"]
    assert len(measured) >= 4
    for row in measured:
        assert row.nvml_bytes == row.device_bytes
        assert row.nvml_bytes > row.memory_bytes


def test_plan_has_the_device_s_bytes_of_every_row(plan):
    assert all(row.device_bytes > row.memory_bytes for row in plan.rows)
    assert all(row.fits is not None for row in plan.rows)


def test_plan_tells_how_the_driver_s_bytes_were_had(plan):
    details = [detail for _, _, detail in plan.provenance["memory_detail"]]
    assert details
    for detail in details:
        assert "in_process" not in detail
        assert detail["nvml"] in TOLD or detail["nvml_fallback"] is not None


def test_plan_for_the_driver_s_bytes():
    needs_nvml()
    plan = planned(memory="nvml")
    for row in plan.rows:
        assert row.memory_bytes == row.device_bytes
        assert row.nvml_bytes in (None, row.memory_bytes)
    assert plan.row.memory_bytes == plan.row.nvml_bytes


# gradients


@pytest.fixture
def exactly():
    """Convolutions that give the same result twice, in full precision."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def cnn():
    model = ResidualCNN(3, (8, 16), blocks_per_stage=2)
    return model, (torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))


def with_dropout():
    case = families.gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0)
    return case.model, case.batch


def moved(batch):
    return {k: v.cuda() for k, v in batch.items()} if isinstance(batch, dict) else tuple(t.cuda() for t in batch)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("make", [cnn, with_dropout])
def test_gradient_at_the_full_horizon_is_back_propagation_s(exactly, make, recompute):
    model, batch = make()
    model.cuda().train()
    batch = moved(batch)
    chain = hp.Chain.from_model(model, batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    loss = chain.loss(batch)
    loss.backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moved_on = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    found = hp.horizon_backward(chain, batch, chain.depth, recompute=recompute)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)  # a cache, which a step switches off, sums otherwise
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(exact)
    for name, p in model.named_parameters():
        if name in exact:
            assert difference(p.grad, exact[name]) < 1e-4, name
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer.double(), moved_on[name].double(), rtol=1e-5), name


@pytest.mark.parametrize("indexed", [False, True])
def test_devices_with_and_without_an_index_are_one(indexed):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)), nn.Linear(64, 2)).cuda()
    batch = torch.randn(8, 64), torch.randint(0, 2, (8,))
    settings = {"rollout_steps": 0, "batches": 1, "strides": (1,), "horizons": [1], "probe_steps": 0}
    plan = hp.plan_horizon(model, [batch], device=str(card()) if indexed else "cuda", **settings)
    assert plan.provenance["device"] == str(card())
    assert {p.device for p in model.parameters()} == {card()}
