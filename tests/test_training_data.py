"""A resumed run sees the batches that the uninterrupted one saw; processes share them, each batch once.

Oracles: the list of what the uninterrupted run saw and drew, one process's batches, a plain loop over the loader.
"""

import io
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from horizonplan.probes.budget import Budget
from horizonplan.training.data import Stream
from horizonplan.training.random_state import Isolated, capture, mixed, restore, same, seeded_all

ROWS, EPOCHS = 13, 2


def noise():
    """A draw from each global generator, as augmentations and dropout make them; an odd number of Gaussians."""
    return [torch.rand(()).item(), torch.randn(()).item(), random.gauss(0, 1), np.random.randn()]


class Rows(Dataset):
    """Row ``i`` is ``i`` and perhaps noise."""

    def __init__(self, rows=ROWS, noisy=True):
        self.rows, self.noisy, self.loaded = rows, noisy, []

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.loaded.append(int(index))
        return torch.tensor([index, *(noise() if self.noisy else ())], dtype=torch.float64)


class Buffered(IterableDataset):
    """Shuffled through a buffer: which row comes next depends on every draw before."""

    def __init__(self, rows=ROWS, rng=None):
        self.rows, self.rng = rows, rng

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        buffer = []
        for row in range(start, self.rows, step):
            buffer.append(row)
            if len(buffer) > 3:
                yield self.item(buffer)
        while buffer:
            yield self.item(buffer)

    def item(self, buffer):
        place = int(torch.randint(len(buffer), ())) if self.rng is None else int(self.rng.random() * len(buffer))
        return torch.tensor([buffer.pop(place), *noise()], dtype=torch.float64)


class Lazy(Sampler):
    """Without replacement, each index drawn from torch's global generator when it is asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __iter__(self):
        left = list(range(self.rows))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class Batches(Sampler):
    """Index batches of uneven sizes, in an order of NumPy's."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 5

    def __iter__(self):
        yield from (part.tolist() for part in np.array_split(np.random.permutation(self.rows), 5))


class Resumable:
    """A loader that keeps a state of its own and has a generator."""

    def __init__(self, rows=6):
        self.generator, self.rows = torch.Generator().manual_seed(8), rows

    def __iter__(self):
        yield from torch.randperm(self.rows, generator=self.generator)

    def state_dict(self):
        raise AssertionError("not needed")

    load_state_dict = state_dict


def seeded_generator():
    return torch.Generator().manual_seed(11)


def rows_loader(noisy=True, sampler=None, **kwargs):
    data = Rows(noisy=noisy)
    return DataLoader(data, sampler=None if sampler is None else sampler(data), **{"batch_size": 3, **kwargs})


MAPS = {
    "in order": lambda noisy: rows_loader(noisy),
    "shuffled": lambda noisy: rows_loader(noisy, shuffle=True, drop_last=True),
    "shuffled by a generator": lambda noisy: rows_loader(noisy, shuffle=True, generator=seeded_generator()),
    "shuffled by the global generator": lambda noisy: rows_loader(
        noisy, shuffle=True, generator=torch.default_generator
    ),
    "a sampler's generator": lambda noisy: rows_loader(
        noisy, lambda data: RandomSampler(data, replacement=True, num_samples=21, generator=seeded_generator())
    ),
    "subset": lambda noisy: rows_loader(noisy, lambda data: SubsetRandomSampler(range(2, 12))),
    "weighted": lambda noisy: rows_loader(noisy, lambda data: WeightedRandomSampler([1.0, 2.0] * 6, 11)),
    "lazy": lambda noisy: rows_loader(noisy, lambda data: Lazy(ROWS)),
    "no batching": lambda noisy: rows_loader(noisy, shuffle=True, batch_size=None),
    "batch sampler": lambda noisy: DataLoader(Rows(noisy=noisy), batch_sampler=Batches(ROWS)),
    "batches of a sampler": lambda noisy: DataLoader(
        Rows(noisy=noisy),
        batch_sampler=BatchSampler(RandomSampler(range(ROWS), generator=seeded_generator()), 4, False),
    ),
}
STREAMS = {
    "list": lambda: [torch.tensor([k]) for k in range(7)],
    "tuple": lambda: tuple(torch.tensor([k]) for k in range(5)),
    "buffered": lambda: DataLoader(Buffered(), batch_size=2),
    "buffered by numpy": lambda: DataLoader(Buffered(rng=np.random.default_rng(3)), batch_size=2),
    "buffered by python": lambda: DataLoader(Buffered(rng=random.Random(3)), batch_size=2),
    "buffered by legacy numpy": lambda: DataLoader(Buffered(rng=np.random.RandomState(3)), batch_size=2),
    "resumable": Resumable,
}
WORKERS = {
    "workers": lambda: rows_loader(shuffle=True, num_workers=2),
    "workers by a generator": lambda: rows_loader(shuffle=True, num_workers=2, generator=seeded_generator()),
    "workers that stay": lambda: rows_loader(
        shuffle=True, num_workers=2, generator=seeded_generator(), persistent_workers=True, batch_size=4
    ),
    "workers, lazy": lambda: rows_loader(True, lambda data: Lazy(ROWS), num_workers=2, prefetch_factor=1),
    "workers, buffered": lambda: DataLoader(Buffered(), batch_size=3, num_workers=2),
}
ALONE = {name: (lambda make=make: make(True)) for name, make in MAPS.items()} | STREAMS


def scramble(loader=None):
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(987)
    noise()
    if isinstance(getattr(loader, "generator", None), torch.Generator):
        torch.rand(3, generator=loader.generator)


def stored(state):
    """The state after a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(stream, first=0, epochs=EPOCHS, states=None):
    """What a consumer with dropout sees and draws from epoch ``first`` on; its states, once per step and epoch."""
    seen = []
    for epoch in range(first, epochs):
        for turn in stream.batches(epoch):
            seen.append((epoch, turn.batch, turn.counts, noise()))
            if states is not None:
                states.append((len(seen), stream.state_dict()))
        if states is not None:
            states.append((len(seen), stream.state_dict()))
    return seen


def ending(stream):
    """All generators, those of the loader included, as a run leaves them."""
    return stream.state_dict()["random"]


def equal(one, other):
    return same(*(([*map(list, seen)]) for seen in (one, other)))


def check_every_interruption(make, rank=0, world=1, stride=1):
    scramble()
    stream, states = Stream(make(), rank=rank, world=world, seed=5), []
    start = (0, stream.state_dict())
    seen = run(stream, states=states)
    end = ending(stream)
    for count, state in [start, *states][::stride]:
        loader = make()
        scramble(loader)
        resumed = Stream(loader, rank=rank, world=world, seed=5)
        resumed.load_state_dict(stored(state))
        rest = run(resumed, state["epoch"])
        assert equal(rest, seen[count:]), (state["epoch"], state["position"])
        assert same(ending(resumed), end), (state["epoch"], state["position"])
    assert len(states) == len(seen) + EPOCHS
    assert len(seen) > EPOCHS


@pytest.mark.parametrize("kind", ALONE)
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    check_every_interruption(ALONE[kind])


@pytest.mark.parametrize("kind", ["shuffled", "batch sampler", "buffered", "list"])
@pytest.mark.parametrize("rank", [0, 1])
def test_so_is_each_process_of_two(kind, rank):
    check_every_interruption(ALONE[kind], rank, world=2)


def test_workers_are_no_difference():
    check_every_interruption(WORKERS["workers by a generator"], stride=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKERS)
def test_whatever_workers_draw(kind):
    check_every_interruption(WORKERS[kind])
    if "buffered" not in kind:
        check_every_interruption(WORKERS[kind], rank=1, world=2, stride=3)


def test_a_run_can_be_interrupted_twice():
    def interruptions(state=None):
        scramble()
        stream, states = Stream(MAPS["lazy"](True)), []
        if state is not None:
            stream.load_state_dict(stored(state))
        return run(stream, states=states), states

    seen, states = interruptions()
    for steps in (1, 2):
        rest, states = interruptions(states[0][1])
        assert equal(rest, seen[steps:])


def test_a_state_is_that_of_the_run_until_it_goes_on():
    stream = Stream(MAPS["shuffled"](True))
    next(batches := stream.batches(0))
    state = stored(stream.state_dict())
    batches.close()
    resumed = Stream(MAPS["shuffled"](True))
    resumed.load_state_dict(state)
    noise()
    assert same(resumed.state_dict(), state)


def test_position_counts_what_was_yielded():
    stream = Stream(STREAMS["list"](), world=2, rank=1)
    places = [(stream.epoch, stream.position)]
    for _ in stream.batches(3):
        places.append((stream.epoch, stream.position))
    assert [*places, (stream.epoch, stream.position)] == [(0, 0), (3, 1), (3, 2), (3, 3), (3, 4), (4, 0)]


def test_taking_states_changes_nothing():
    make = ALONE["buffered"]
    scramble()
    seen = run(Stream(make()), states=[])
    scramble()
    assert equal(run(Stream(make())), seen)


@pytest.mark.parametrize("kind", ["in order", "shuffled", "lazy", "weighted"])
def test_what_a_model_draws_and_what_the_data_draw_are_two_things(kind):
    quiet = [turn.batch for turn in Stream(MAPS[kind](True)).batches(0)]
    scramble()
    seen = run(Stream(MAPS[kind](True)), epochs=1)
    assert same(quiet, [batch for _, batch, _, _ in seen])
    scramble()
    assert [drawn for *_, drawn in seen] == [noise() for _ in seen]


@pytest.mark.parametrize("kind", ["shuffled", "lazy", "batch sampler"])
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    def order(seed, epoch):
        return torch.cat([turn.batch[:, 0] for turn in Stream(MAPS[kind](False), seed=seed).batches(epoch)]).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 3
    assert order(0, 1) == orders[1]


@pytest.mark.parametrize(
    "kind", ["in order", "shuffled by a generator", "a sampler's generator", "batches of a sampler"]
)
def test_a_loader_with_its_own_generator_gives_what_a_plain_loop_gets(kind):
    stream, loader = Stream(MAPS[kind](False)), MAPS[kind](False)
    for epoch in range(3):
        assert same([turn.batch for turn in stream.batches(epoch)], list(loader))


def shared(make, world, epoch=1):
    """Turns of each process, by rank."""
    found = []
    for rank in range(world):
        scramble()
        for _ in range(rank):
            noise()  # another state in each process
        found.append(list(Stream(make(), rank=rank, world=world, seed=2).batches(epoch)))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind", [*MAPS, *STREAMS])
def test_processes_share_the_batches_of_one(kind, world):
    make = (lambda: MAPS[kind](False)) if kind in MAPS else STREAMS[kind]
    (whole,) = shared(make, 1)
    ranks = shared(make, world)
    assert {len(turns) for turns in ranks} == {math.ceil(len(whole) / world)}
    flat = [turn for round_ in zip(*ranks, strict=True) for turn in round_]
    assert same([turn.batch for turn in flat if turn.counts], [turn.batch for turn in whole])
    for turns in ranks:
        assert all(turn.counts for turn in turns[:-1])
        if not turns[-1].counts:
            assert turns[-1].batch is turns[-2].batch


@pytest.mark.parametrize("rows", [63, 64, 65, 129])
def test_so_they_do_in_long_epochs(rows):
    whole, one, two = (
        [turn.batch.item() for turn in Stream(loader, rank=rank, world=world).batches(0) if turn.counts]
        for rank, world in ((0, 1), (0, 2), (1, 2))
        for loader in [DataLoader(Rows(rows, noisy=False), batch_size=1, sampler=Lazy(rows))]
    )
    assert sorted(whole) == list(range(rows))
    assert (one, two) == (whole[::2], whole[1::2])


def test_a_process_loads_its_own_batches_only():
    loaders = [rows_loader(shuffle=True) for _ in range(2)]
    for rank, loader in enumerate(loaders):
        list(Stream(loader, rank=rank, world=2).batches(0))
    assert [len(loader.dataset.loaded) for loader in loaders] == [3 + 3 + 1, 3 + 3]
    assert sorted(loaders[0].dataset.loaded + loaders[1].dataset.loaded) == list(range(ROWS))


def test_processes_augment_differently():
    one, two = (turns[0].batch[:, 1:] for turns in shared(lambda: rows_loader(True), 2))
    assert not (one == two).any()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["list", "in order", "buffered"])
def test_shared_epochs_of_any_number_of_batches_go_on_at_any_step(kind, world):
    for rows in range(2 * world, 2 * world + 4):
        make = {
            "list": lambda rows=rows: list(range(rows)),
            "in order": lambda rows=rows: DataLoader(Rows(rows), batch_size=1),
            "buffered": lambda rows=rows: DataLoader(Buffered(rows), batch_size=1),
        }[kind]
        for rank in range(world):
            stream, states = Stream(make(), rank=rank, world=world), []
            seen = run(stream, states=states)
            for count, state in states:
                resumed = Stream(make(), rank=rank, world=world)
                resumed.load_state_dict(state)
                assert equal(run(resumed, state["epoch"]), seen[count:])


@pytest.mark.parametrize("place", ["sampler", "batch sampler"])
def test_a_sampler_that_shares_is_left_to_it(place):
    def loader(rank):
        data = Rows(12, noisy=False)
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, seed=4)
        if place == "sampler":
            return DataLoader(data, batch_size=2, sampler=sampler)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))

    for rank in range(2):
        stream, plain = Stream(loader(rank), rank=rank, world=2), loader(rank)
        for epoch in range(2):
            (plain.sampler if place == "sampler" else plain.batch_sampler.sampler).set_epoch(epoch)
            assert same([turn.batch for turn in stream.batches(epoch)], list(plain))
        check_every_interruption(lambda rank=rank: loader(rank), rank, world=2)


def test_every_part_is_told_the_epoch_once():
    told = []

    class Told:
        def set_epoch(self, epoch):
            told.append((type(self).__name__, epoch))

    class Data(Told, Rows):
        pass

    class Order(Told, SequentialSampler):
        pass

    class Groups(Told, BatchSampler):
        pass

    data = Data(4)
    stream = Stream(DataLoader(data, batch_sampler=Groups(Order(data), 2, False)))
    for epoch in (0, 7):
        list(stream.batches(epoch))
    assert sorted(told) == sorted((name, epoch) for name in ("Data", "Order", "Groups") for epoch in (0, 7))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [*MAPS, "buffered"])
def test_the_loader_is_as_it_was(kind, world):
    loader = ALONE[kind]()
    parts = [loader, loader.sampler, loader.batch_sampler]
    parts = [part for part in parts if part is not None]
    before = [dict(vars(part)) for part in parts]
    list(Stream(loader, world=world).batches(0))
    for part, attributes in zip(parts, before, strict=True):
        assert vars(part).keys() == attributes.keys()
        assert all(vars(part)[name] is value for name, value in attributes.items()), part


def test_settings_of_a_loader_reach_its_workers():
    def start(worker):
        get_worker_info().dataset.rows = -worker

    def gather(samples):
        return get_worker_info().dataset.rows, len(samples)

    loader = rows_loader(num_workers=2, worker_init_fn=start, collate_fn=gather, multiprocessing_context="fork")
    found = [turn.batch for turn in Stream(loader).batches(0)]
    assert found == [(0, 3), (-1, 3), (0, 3), (-1, 3), (0, 1)]


def test_batches_are_made_in_the_hosts_memory():
    with Budget(limit_bytes=1) as budget:
        stream = Stream(rows_loader(shuffle=True))
        for _ in stream.batches(0):
            stream.state_dict()
        assert budget.live == budget.peak == 0


def interrupted(loader, steps=2, **kwargs):
    stream = Stream(loader, **kwargs)
    for _, _ in zip(range(steps), stream.batches(0), strict=False):
        pass
    return stored(stream.state_dict())


def test_data_of_another_length_are_refused():
    state = interrupted([1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"data \(batches an epoch\): 5, but .* had 4"):
        Stream([1, 2, 3, 4, 5]).load_state_dict(state)


def test_data_that_end_too_early_are_refused():
    state = interrupted(DataLoader(Buffered(9), batch_size=1), steps=6)
    stream = Stream(DataLoader(Buffered(4), batch_size=1))
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data: ended after 4 steps, but epoch 0 .* had taken 6; give the same data"):
        next(stream.batches(0))


@pytest.mark.parametrize("other", ["noise", "generator"])
def test_data_that_draw_otherwise_are_refused(other):
    if other == "noise":
        state, loader = interrupted(rows_loader(True)), rows_loader(False)
    else:
        state, loader = interrupted(Resumable()), Resumable(rows=9)
    stream = Stream(loader)
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data: its first \d batches drew other random numbers"):
        next(stream.batches(0))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"rank": 1}, {"world": 3}])
def test_another_setting_is_refused(changed):
    state = interrupted([1, 2, 3, 4], world=2)
    (name,) = changed
    with pytest.raises(ValueError, match=f"{name}: {changed[name]}, but the run to be resumed had"):
        Stream([1, 2, 3, 4], **{"world": 2, **changed}).load_state_dict(state)


def test_another_epoch_is_refused():
    stream = Stream([1, 2, 3])
    stream.load_state_dict(interrupted([1, 2, 3]))
    with pytest.raises(ValueError, match="epoch=1: the state is of epoch 0"):
        next(stream.batches(1))


def test_batches_in_no_fixed_order_cannot_be_continued():
    state = interrupted(rows_loader())
    with pytest.raises(ValueError, match=r"data: .*in_order=False"):
        Stream(rows_loader(num_workers=1, in_order=False)).load_state_dict(state)


@pytest.mark.parametrize("kind", ["list", "map", "stream"])
def test_fewer_batches_than_processes_are_refused_by_all_of_them_at_once(kind):
    for rank in range(3):
        loader = {
            "list": [1, 2],
            "map": DataLoader(Rows(2), batch_size=1),
            "stream": DataLoader(Buffered(2), batch_size=1),
        }[kind]
        with pytest.raises(ValueError, match="data has only 2 batches an epoch for 3 processes"):
            next(Stream(loader, rank=rank, world=3).batches(0))


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="data has no batches"):
        next(Stream(DataLoader(Buffered(0))).batches(0))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_is_one_of_the_world(rank, world):
    with pytest.raises(ValueError, match=f"rank={rank}, world={world}"):
        Stream([1], rank=rank, world=world)


def test_a_sampler_that_shares_among_others_is_refused():
    data = Rows(12)
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match=r"data: its DistributedSampler has rank 0 of 2, this process is rank 1 of 2"):
        Stream(loader, rank=1, world=2)


def test_a_generator_that_the_state_does_not_have_is_refused():
    state = interrupted(MAPS["in order"](False))
    stream = Stream(MAPS["shuffled by a generator"](False))
    with pytest.raises(ValueError, match="generators: 1 given, the random state has 0"):
        stream.load_state_dict(state)


KINDS = [
    torch.Generator,
    random.Random,
    np.random.RandomState,
    *(
        lambda kind=kind: np.random.Generator(kind(1))
        for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox)
    ),
]


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    return [generator.random() for _ in range(3)]


@pytest.mark.parametrize("make", KINDS)
def test_a_state_brings_every_generator_back(make):
    generator = make()
    noise()
    state = stored(capture(generators=[generator]))
    drawn = noise(), draw(generator)
    scramble()
    other = make()
    draw(other)
    restore(state, generators=[other])
    assert (noise(), draw(other)) == drawn


def test_seeded_all_seeds_and_brings_back():
    before = capture()
    with seeded_all(3):
        first = noise()
    assert same(capture(), before)
    with seeded_all(3):
        assert noise() == first
    with pytest.raises(ZeroDivisionError), seeded_all(3):
        noise()[0] / 0
    assert same(capture(), before)
    with seeded_all(-4):
        assert noise() != first


def test_isolated_numbers_go_on_where_they_were():
    with seeded_all(3):
        drawn = [noise() for _ in range(3)]
    before, isolated = capture(), Isolated(3)
    for expected in drawn:
        with isolated.drawing():
            assert noise() == expected
        assert same(capture(), before)
        noise()
        before = capture()


def test_a_mixed_seed_is_the_same_in_every_process():
    assert mixed(0, 1, 2) == 2581723410
    assert len({mixed(a, b) for a in range(20) for b in range(20)}) == 400


@pytest.mark.gpu
def test_devices_are_part_of_it():
    def consume(stream, first=0, states=None):
        seen = []
        for epoch in range(first, EPOCHS):
            for turn in stream.batches(epoch):
                seen.append((epoch, turn.batch, torch.rand(2, device="cuda").cpu()))
                if states is not None:
                    states.append((len(seen), stored(stream.state_dict())))
        return seen

    states = []
    seen = consume(Stream(rows_loader(shuffle=True), devices=[0]), states=states)
    for count, state in states:
        torch.cuda.manual_seed(1)
        scramble()
        stream = Stream(rows_loader(shuffle=True), devices=[0])
        stream.load_state_dict(state)
        assert equal(consume(stream, state["epoch"]), seen[count:])
    with seeded_all(3, devices=[0]):
        first = torch.rand(3, device="cuda")
    with seeded_all(3, devices=[0]):
        assert torch.equal(torch.rand(3, device="cuda"), first)
