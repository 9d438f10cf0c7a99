"""Work done in batches: each gets its own result, in order, never twice at a time, and one's fault is its own."""

import asyncio
import threading

from starlette.testclient import TestClient

from horizonplan.api import Settings, create_app
from horizonplan.api.batches import Batches, TooManyWaiting

ASKED = {"depth": 4, "horizons": [1, 2, 3, 4], "memory_bytes": [10, 15, 20, 25], "cosine": [0.5, 0.8, 0.95, 1]}


class Work:
    """Squares numbers; negative ones are errors. The first batch waits until it may go on."""

    def __init__(self):
        self.batches, self.running, self.most, self.go_on = [], 0, 0, threading.Event()

    def __call__(self, items):
        self.running += 1
        self.most = max(self.most, self.running)
        self.batches.append(list(items))
        self.go_on.wait(10)
        self.running -= 1
        return [ValueError(item) if item < 0 else item**2 for item in items]


class Store:
    """Keeps batches of results; the first waits until it may go on."""

    def __init__(self):
        self.kept, self.called, self.go_on = [], 0, threading.Event()

    def __call__(self, results):
        self.called += 1
        assert self.called > 1 or self.go_on.wait(10)
        self.kept.append(results)


def forget(results):
    """Keep nothing."""


async def gathered(batches, work, items):
    """The results, of which all but the first were handed over while the first was worked on."""
    first = asyncio.create_task(batches.add(items[0]))
    while not work.batches:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(batches.add(item)) for item in items[1:]]
    await asyncio.sleep(0.01)
    work.go_on.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_what_comes_meanwhile_is_the_next_batch():
    work = Work()
    results = asyncio.run(gathered(Batches(work, forget, largest=4), work, list(range(8))))
    assert results == [item**2 for item in range(8)]
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
    assert work.most == 1


def test_an_item_s_error_is_its_own():
    work = Work()
    results = asyncio.run(gathered(Batches(work, forget), work, [1, 2, -3, 4]))
    assert [r for r in results if not isinstance(r, Exception)] == [1, 4, 16]
    assert isinstance(results[2], ValueError)


def test_what_the_work_raises_is_everybody_s_error_and_the_next_batch_is_done():
    async def tried():
        answers = iter([OSError("full"), [7]])

        def work(items):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        batches = Batches(work, forget)
        refused = await asyncio.gather(*(batches.add(i) for i in range(3)), return_exceptions=True)
        return refused, await batches.add(3)

    refused, later = asyncio.run(tried())
    assert [str(error) for error in refused] == ["full"] * 3
    assert later == 7


def test_the_next_batch_is_made_while_one_is_stored():
    async def tried():
        work, store = Work(), Store()
        work.go_on.set()
        batches = Batches(work, store)
        tasks = [asyncio.create_task(batches.add(1))]
        while not store.called:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(batches.add(2)))
        while len(work.batches) < 2:
            await asyncio.sleep(0.001)
        assert not tasks[0].done()  # what is not stored is not answered
        store.go_on.set()
        return await asyncio.gather(*tasks), sorted(store.kept)

    assert asyncio.run(tried()) == ([1, 4], [[1], [4]])


def test_what_cannot_be_stored_is_the_error_of_those_that_were_made():
    async def tried():
        work = Work()
        work.go_on.set()

        def refuse(results):
            raise OSError(f"no room for {results}")

        batches = Batches(work, refuse)
        return await asyncio.gather(*(batches.add(i) for i in (-1, 2)), return_exceptions=True)

    wrong, unstored = asyncio.run(tried())
    assert isinstance(wrong, ValueError)
    assert str(unstored) == "no room for [4]"


def test_it_goes_on_in_another_loop():
    """As where each request has a loop of its own, which is closed as soon as the answer is there."""
    batches = Batches(lambda items: [item**2 for item in items], forget)
    for item in range(5):
        loop = asyncio.new_event_loop()
        try:
            assert loop.run_until_complete(asyncio.wait_for(batches.add(item), 10)) == item**2
        finally:
            loop.close()


def test_more_than_may_wait_are_refused():
    work = Work()
    results = asyncio.run(gathered(Batches(work, forget, largest=1, most_waiting=2), work, [1, 2, 3, 4]))
    assert results[:3] == [1, 4, 9]
    assert isinstance(results[3], TooManyWaiting)


def test_one_that_is_gone_holds_up_nobody():
    async def tried():
        work = Work()
        batches = Batches(work, forget)
        tasks = [asyncio.create_task(batches.add(i)) for i in range(3)]
        while not work.batches:
            await asyncio.sleep(0.001)
        tasks[1].cancel()
        work.go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, last = asyncio.run(tried())
    assert (first, last) == (0, 4)
    assert isinstance(gone, asyncio.CancelledError)


def test_a_service_with_too_many_waiting_says_so(tmp_path):
    app = create_app(Settings(database_url=f"sqlite:///{tmp_path}/plans.sqlite3"))
    app.state.new_plans = Batches(Work(), forget, most_waiting=0)
    with TestClient(app) as client:
        answer = client.post("/v1/plans", json=ASKED)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
