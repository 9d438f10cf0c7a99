"""The life of jobs: a state machine of several workers, crashes and a clock, held against a model in plain Python."""

import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

import pytest
from api_jobs import PLAN
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from postgresql import postgresql
from sqlalchemy import func, select

from horizonplan.api import database, queue
from horizonplan.api.database import Database
from horizonplan.api.queue import FINAL, Claim, Failure

LEASE, REQUEUES, MOST = 10.0, 2, 6
WORKERS = st.integers(0, 2)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database file with tables and nothing in them."""
    file = tmp_path_factory.mktemp("empty") / "empty.sqlite3"
    store = Database(f"sqlite:///{file}")
    store.upgrade()
    store.close()
    return file


@pytest.fixture
def store(empty, tmp_path):
    store = Database(f"sqlite:///{copy(empty, tmp_path)}")
    yield store
    store.close()


@dataclass
class Known:
    """What the model knows of a job."""

    state: str = "queued"
    owner: str | None = None
    expires: float = 0.0
    attempts: int = 0
    cancel: bool = False


class Life(RuleBasedStateMachine):
    """Three workers; one that crashed has forgotten its job, one that was slow goes on with a job it may have lost.

    The clock goes on, and is set forward and back.
    """

    empty: Path

    def __init__(self):
        super().__init__()
        self.folder = TemporaryDirectory()
        self.store = self.opened()
        self.clock, self.model, self.hands = 1000.0, {}, {}

    def opened(self):
        return Database(f"sqlite:///{copy(self.empty, self.folder.name)}")

    def write(self, function, *args):
        with self.store.write() as connection:
            return function(connection, *args, self.clock)

    def holds(self, mine: Claim) -> Known | None:
        """The job of a claim, if the model says that the claim still stands."""
        known = self.model[mine.job_id]
        return known if known.state == "running" and known.owner == mine.owner else None

    def lost(self, known: Known) -> bool:
        """Whether a job's lease is over, or ends later than it could if nobody had set the clock back."""
        return known.state == "running" and not self.clock <= known.expires <= self.clock + 2 * LEASE

    @rule()
    def submit(self):
        waiting = sum(known.state == "queued" for known in self.model.values())
        if waiting >= MOST:
            with pytest.raises(queue.QueueFull):
                self.write(queue.submit, "{}", MOST)
        else:
            self.model[self.write(queue.submit, "{}", MOST)] = Known()

    @rule(worker=WORKERS)
    def claim(self, worker):
        if worker in self.hands:
            return
        lost = [known for known in self.model.values() if self.lost(known)]
        work = bool(lost) or any(known.state == "queued" for known in self.model.values())
        with self.store.read() as connection:
            assert queue.has_work(connection, LEASE, self.clock) == work
        self.write(queue.rescue, REQUEUES, LEASE)
        for known in lost:
            known.owner = None
            known.state = "cancelled" if known.cancel else "failed" if known.attempts > REQUEUES else "queued"
        waiting = [job_id for job_id, known in self.model.items() if known.state == "queued"]
        mine = self.write(queue.claim, f"worker {worker}", LEASE)
        assert (mine and mine.job_id) == (waiting[0] if waiting else None)
        if mine:
            known = self.model[mine.job_id]
            known.state, known.owner, known.expires = "running", mine.owner, self.clock + LEASE
            known.attempts += 1
            assert mine.attempt == known.attempts
            self.hands[worker] = mine

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def beat(self, data):
        mine = data.draw(st.sampled_from(list(self.hands.values())))
        known = self.holds(mine)
        assert self.write(queue.renew, mine, LEASE) == (known is not None)
        if known:
            known.expires = self.clock + LEASE

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def tell(self, data):
        mine = data.draw(st.sampled_from(list(self.hands.values())))
        assert self.write(queue.progress, mine, {"message": "on it"}) == (self.holds(mine) is not None)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "hand back", "obey"]))
    def end(self, data, how):
        worker = data.draw(st.sampled_from(list(self.hands)))
        mine = self.hands.pop(worker)
        known = self.holds(mine)
        with self.store.read() as connection:
            standing = queue.standing(connection, mine)
        assert standing == ("lost" if known is None else "cancel" if known.cancel else "held")
        if how == "obey" and standing != "cancel":
            return  # it crashed
        function, args, state = {
            "succeed": (queue.succeed, (PLAN,), "succeeded"),
            "fail": (queue.fail, (Failure("fault", "it broke"),), "failed"),
            "hand back": (queue.hand_back, (), "queued"),
            "obey": (queue.cancelled, (), "cancelled"),
        }[how]
        assert self.write(function, mine, *args) == (known is not None)
        if known:
            known.state, known.owner = "cancelled" if known.cancel else state, None
            known.attempts -= known.state == "queued"

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data):
        job_id = data.draw(st.sampled_from(list(self.model)))
        known = self.model[job_id]
        assert self.write(queue.cancel, job_id)
        if known.state == "queued" or (known.state == "running" and known.expires < self.clock):
            known.state, known.owner = "cancelled", None
        elif known.state == "running":
            known.cancel = True

    @rule()
    def cancel_nothing(self):
        assert not self.write(queue.cancel, "no such job")

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def crash(self, data):
        del self.hands[data.draw(st.sampled_from(list(self.hands)))]

    @rule(seconds=st.sampled_from([1.0, LEASE / 2, LEASE, LEASE + 1]))
    def wait(self, seconds):
        self.clock += seconds

    @rule(seconds=st.sampled_from([-1.0, -LEASE, -LEASE - 1, -1e6, 1e6]))
    def set_the_clock(self, seconds):
        self.clock += seconds

    @invariant()
    def database_is_as_the_model_says(self):
        with self.store.read() as connection:
            rows = connection.execute(select(database.jobs)).all()
            events = {row.id: queue.events(connection, row.id, 0) for row in rows}
            plans = connection.scalars(select(database.plans.c.id)).all()
        assert {row.id for row in rows} == set(self.model)  # none is lost
        for row in rows:
            known, kinds = self.model[row.id], [event.kind for event in events[row.id]]
            assert (row.state, row.lease_owner, row.attempts) == (known.state, known.owner, known.attempts)
            assert row.attempts <= REQUEUES + 1
            ends = [kind for kind in kinds if kind in FINAL]
            assert ends == ([row.state] if row.state in FINAL else [])  # one end, and only one
            assert row.state not in FINAL or kinds[-1] == row.state
            assert [event.number for event in events[row.id]] == list(range(1, len(kinds) + 1))
            assert (row.plan_id is not None) == (row.state == "succeeded")
            assert (row.error is not None) == (row.state == "failed")
        assert sorted(plans) == sorted(row.plan_id for row in rows if row.plan_id)  # none twice

    def teardown(self):
        """Whatever happened before: workers that go on bring every job to its end."""
        try:
            for _ in range((REQUEUES + 2) * len(self.model) + 1):
                self.clock += LEASE + 1
                self.hands.clear()
                self.claim(0)
                if 0 in self.hands:
                    self.succeed(self.hands.pop(0))
            self.database_is_as_the_model_says()
            assert all(known.state in FINAL for known in self.model.values())
        finally:
            self.store.close()
            self.folder.cleanup()

    def succeed(self, mine):
        assert self.write(queue.succeed, mine, PLAN)
        known = self.model[mine.job_id]
        known.state, known.owner = "succeeded", None


def live(empty, lives, steps):
    machine = type("LifeFrom", (Life,), {"empty": empty})
    run_state_machine_as_test(machine, settings=hypothesis_settings(max_examples=lives, stateful_step_count=steps))


def test_every_job_ends_once(empty):
    live(empty, 12, 30)


@pytest.mark.slow
def test_every_job_ends_once_in_many_lives(empty):
    live(empty, 200, 60)


@pytest.mark.slow
def test_every_job_ends_once_in_postgresql():
    with postgresql() as (url, _), closing(Database(url)) as store:
        store.upgrade()

        class Emptied(Life):
            def opened(self):
                with store.write() as connection:
                    connection.exec_driver_sql("TRUNCATE plans, jobs, job_events, workers")
                return Database(url)

        run_state_machine_as_test(Emptied, settings=hypothesis_settings(max_examples=30, stateful_step_count=40))


def test_no_job_is_taken_twice_by_workers_at_once(store):
    """Six threads with connections of their own claim thirty jobs as fast as they can."""
    claim_at_once(store)


@pytest.mark.slow
def test_no_job_is_taken_twice_by_workers_at_once_in_postgresql():
    with postgresql() as (url, _), closing(Database(url)) as store:
        store.upgrade()
        claim_at_once(store)


def claim_at_once(store):
    with store.write() as connection:
        submitted = [queue.submit(connection, "{}", 100, 1.0) for _ in range(30)]
    taken, errors = [], []

    def work(name):
        own = Database(store.url.render_as_string(hide_password=False), busy_seconds=30)
        try:
            while True:
                with own.write() as connection:
                    mine = queue.claim(connection, name, LEASE, 2.0)
                if mine is None:
                    return
                taken.append(mine.job_id)
        except Exception as error:
            errors.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=work, args=(f"worker {number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(taken) == sorted(submitted)


def test_progress_is_bounded(store):
    with store.write() as connection:
        job_id = queue.submit(connection, "{}", 1, 1.0)
        mine = queue.claim(connection, "worker", LEASE, 2.0)
        for _ in range(queue.MOST_PROGRESS + 10):
            assert queue.progress(connection, mine, {"message": "again"}, 3.0)
        assert queue.fail(connection, mine, Failure("fault", "enough"), 4.0)
        counted = select(func.count()).select_from(database.job_events)
        assert connection.scalar(counted) == queue.MOST_PROGRESS + 1
        assert queue.events(connection, job_id, queue.MOST_PROGRESS)[0].kind == "failed"


def test_workers_come_and_go(store):
    with store.write() as connection:
        assert queue.last_seen(connection) is None
        queue.seen(connection, "a", 10.0)
        queue.seen(connection, "b", 20.0)
        queue.seen(connection, "a", 30.0)
        assert queue.last_seen(connection) == 30.0
        queue.leave(connection, "a")
        assert queue.last_seen(connection) == 20.0
        queue.seen(connection, "c", 20.0 + 100_000)  # b has not been seen for more than a day
        queue.leave(connection, "c")
        assert queue.last_seen(connection) is None
