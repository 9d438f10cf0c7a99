"""A checkpoint comes back equal or not at all, and a save that does not finish leaves the one before it."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from horizonplan.training import files
from horizonplan.training.checkpoint import (
    MANIFEST,
    SCHEMA_VERSION,
    STATE,
    WEIGHTS,
    CheckpointError,
    CheckpointWarning,
    latest,
    load,
    save,
)

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
KEEP = 2


def same(left, right):
    """Oracle of equality: type, shape and every bit (NaNs too), in containers of the same kind."""
    if isinstance(left, torch.Tensor):
        if type(right) is not torch.Tensor or (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return bits(left) == bits(right)
    if isinstance(left, dict):
        return type(left) is type(right) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def bits(tensor):
    plain = tensor.detach().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).tolist()


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch):
    """A flush is slow and changes nothing that a test can see, without a power cut. It is counted all the same."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def small(step):
    """What the tests save at a step: it can be told from the step alone."""
    weights = {"w": torch.full((6,), float(step)), "b": torch.tensor(step)}
    return weights, {"moments": [torch.arange(5) * step], "lr": 0.5}, {"epoch": step}


def save_small(folder, step, keep=KEEP):
    return save(folder, step, *small(step), keep=keep)


def is_small(found):
    """Whether a checkpoint is that of its step, whole."""
    return found is not None and all(
        same(was, now) for was, now in zip(small(found.step), (found.weights, found.state, found.meta), strict=True)
    )


def quiet_latest(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return latest(folder)


def temporary(folder):
    return [name for name in os.listdir(folder) if not name.startswith("step-") or name.endswith(".replaced")]


# What comes back


@st.composite
def tensors(draw):
    """Any bits of any type in any shape, seen directly, transposed, or as a part of a larger storage."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    kind = draw(st.sampled_from(["plain", "transposed", "slice", "every other"]))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    plain = (raw.clone() % 2 if dtype is torch.bool else raw).view(dtype).reshape(shape)
    if kind == "transposed":
        return plain.mT.contiguous().mT if plain.ndim >= 2 else plain
    if kind == "plain":
        return plain
    step = 2 if kind == "every other" else 1
    larger = torch.empty(plain.numel() * step + 100, dtype=dtype)
    view = larger[7 : 7 + plain.numel() * step : step].view(shape) if plain.numel() else larger[:0].view(shape)
    return view.copy_(plain)


names = st.text(max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
states = st.recursive(
    json_values | st.floats(allow_nan=False) | st.binary(min_size=1, max_size=4) | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    st.dictionaries(names, tensors(), max_size=4),
    st.dictionaries(st.text(max_size=4), states, max_size=3),
    st.dictionaries(st.text(max_size=4), json_values, max_size=3),
    st.integers(0, 10**12),
)
def test_what_was_saved_comes_back(tmp_path_factory, weights, state, meta, step):
    folder = tmp_path_factory.mktemp("run")
    path = save(folder, step, weights, state, meta)
    for found in (load(path), latest(folder)):
        assert (found.path, found.step) == (path, step)
        assert same(found.weights, weights)
        assert same(found.state, state)
        assert same(found.meta, meta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_are_a_safetensors_file(tmp_path, dtype):
    """Oracle: the library's own writer, byte for byte."""
    weights = {"b": torch.ones(3, 2).to(dtype), "a": torch.zeros(()).to(dtype), "none": torch.empty(0, 3, dtype=dtype)}
    path = save(tmp_path, 1, weights, {}, {})
    content = (path / WEIGHTS).read_bytes()
    assert content == safetensors.torch.save(weights)
    assert same(safetensors.torch.load_file(path / WEIGHTS), weights)


def test_parameters_come_back_as_plain_tensors(tmp_path):
    layer = nn.Linear(2, 3)
    layer.weight.grad = torch.ones(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    found = load(save(tmp_path, 1, dict(layer.named_parameters()), optimizer.state_dict(), {}))
    assert same({name: p.detach() for name, p in layer.named_parameters()}, found.weights)
    assert not found.weights["weight"].requires_grad
    assert same(found.state, optimizer.state_dict())


def test_the_versions_of_a_state_dict_come_back(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    found = load(save(tmp_path, 1, {}, {"model": state}, {})).state["model"]
    assert found._metadata == state._metadata


@pytest.mark.parametrize("place", ["weights", "state"])
def test_a_view_takes_its_own_bytes(tmp_path, place):
    larger = torch.randn(100_000)
    content = {"view": larger[10:20]}
    path = save(tmp_path, 1, *((content, {}) if place == "weights" else ({}, content)), {})
    assert sum(file.stat().st_size for file in path.iterdir()) < 4_000
    assert same(getattr(load(path), place), content)


def test_views_that_make_up_a_storage_share_it_on_the_disk(tmp_path):
    flat = torch.randn(100_000)
    state = {"flat": flat, "left": flat[:60_000], "right": flat[60_000:]}
    path = save(tmp_path, 1, {}, state, {})
    assert (path / STATE).stat().st_size < flat.nbytes + 4_000
    assert same(load(path).state, state)


# What is refused


class Custom:
    pass


@pytest.mark.parametrize(
    ("state", "key"),
    [
        ({"a": {"b": [1, Custom()]}}, "state['a']['b'][1]"),
        ({"a": (1, lambda: 0)}, "state['a'][1]"),
        ({"x": torch.ones(2), "rng": {"python": random.Random(0)}}, "state['rng']['python']"),
        ({"path": Path("x")}, "state['path']"),
        ({"a": {Custom(): 1}}, "state['a'] "),
        ({"empty": b""}, "state['empty']"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_refused_with_its_key(tmp_path, state, key):
    save_small(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, {}, state, {})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)  # torch's advice to trust what it found
    assert os.listdir(tmp_path) == ["step-000000001"]


def test_a_state_that_holds_itself_is_refused(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match=r"state.*RecursionError"):
        save(tmp_path, 1, {}, {"loop": loop}, {})


@pytest.mark.parametrize(
    ("weights", "meta", "complaint"),
    [
        ({"__metadata__": torch.ones(1)}, {}, "__metadata__"),
        ({"\ud800": torch.ones(1)}, {}, "name"),
        ({3: torch.ones(1)}, {}, "3"),
        ({"w": [1.0]}, {}, r"weights\['w'\] is a list"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, {}, "complex128"),
        ({"w": torch.ones(2, 2).to_sparse()}, {}, "sparse"),
        ({"w": torch.ones(2, device="meta")}, {}, "meta"),
        ({}, {"loss": float("nan")}, r"meta\['loss'\]"),
        ({}, {"loss": torch.ones(1)}, r"meta\['loss'\]"),
        ({}, {"shape": (1, 2)}, r"meta\['shape'\]"),
        ({}, {"names": {1: "one"}}, r"meta\['names'\]"),
    ],
)
def test_weights_and_meta_that_would_not_come_back_are_refused(tmp_path, weights, meta, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        save(tmp_path / "run", 1, weights, {}, meta)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (True, 2), (1.0, 2), (1, 0), (1, None)])
def test_a_step_or_keep_out_of_range_is_refused(tmp_path, step, keep):
    with pytest.raises(ValueError, match="give a whole number"):
        save(tmp_path, step, {}, {}, {}, keep=keep)


# Damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    return folder, save_small(folder, 1), save_small(folder, 2)


def notices(two, damage):
    """Damage the newer checkpoint, see that both readers notice, and put it back."""
    folder, older, newer = two
    before = {file: file.read_bytes() for file in newer.iterdir()}
    try:
        damage(newer)
        with pytest.raises(CheckpointError, match=newer.name):
            load(newer)
        with pytest.warns(CheckpointWarning) as seen:
            found = latest(folder)
        assert found.path == older
        assert is_small(found)
        assert len(seen) == 1
        assert str(newer) in str(seen[0].message)
        assert seen[0].filename == __file__
    finally:
        shutil.rmtree(newer)
        newer.mkdir()
        for file, content in before.items():
            file.write_bytes(content)


@settings(max_examples=100)
@given(st.sampled_from([WEIGHTS, STATE, MANIFEST]), st.data())
def test_one_changed_byte_is_noticed(two, name, data):
    content = bytearray((two[2] / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    notices(two, lambda path: (path / name).write_bytes(content))


@settings(max_examples=60)
@given(st.sampled_from([WEIGHTS, STATE, MANIFEST]), st.data())
def test_a_file_cut_short_or_too_long_is_noticed(two, name, data):
    content = (two[2] / name).read_bytes()
    kept = data.draw(st.integers(0, len(content)))
    more = b"" if kept < len(content) else data.draw(st.binary(min_size=1, max_size=3))
    notices(two, lambda path: (path / name).write_bytes(content[:kept] + more))


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe"])
def test_a_missing_file_is_noticed(two, name, instead):
    def damage(path):
        (path / name).unlink()
        if instead != "nothing":
            (os.mkdir if instead == "folder" else os.mkfifo)(path / name)

    notices(two, damage)


def test_nothing_valid_is_none(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    (tmp_path / "step-000000007").mkdir()
    with pytest.warns(CheckpointWarning, match="step-000000007"):
        assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be listed"):
        latest(tmp_path / "file")


def test_a_checkpoint_under_another_step_s_name_is_none(tmp_path):
    save_small(tmp_path, 1).rename(tmp_path / "step-000000009")
    with pytest.warns(CheckpointWarning, match="that of step 1"):
        assert latest(tmp_path) is None
    moved = (tmp_path / "step-000000009").rename(tmp_path / "best")
    assert is_small(load(moved))


def sealed(data):
    """A manifest with the right hash of itself."""
    text = json.dumps(data | {"sha256": "0" * 64})
    return text.replace('"' + "0" * 64, '"' + hashlib.sha256(text.encode()).hexdigest()).encode()


def crafted(path):
    """Manifests that are wrong in every way but one: their hash of themselves is right."""
    good = json.loads((path / MANIFEST).read_text())
    own = good["files"]
    assert sealed(good) != sealed(good | {"step": 3})
    yield from (sealed(good | {"step": step}) for step in (-1, True, "2", None, 2.0, [2], 1e999))
    yield from (sealed(good | {"schema_version": version}) for version in (0, -1, True, None, "1", 1.0, {}))
    yield from (sealed(good | {"meta": meta}) for meta in ([], None, "x"))
    yield from (
        sealed(good | {"files": listed}) for listed in ([], None, {}, {WEIGHTS: own[WEIGHTS]}, [WEIGHTS, STATE])
    )
    yield sealed(good | {"files": own | {"../x": own[STATE]}})
    yield sealed(good | {"files": {WEIGHTS: own[WEIGHTS], "../state.pt": own[STATE]}})
    for field, values in {"bytes": (-1, True, None, 1e999, 10**4000, "1"), "sha256": (None, "", 0, "../x")}.items():
        yield from (sealed(good | {"files": own | {STATE: own[STATE] | {field: value}}}) for value in values)
    yield sealed(good | {"files": own | {STATE: own[STATE] | {"more": 1}}})


NO_MANIFESTS = [
    b"",
    b"[]",
    b"null",
    b"1e999",
    b'"x"',
    b"\xff\xfe",
    b"{" * 100_000,
    b"[" * 100_000,
    b"9" * 10_000,
    b'{"schema_version": ' + b"9" * 10_000 + b"}",
    b'{"schema_version": 1, "sha256": ""}',
    b'{"schema_version": 1, "sha256": [1]}',
]


def test_crafted_manifests_are_refused(two):
    _, _, newer = two
    good = json.loads((newer / MANIFEST).read_text())
    before = (newer / MANIFEST).read_bytes()
    try:
        (newer / MANIFEST).write_bytes(sealed(good))
        assert is_small(load(newer))  # so what follows is refused for what it says
    finally:
        (newer / MANIFEST).write_bytes(before)
    for content in [*NO_MANIFESTS, *crafted(newer)]:
        notices(two, lambda path, content=content: (path / MANIFEST).write_bytes(content))


def test_a_newer_schema_is_named(two):
    good = json.loads((two[2] / MANIFEST).read_text())

    def damage(path):
        (path / MANIFEST).write_bytes(sealed(good | {"schema_version": SCHEMA_VERSION + 1}))
        with pytest.raises(CheckpointError, match=f"schema_version={SCHEMA_VERSION + 1} is newer"):
            load(path)

    notices(two, damage)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_with_code_in_it_is_not_executed(two, tmp_path):
    """Files with the right hashes, so that only weights_only=True stands between them and execution."""
    good = json.loads((two[2] / MANIFEST).read_text())
    torch.save({"x": Touch(tmp_path / "zip")}, tmp_path / "zip.pt")
    contents = [
        (tmp_path / "zip.pt").read_bytes(),
        pickle.dumps({"x": Touch(tmp_path / "bare")}, protocol=2),
        pickle.dumps([1], protocol=2),
        b"",
        b"PK",
    ]
    for content in contents:

        def damage(path, content=content):
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (path / STATE).write_bytes(content)
            (path / MANIFEST).write_bytes(sealed(good | {"files": good["files"] | {STATE: entry}}))

        notices(two, damage)
    assert sorted(os.listdir(tmp_path)) == ["zip.pt"]


def test_weights_with_a_wrong_header_are_refused(two):
    good = json.loads((two[2] / MANIFEST).read_text())
    for content in (b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", b"\x02\0\0\0\0\0\0\0{}more"):

        def damage(path, content=content):
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (path / WEIGHTS).write_bytes(content)
            (path / MANIFEST).write_bytes(sealed(good | {"files": good["files"] | {WEIGHTS: entry}}))

        notices(two, damage)


# What stays


def test_the_newest_two_stay(tmp_path):
    for step in (5, 500, 999_999_998, 999_999_999, 1_000_000_000):  # names of more digits are not in alphabetical order
        assert save_small(tmp_path, step).name == f"step-{step:09d}"
        assert is_small(latest(tmp_path))
        assert latest(tmp_path).step == step
    assert sorted(os.listdir(tmp_path)) == ["step-1000000000", "step-999999999"]


def test_damaged_checkpoints_stay_and_do_not_count(tmp_path):
    first, second = save_small(tmp_path, 1), save_small(tmp_path, 2)
    with (second / STATE).open("ab") as file:
        file.write(b"x")
    third = save_small(tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == [first, second, third]
    fourth = save_small(tmp_path, 4)
    assert sorted(tmp_path.iterdir()) == [second, third, fourth]


def test_what_was_just_saved_stays(tmp_path):
    save_small(tmp_path, 8)
    path = save_small(tmp_path, 3, keep=1)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_step_twice_is_the_second(tmp_path):
    save_small(tmp_path, 6)
    first = save(tmp_path, 7, {"w": torch.zeros(9)}, {"old": 1}, {})
    assert save_small(tmp_path, 7) == first
    assert is_small(latest(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["step-000000006", "step-000000007"]


def test_a_save_removes_what_killed_runs_left_and_nothing_else(tmp_path):
    stale = [".tmp-step-000000004-0123abcd", ".tmp-step-000000001-ffffffff"]
    others = [".tmp-step-4-0123abcd", ".tmp-mine", "step-4", "step-0000000004", "tmp", ".tmp-step-000000004-0123abcd.x"]
    for name in stale + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert latest(tmp_path) is None
    save_small(tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step-000000005"])


# Faults

WRITES = ("mkdir", "open", "write", "fsync", "replace")
REMOVALS = ("unlink", "rmdir")


class Killed(BaseException):
    """Stands for the end of the process: after it, no operation happens any more."""


class Faulty:
    """Numbers the operating system's operations, and lets the one with a given number fail, or it and all after it."""

    def __init__(self, monkeypatch, operations, fail_at=None, error=None):
        self.done, self.fail_at, self.error = [], fail_at, error
        for name in operations:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.done.append(name)
            number = len(self.done) - 1
            if number == self.fail_at or (self.error is Killed and self.fail_at is not None and number > self.fail_at):
                raise self.error() if self.error is Killed else OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call


def rounds(tmp_path, prepare, operations, error):
    """Save step 3 into a fresh folder again and again, each time with the next operation failing, until none is left.

    Yields the folder, the error of the save or None, and the operations up to the failure.
    """
    for number in count():
        folder = tmp_path / str(number)
        prepare(folder)
        raised = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "BUFFER_BYTES", 128)  # so that writes fail inside torch.save too
            faulty = Faulty(patch, operations, number, error)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CheckpointWarning)
                    save_small(folder, 3)
            except (CheckpointError, Killed) as caught:
                raised = caught
        if len(faulty.done) <= number:
            assert set(faulty.done) == set(operations)
            return
        yield folder, raised, faulty.done[: number + 1]


def steps_1_and_2(folder):
    save_small(folder, 1)
    save_small(folder, 2)


def steps_2_and_3(folder):
    save_small(folder, 2)
    save_small(folder, 3)


def no_steps(folder):
    pass


@pytest.mark.parametrize("prepare", [no_steps, steps_1_and_2, steps_2_and_3])
def test_an_operation_that_fails_leaves_what_was_there(tmp_path, prepare):
    """For each operation in turn: the save raises and the folder is as before, or the save went through."""
    prepare(tmp_path / "before")
    before = latest(tmp_path / "before")
    went_through = []
    for folder, raised, done in rounds(tmp_path, prepare, WRITES, errno.ENOSPC):
        found = latest(folder) if folder.exists() else None
        if raised is None:
            assert found.step == 3
            went_through.append(done[-1])
        else:
            assert not folder.exists() or not temporary(folder)
            assert (found and found.step) == (before and before.step)
            message = str(raised)
            assert "no space left on device" in message
            assert f"Its tensors are {6 * 4 + 8 + 5 * 8} bytes" in message
            assert (f"intact checkpoint is {found.path}" if found else "no intact checkpoint") in message
            assert "resume=True" in message
            assert str(folder) in message
        if found is not None:
            assert is_small(found)
        save_small(folder, 4)
        assert not temporary(folder)
        assert len(os.listdir(folder)) <= KEEP
    # Past the point of no return there are only the removals of what was replaced, or of the oldest.
    assert went_through == ([] if prepare is no_steps else ["replace"])


@pytest.mark.parametrize(
    ("number", "words", "remedy"),
    [
        (errno.EDQUOT, "disk quota exceeded while writing weights.safetensors", "Free space"),
        (errno.EFBIG, "file too large while writing weights.safetensors", "Free space"),
        (errno.EIO, "input/output error while writing weights.safetensors", "Set that right"),
    ],
)
def test_other_failures_are_told_in_words(tmp_path, monkeypatch, number, words, remedy):
    Faulty(monkeypatch, ["write"], 0, number)
    with pytest.raises(CheckpointError, match=f"step 3: {words} in {tmp_path}.*{remedy}") as caught:
        save_small(tmp_path, 3)
    assert caught.value.__cause__.errno == number


def test_the_last_intact_checkpoint_is_one_with_the_right_contents(tmp_path, monkeypatch):
    steps_1_and_2(tmp_path)
    content = bytearray((tmp_path / "step-000000002" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "step-000000002" / WEIGHTS).write_bytes(content)
    Faulty(monkeypatch, ["write"], 0, errno.ENOSPC)
    with pytest.raises(CheckpointError, match=r"intact checkpoint is .*step-000000001"):
        save_small(tmp_path, 3)


class Flushes:
    """What is written and not yet flushed, by path; a folder is written when a name in it appears.

    ``renames`` has the source, the target, and what was not flushed just before.
    """

    def __init__(self, monkeypatch):
        self.waiting, self.renames = set(), []
        self.watch(monkeypatch, "mkdir", lambda path, *_: self.appears(path))
        self.watch(monkeypatch, "open", lambda path, flags, *_: flags & os.O_CREAT and self.appears(path))
        self.watch(monkeypatch, "write", lambda descriptor, *_: self.waiting.add(self.path_of(descriptor)))
        self.watch(monkeypatch, "fsync", lambda descriptor: self.waiting.discard(self.path_of(descriptor)))
        self.watch(monkeypatch, "replace", self.renamed)

    @staticmethod
    def watch(monkeypatch, name, note):
        real = getattr(os, name)

        def call(*args, **kwargs):
            note(*args)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    @staticmethod
    def path_of(descriptor):
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def appears(self, path):
        self.waiting |= {Path(path), Path(path).parent}

    def renamed(self, source, target):
        self.renames.append((Path(source), Path(target), set(self.waiting)))
        self.waiting.add(Path(target).parent)


@pytest.mark.parametrize("prepare", [no_steps, steps_1_and_2, steps_2_and_3])
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, prepare):
    folder = tmp_path / "run"
    prepare(folder)
    flushes = Flushes(monkeypatch)
    final = save_small(folder, 3)
    flushes.renamed(folder, tmp_path / "end")
    place = [target for _, target, _ in flushes.renames].index(final)
    part, _, waiting = flushes.renames[place]
    assert not [path for path in waiting if part in (path, *path.parents)]
    assert tmp_path not in waiting
    assert folder not in flushes.renames[place + 1][2]  # before the first removal, or the end


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushes = Flushes(monkeypatch)
    files.write(tmp_path / "plan.json", b"{}")
    ((part, target, waiting),) = flushes.renames
    assert target == tmp_path / "plan.json"
    assert part not in waiting
    assert tmp_path not in flushes.waiting


@pytest.mark.parametrize("prepare", [steps_1_and_2, steps_2_and_3])
def test_killed_before_any_operation_the_newest_is_valid(tmp_path, prepare):
    """For each operation in turn: the process ends there, and neither cleans up nor undoes anything."""
    seen = set()
    for folder, raised, _ in rounds(tmp_path, prepare, WRITES + REMOVALS, Killed):
        assert isinstance(raised, Killed)
        found = latest(folder)
        assert is_small(found)
        assert found.step in (2, 3)
        assert prepare is steps_1_and_2 or found.step == 3
        seen.add(found.step)
        save_small(folder, 4)
        assert not temporary(folder)
        assert latest(folder).step == 4
        assert len(os.listdir(folder)) == KEEP
    assert seen == ({2, 3} if prepare is steps_1_and_2 else {3})


def test_what_cannot_be_removed_is_told_and_tried_again(tmp_path, monkeypatch):
    steps_1_and_2(tmp_path)
    with monkeypatch.context() as patch:
        Faulty(patch, REMOVALS, 0, errno.EBUSY)
        with pytest.warns(CheckpointWarning, match="could not be removed: device or resource busy") as seen:
            save_small(tmp_path, 3)
    assert [warning.filename for warning in seen] == [__file__]
    assert latest(tmp_path).step == 3
    assert len(temporary(tmp_path)) == 1
    save_small(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["step-000000003", "step-000000004"]


def test_a_system_that_writes_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    weights, state, meta = {"w": torch.randn(1000)}, {"m": torch.randn(1000)}, {"epoch": 1}
    found = load(save(tmp_path, 1, weights, state, meta))
    assert same(found.weights, weights)
    assert same(found.state, state)


def test_after_an_error_nothing_more_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BUFFER_BYTES", 128)
    faulty = Faulty(monkeypatch, ["write"], 0, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "state.pt", lambda file: file.writelines([b"x" * 100] * 9))
    assert faulty.done == ["write"]
    assert os.listdir(tmp_path) == []


def test_a_file_s_killed_writers_are_removed(tmp_path):
    for name in (".a[1].json.0123abcd.tmp", ".a1.json.0123abcd.tmp", "a[1].json.tmp"):
        (tmp_path / name).touch()
    files.write(tmp_path / "a[1].json", b"{}")
    assert sorted(os.listdir(tmp_path)) == [".a1.json.0123abcd.tmp", "a[1].json", "a[1].json.tmp"]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, operation):
    """Files outside checkpoints, for each operation of each kind that fails."""
    path = tmp_path / "plan[1].json"
    for number in count():
        files.write(path, b"old")
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, [operation], number, errno.ENOSPC)
            with suppress(OSError):
                written = files.write(path, lambda file: file.writelines([b"n" * 600_000] * 3))
        if len(faulty.done) <= number:
            break
        assert set(path.read_bytes()) in ({*b"old"}, {*b"n"})
        assert os.listdir(tmp_path) == [path.name]
    assert written == files.Written(1_800_000, hashlib.sha256(b"n" * 1_800_000).hexdigest())
    assert path.read_bytes() == b"n" * 1_800_000


# Whole processes, killed and out of room

CHILD = """
import json, os, random, resource, signal, sys, time
import torch
from pathlib import Path
from horizonplan.training.checkpoint import save
from horizonplan.units import format_bytes

torch.set_num_threads(1)

def content(step):
    return {"w": torch.full((100_000,), float(step))}, {"m": [torch.full((100_000,), step)]}, {"epoch": step}

def loop(folder, pipe):
    step = 0
    while True:
        step += 1
        for _ in range(2):  # the second one replaces the first
            save(folder, step, *content(step))
            os.write(pipe, b"%d\\n" % step)

def in_child(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return pid

def killed(folder, wait):
    ours, theirs = os.pipe()
    pid = in_child(loop, folder, theirs)
    os.close(theirs)
    said = os.read(ours, 1)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(ours, 65536):
        said += more
    os.close(ours)
    return int(said.split()[-1])

def limited(folder, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        save(folder, 2, *content(2))
    except Exception as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())

def grown(folder, pipe):
    weights, state = {"w": torch.ones(64, 1024, 256)}, {"m": torch.ones(64, 1024, 256)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save(folder, 1, weights, state, {})
    os.write(pipe, str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024).encode())

def told(function, folder):
    ours, theirs = os.pipe()
    os.waitpid(in_child(function, folder, theirs), 0)
    os.close(theirs)
    return os.read(ours, 65536).decode()

root, kills = Path(sys.argv[1]), int(sys.argv[2])
waits = [random.Random(number).uniform(0, 0.1) for number in range(kills)]
answer = {"returned": [killed(root / f"kill-{number}", wait) for number, wait in enumerate(waits)]}
save(root / "limited", 1, *content(1))
answer["limited"] = told(limited, root / "limited")
answer["grown"] = int(told(grown, root / "grown"))
print(json.dumps(answer))
"""


def child(folder, kills):
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(kills)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Eight processes killed while they save, one that may write files of 300,000 bytes at most, one measured."""
    folder = tmp_path_factory.mktemp("processes")
    return folder, child(folder, kills=8)


def check_killed(folder, returned):
    """The newest is valid, and is the last one whose save had returned, or the one being written."""
    for number, step in enumerate(returned):
        found = latest(folder / f"kill-{number}")
        assert found.step in (step, step + 1)
        assert bool((found.weights["w"] == found.step).all())
        assert bool((found.state["m"][0] == found.step).all())
        assert found.meta == {"epoch": found.step}
        save_small(folder / f"kill-{number}", found.step + 1)
        assert not temporary(folder / f"kill-{number}")


def test_killed_while_saving_the_newest_is_valid(processes):
    folder, answer = processes
    assert len(answer["returned"]) == 8
    check_killed(folder, answer["returned"])


@pytest.mark.slow
def test_killed_at_many_moments_the_newest_is_valid(tmp_path):
    answer = child(tmp_path, kills=40)
    assert len(answer["returned"]) == 40
    check_killed(tmp_path, answer["returned"])


def test_a_file_that_may_not_grow_further_leaves_the_earlier_checkpoint(processes):
    folder, answer = processes[0] / "limited", processes[1]["limited"]
    assert answer.startswith("CheckpointError: checkpoint of step 2: file too large while writing weights.safetensors")
    assert str(folder / "step-000000001") in answer
    assert latest(folder).step == 1
    assert os.listdir(folder) == ["step-000000001"]


def test_saving_does_not_copy_the_state(processes):
    """64 MiB of weights and 64 MiB of state: the process grows by less than one of them."""
    assert processes[1]["grown"] < 32 * 2**20
