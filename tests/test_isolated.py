"""A function in a fresh process: its result or a named failure comes back, and nothing of it stays."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children
import pytest
import torch

from horizonplan.probes.child import out_of_memory
from horizonplan.probes.isolated import CannotTravel, ChildFailed, ChildKilled, ChildTimeout, IsolationError, isolated

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for what is left in /proc")


def run(function, *args, limit=60):
    return isolated(function, *args, timeout_seconds=limit)


def children_of(pid):
    """Processes that a process has started and that are left, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, fields = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(fields.split()[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def alive(pid):
    """Whether a process runs; an orphan's zombie is up to init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch, capfd):
    """After every test: no process, no open file, no file in the temporary folder, no word on the terminal."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    processes, files = children_of(os.getpid()), os.listdir("/proc/self/fd")
    yield
    assert children_of(os.getpid()) <= processes
    assert not multiprocessing.active_children()
    assert len(os.listdir("/proc/self/fd")) <= len(files)
    assert not [left for left in folder.iterdir() if not left.name.startswith("torchinductor")]  # a cache of torch's
    assert capfd.readouterr() == ("", "")


def test_result_comes_back():
    outcome = run(children.add, [1], [2])
    assert outcome.value == [1, 2]
    assert 0 < outcome.seconds < 60


@pytest.mark.parametrize("way", ["there", "back"])
def test_more_than_a_pipe_holds_goes_through(way):
    big = bytes(10_000_000)
    assert (
        (run(children.add, big, b"1").value == big + b"1")
        if way == "there"
        else run(children.zeros, len(big)).value == big
    )


def test_what_is_one_object_arrives_as_one():
    shared = [1]
    assert run(children.same, shared, shared).value
    assert not run(children.same, shared, [1]).value


def test_child_has_its_own_session_and_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pid, group, session, folder, _ = run(children.place).value
    assert pid == group == session != os.getpid()
    assert folder == str(tmp_path)
    assert not alive(pid)


def test_environment_is_handed_on_and_said(monkeypatch):
    assert "HORIZONPLAN_TEST" not in run(children.place).environment
    monkeypatch.setenv("HORIZONPLAN_TEST", "here")
    outcome = run(children.place)
    assert outcome.value[-1] == "here"
    assert "HORIZONPLAN_TEST" in outcome.environment
    run(children.changes_environment)
    assert os.environ["HORIZONPLAN_TEST"] == "here"


def test_start_method_stays_free_to_be_set():
    before = multiprocessing.get_start_method(allow_none=True)
    run(children.add, 1, 2)
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_exception_comes_back_with_its_place():
    with pytest.raises(ChildFailed, match="ValueError: no such thing") as failure:
        run(children.fails, ValueError, "no such thing")
    assert (failure.value.type_name, failure.value.message) == ("ValueError", "no such thing")
    assert "children.py" in failure.value.traceback
    assert not failure.value.out_of_memory


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (children.OutOfMemoryError, "Tried to allocate 2.00 GiB"),
        (MemoryError, ""),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_running_out_of_memory_is_recognised(kind, message):
    with pytest.raises(ChildFailed) as failure:
        run(children.fails, kind, message)
    assert failure.value.out_of_memory


def test_torch_s_own_error_is_running_out_of_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_leaving_by_an_exception_is_a_failure(kind):
    with pytest.raises(ChildFailed, match=kind.__name__):
        run(children.fails, kind, "0")


def test_exit_without_an_answer_is_a_failure():
    with pytest.raises(ChildFailed, match="ended its process with code 3"):
        run(children.leaves, 3)


def test_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(ChildFailed, match="lambda"):
        run(children.returns_lambda)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_signal_is_named(number):
    with pytest.raises(ChildKilled, match=number.name) as failure:
        run(children.dies, number)
    assert failure.value.signal_name == number.name
    assert ("out of memory" in str(failure.value)) == (number == signal.SIGKILL)
    assert "last words" in failure.value.output


def test_child_is_quiet_and_its_output_is_kept_for_failures():
    run(children.chatters)
    with pytest.raises(ChildTimeout) as failure:
        run(children.dies, 0, limit=2.5)
    assert failure.value.output == "last words\n"


@pytest.mark.parametrize("ignore", [False, True], ids=["", "deaf to SIGTERM"])
def test_hanging_child_ends_within_the_limit_with_its_grandchild(tmp_path, ignore):
    start = time.monotonic()
    with pytest.raises(ChildTimeout, match=r"timeout_seconds=2\.5"):
        run(children.hangs, tmp_path / "pids", ignore, limit=2.5)
    assert time.monotonic() - start < 2.5 + 3
    child, grandchild = map(int, (tmp_path / "pids").read_text().split())
    assert not alive(grandchild)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_grandchild_does_not_outlive_success():
    assert not alive(run(children.leaves_grandchild).value)


def test_result_counts_although_the_process_will_not_end():
    assert run(children.lingers, limit=2.5).value == "done"


def test_what_a_hanging_child_made_is_removed(tmp_path):
    with pytest.raises(ChildTimeout):
        run(children.hangs_with_things, tmp_path / "name", limit=2.5)
    name = (tmp_path / "name").read_text()
    assert not Path(f"/dev/shm/sem.{name.removeprefix('/')}").exists()


def test_interrupt_ends_the_child(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(children.hangs, tmp_path / "pids")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not any(map(alive, map(int, (tmp_path / "pids").read_text().split())))


def local_class():
    class Local:
        pass

    return Local


@pytest.mark.parametrize(
    ("function", "args"),
    [(lambda: 0, ()), (local_class(), ()), (children.add, (lambda: 0, 1)), (children.add, ((i for i in "ab"), 1))],
    ids=["lambda", "local class", "lambda as argument", "generator"],
)
def test_what_cannot_be_pickled_cannot_travel(function, args):
    with pytest.raises(CannotTravel, match="cannot be pickled"):
        run(function, *args)


def of_the_main_module(monkeypatch):
    """A function that pickles by a name in ``__main__`` which a fresh process does not have, as a notebook's do."""

    def helper():
        return 0

    helper.__module__, helper.__qualname__ = "__main__", "helper"
    monkeypatch.setattr(sys.modules["__main__"], "helper", helper, raising=False)
    assert pickle.loads(pickle.dumps(helper)) is helper
    return helper


def test_what_the_child_cannot_find_cannot_travel(monkeypatch):
    with pytest.raises(CannotTravel, match=r"AttributeError: .*helper"):
        run(of_the_main_module(monkeypatch))


def test_arguments_that_do_not_arrive_in_time_cannot_travel():
    with pytest.raises(CannotTravel, match=r"not begun after timeout_seconds=0\.001"):
        run(children.add, 1, 2, limit=0.001)


@pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan")])
def test_limit_that_is_none(limit):
    with pytest.raises(ValueError, match="timeout_seconds="):
        run(children.add, 1, 2, limit=limit)


def test_all_failures_are_of_one_kind():
    assert all(issubclass(kind, IsolationError) for kind in (CannotTravel, ChildFailed, ChildKilled, ChildTimeout))


@pytest.mark.slow
def test_model_and_optimizer_travel_together():
    model = torch.nn.Linear(1600, 1600)  # 10 MB
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.weight.detach().clone()
    moved, trained = run(children.trains, model, optimizer, torch.ones(2, 1600)).value
    assert moved
    assert torch.equal(model.weight, weight)
    assert not torch.equal(trained.weight, weight)


@pytest.mark.slow
def test_out_of_memory_error_of_torch_comes_back():
    with pytest.raises(ChildFailed, match="Tried to allocate") as failure:
        run(children.torch_runs_out)
    assert failure.value.out_of_memory
    assert failure.value.type_name == "OutOfMemoryError"


def script(folder, text):
    """Start a main script of a user's."""
    (folder / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "script.py"]
    return subprocess.Popen(command, env=environment, text=True, cwd=folder, stdout=-1, stderr=-1)


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_main_script_needs_a_guard(tmp_path, guarded):
    body = "print(isolated(double, 21, timeout_seconds=100).value)"
    text = "from horizonplan.probes.isolated import isolated\n\ndef double(x):\n    return 2 * x\n\n"
    out, err = script(tmp_path, text + (f'if __name__ == "__main__":\n    {body}\n' if guarded else body)).communicate()
    if guarded:
        assert (out, err) == ("42\n", "")
    else:
        assert "CannotTravel" in err
        assert 'guard what the main script runs with if __name__ == "__main__":' in err


@pytest.mark.slow
def test_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    text = (
        "import children\nfrom horizonplan.probes.isolated import isolated\n\n"
        'if __name__ == "__main__":\n    isolated(children.hangs, "pids", timeout_seconds=600)\n'
    )
    parent = script(tmp_path, text)
    until = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < until:
        time.sleep(0.1)
    parent.kill()
    parent.communicate()
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))
