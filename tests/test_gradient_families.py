"""Every family, unchanged and in training mode: back-propagation at h = T, the definition at every horizon."""

from collections import Counter

import families as fm
import oracle
import pytest
import torch
from torch import nn

from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.schedule import Schedule

STRIDED = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("family", fm.ALL)
def test_full_horizon_is_the_model_s_own_backward(family, recompute):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    after = {}

    def noting(name, function):
        def noted():
            loss = function()
            after[name] = [torch.get_rng_state(), *(b.clone() for b in case.model.buffers())]
            return loss

        return noted

    def own():
        loss = chain.loss(case.batch)
        loss.backward()
        return loss

    full = noting("full", lambda: horizon_backward(chain, case.batch, chain.depth, recompute=recompute))
    wanted_loss, wanted = oracle.step(noting("own", own), case.model)
    loss, found = oracle.step(full, case.model)
    assert torch.equal(loss, wanted_loss)
    oracle.assert_same_gradients(found, wanted, case.tolerance)
    assert all(torch.equal(a, b) for a, b in zip(after["full"], after["own"], strict=True))


def test_gpt2_is_equal_bit_for_bit_without_its_cache():
    case = fm.gpt2(use_cache=False)
    assert case.tolerance == 0
    chain = Chain.from_model(case.model, case.batch)
    _, wanted = oracle.back_propagation(chain, case.batch)
    oracle.assert_same_gradients(oracle.step(lambda: horizon_backward(chain, case.batch, 4), case.model)[1], wanted)


@pytest.mark.parametrize("family", fm.ALL)
def test_all_horizons_see_the_same_masks_and_recomputing_changes_nothing(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    wanted, _ = oracle.back_propagation(chain, case.batch)
    for h, s in STRIDED:
        loss, plain = oracle.step(lambda h=h, s=s: horizon_backward(chain, case.batch, h, s), case.model)
        again, found = oracle.step(lambda h=h, s=s: horizon_backward(chain, case.batch, h, s, recompute=1), case.model)
        assert torch.equal(loss, wanted)
        assert torch.equal(again, wanted)
        oracle.assert_same_gradients(found, plain, 1e-6)


def one_use_a_parameter_and_no_dropout_between(family):
    if family in (fm.gpt2, fm.gemma2):
        return family(tie_word_embeddings=False)
    if family is fm.between:
        return fm.between(p=0.0)
    if family is fm.in_place:
        return fm.in_place(shared=False)
    return family()


@pytest.mark.parametrize("family", [f for f in fm.ALL if f not in (fm.tied, fm.mlp, fm.cnn)])
def test_gradient_equals_the_definition_inside_the_model_s_own_forward(family):
    """The definition, transcribed by cutting and skipping blocks in copies of the model, in float64."""
    case = one_use_a_parameter_and_no_dropout_between(family).double()
    chain = Chain.from_model(case.model, case.batch)
    names = {id(p): n for n, p in case.model.named_parameters()}
    layout = chain.layout
    groups = [[names[id(p)] for p in (*layout.block[t], *layout.before[t])] for t in range(chain.depth)]
    groups.append([names[id(p)] for p in layout.head])
    for h, s in STRIDED:
        windows = Schedule.horizon(chain.depth, h, s).windows

        def own(windows=windows):
            found = oracle.gradients_inside(
                case.model, chain.names, groups, lambda model, batch: chain._compute(model, batch), case.batch, windows
            )
            for p, grad in found.items():
                p.grad = grad
            return torch.zeros(())

        _, wanted = oracle.step(own, case.model)
        _, found = oracle.step(lambda h=h, s=s: horizon_backward(chain, case.batch, h, s), case.model)
        oracle.assert_same_gradients(found, wanted, 1e-10)


@pytest.mark.parametrize("family", fm.ALL)
def test_each_block_runs_once_and_its_hooks_with_it(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    runs, depth = Counter(), chain.depth
    for t, block in enumerate(chain.blocks):
        block.register_forward_hook(lambda *_, t=t: runs.update([t]))
    for h, s in STRIDED:
        for recompute in (0, 1):
            runs.clear()
            schedule = Schedule.horizon(depth, h, s, recompute)
            horizon_backward(chain, case.batch, schedule)
            again = Counter(t for w in schedule.windows for t in range(w.first, w.end)) if recompute else Counter()
            assert runs == Counter(range(depth)) + again


@pytest.mark.parametrize("family", fm.ALL)
def test_post_accumulate_hooks_fire_once_a_parameter_and_step(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    trained = {n for n, p in case.model.named_parameters() if p.requires_grad}
    _, reached = oracle.back_propagation(chain, case.batch)
    fired = Counter()
    for n, p in case.model.named_parameters():
        if n in trained:
            p.register_post_accumulate_grad_hook(lambda _, n=n: fired.update([n]))
    for schedule in (Schedule.horizon(chain.depth, 2), Schedule.loco(chain.depth, 3, summed=True)):
        fired.clear()
        horizon_backward(chain, case.batch, schedule)
        assert fired == Counter(dict.fromkeys(reached, 1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", fm.ALL)
def test_full_horizon_costs_what_back_propagation_costs(family, frozen):
    case = family()
    chain = Chain.from_model(case.model, case.batch)
    if frozen:
        for p in (p for t in range(chain.depth - 1) for p in (*chain.layout.before[t], *chain.layout.block[t])):
            p.requires_grad_(False)
    own = oracle.flops(lambda: chain.loss(case.batch).backward())
    assert oracle.flops(lambda: horizon_backward(chain, case.batch, chain.depth)) == own


@pytest.mark.parametrize("family", fm.ALL)
def test_model_is_as_it_was_after_planning_and_after_a_step(family):
    case = family()

    def tensors():
        return [t.clone() for t in case.model.state_dict().values()]

    def structure():
        modules = [(id(m), sorted(vars(m)), list(m._modules), m.training) for m in case.model.modules()]
        caches = [c.use_cache for m in case.model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in case.model.modules()]
        return modules, caches, hooks, [id(p) for p in case.model.parameters()], [id(b) for b in case.model.buffers()]

    before, rng, shape = tensors(), torch.get_rng_state(), structure()
    chain = Chain.from_model(case.model, case.batch)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert structure() == shape
    assert all(p.grad is None for p in case.model.parameters())
    horizon_backward(chain, case.batch, 2)
    assert structure() == shape


def test_lora_trains_its_adapters_and_the_head_only():
    case = fm.lora()
    chain = Chain.from_model(case.model, case.batch)
    assert chain.trainable == (True,) * 4
    assert not chain.stem_trains
    _, found = oracle.step(lambda: horizon_backward(chain, case.batch, 2), case.model)
    assert all("lora_" in n or "classifier" in n for n in found)
    assert sum("lora_" in n for n in found) == 4 * 2 * 2


def test_frozen_layers_get_no_gradient():
    case = fm.bert()
    for name, p in case.model.named_parameters():
        p.requires_grad_("layer.3" in name or "classifier" in name)
    chain = Chain.from_model(case.model, case.batch)
    assert chain.trainable == (False, False, False, True)
    _, found = oracle.step(lambda: horizon_backward(chain, case.batch, 4), case.model)
    _, wanted = oracle.back_propagation(chain, case.batch)
    oracle.assert_same_gradients(found, wanted)


@pytest.mark.parametrize("family", [fm.gpt2, fm.bert, fm.resnet, fm.cnn])
def test_a_batch_of_another_shape_needs_no_new_chain(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)

    def half(x):
        return x[: len(x) // 2, :8] if x.dtype == torch.long and x.ndim == 2 else x[: len(x) // 2]

    batch = (
        {n: half(x) for n, x in case.batch.items()} if isinstance(case.batch, dict) else tuple(map(half, case.batch))
    )
    fresh = Chain.from_model(case.model, batch)
    for h, s in STRIDED:
        loss, found = oracle.step(lambda h=h, s=s: horizon_backward(chain, batch, h, s), case.model)
        wanted_loss, wanted = oracle.step(lambda h=h, s=s: horizon_backward(fresh, batch, h, s), case.model)
        assert torch.equal(loss, wanted_loss)
        oracle.assert_same_gradients(found, wanted)


@pytest.mark.parametrize("family", [fm.gpt2, fm.vit, fm.resnet])
def test_autocast_goes_round_the_whole_step(family):
    case = family()
    chain = Chain.from_model(case.model, case.batch)

    def own():
        with torch.autocast("cpu", torch.bfloat16):
            loss = chain.loss(case.batch)
        loss.backward()
        return loss

    def horizon(h, recompute=0):
        with torch.autocast("cpu", torch.bfloat16):
            return horizon_backward(chain, case.batch, h, recompute=recompute)

    loss, wanted = oracle.step(own, case.model)
    for recompute in (0, 1):
        found_loss, found = oracle.step(lambda k=recompute: horizon(chain.depth, k), case.model)
        assert torch.equal(loss, found_loss)
        oracle.assert_same_gradients(found, wanted, 1e-2 if family is fm.gpt2 else 0.0)
    _, plain = oracle.step(lambda: horizon(1), case.model)
    _, again = oracle.step(lambda: horizon(1, 1), case.model)
    oracle.assert_same_gradients(again, plain)


@pytest.mark.parametrize("family", [fm.bert, fm.resnet, fm.llama])
def test_models_in_half_precision_pass_as_they_are(family):
    case = family()
    case.model.bfloat16()
    case.batch = {n: x.bfloat16() if x.is_floating_point() else x for n, x in case.batch.items()}
    chain = Chain.from_model(case.model, case.batch)
    loss, wanted = oracle.back_propagation(chain, case.batch)
    found_loss, found = oracle.step(lambda: horizon_backward(chain, case.batch, chain.depth), case.model)
    assert torch.equal(loss, found_loss)
    oracle.assert_same_gradients(found, wanted)
    _, local = oracle.step(lambda: horizon_backward(chain, case.batch, 1), case.model)
    assert all(torch.isfinite(g).all() for g in local.values())


def test_an_optimiser_fused_into_hooks_trains_a_language_model_with_tied_embeddings_alike():
    def trained(fused):
        torch.manual_seed(0)
        case = fm.gpt2()
        chain = Chain.from_model(case.model, case.batch)
        parameters = [p for p in case.model.parameters() if p.requires_grad]
        each = {p: torch.optim.SGD([p], 0.1, momentum=0.9) for p in parameters}

        def update(p):
            each[p].step()
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(update) for p in parameters if fused]
        for seed in range(3):
            torch.manual_seed(seed)
            horizon_backward(chain, case.batch, 2)
            for p in parameters if not fused else []:
                update(p)
        assert len(handles) == (len(parameters) if fused else 0)
        return [p.detach() for p in parameters]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_batch_norm_in_the_head_sees_the_terminal_state_only():
    """An intermediate head's statistics are its own: running averages move once a step, by the terminal state."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    chain = Chain(None, blocks, head)
    x = torch.randn(8, 4)
    horizon_backward(chain, (x, fm.classes(8)), 1)
    assert head[0].num_batches_tracked == 1
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    torch.testing.assert_close(head[0].running_mean, 0.1 * x.mean(0))
