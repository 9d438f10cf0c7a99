"""The page's two forms: what they show, and the request of the API that they come to.

Both are judged by the API's own models; an error comes back under the name of the field that was filled in.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from horizonplan.api.architectures import Architecture, JobRequest
from horizonplan.api.job_settings import JobSettings
from horizonplan.api.page_dials import DEFAULTS, dial_of, in_words, number, request_of, size, size_text
from horizonplan.api.problems import Problem, field_name
from horizonplan.api.schemas import PlanRequest
from horizonplan.api.security import named_once

Fields = Mapping[str, Sequence[str]]

ROWS, MORE_ROWS, MOST_ROWS = 6, 4, 64
COLUMNS = {"horizons": "horizon", "memory_bytes": "memory", "cosine": "cosine"}
NAMES = {
    "depth": "Blocks",
    "kind": "What is wanted",
    "epsilon": "Loss of rate allowed",
    "lam": "Weight of cost",
    "limit": "Memory limit",
    "cost": "How memory is paid for",
    "node": "Memory of a node",
    "price": "Price of a node",
}
LABELS = {
    "residual-mlp": "Residual MLP",
    "residual-cnn": "Residual CNN",
    "transformer": "Transformer",
    "character-gpt": "Character GPT",
    "GPT2Config": "GPT-2 (Hugging Face)",
    "LlamaConfig": "Llama (Hugging Face)",
    "Qwen2Config": "Qwen2 (Hugging Face)",
    "BertConfig": "BERT (Hugging Face)",
    "ViTConfig": "ViT (Hugging Face)",
    "registered": "A registered model",
}


@dataclass
class Form:
    """A form as it is shown.

    Attributes:
        texts: name of a field -> what stands in it.
        errors: name of a field -> what is wrong with it. The name ``form`` is the form as a whole.
        rows: of the table: horizon, memory, cosine.
    """

    texts: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def filled(self) -> list[int]:
        """The rows of the table in which something stands."""
        return [i for i, row in enumerate(self.rows) if any(text.strip() for text in row)]


@dataclass(frozen=True)
class Size:
    """A size that an architecture asks for.

    Attributes:
        name: of its field, such as ``architecture.width``.
        label: what it is called; Hugging Face's names stay as they are.
        kind: ``"number"``, ``"list"`` or ``"flag"``.
        text: its default.
        hint: what it means, where the name does not say.
    """

    name: str
    label: str
    kind: str
    text: str
    hint: str


def empty_measurements(example: bool = False) -> Form:
    """The form of measurements as it is first shown, or filled in with the API's example."""
    form = Form(dict(DEFAULTS) | {"depth": "", "json": ""}, rows=[("", "", "")] * ROWS)
    if example:
        given: dict[str, Any] = PlanRequest.model_config["json_schema_extra"]["examples"][0]  # type: ignore
        columns = (given["horizons"], [size_text(value) for value in given["memory_bytes"]], given["cosine"])
        form.rows[: len(given["horizons"])] = [tuple(map(str, row)) for row in zip(*columns, strict=True)]  # type: ignore
        form.texts |= {"depth": str(given["depth"]), "node": size_text(given["cost"]["node_memory_bytes"])}
    return form


def filled_measurements(fields: Fields) -> Form:
    """The form of measurements as somebody filled it in."""
    texts = {name: _first(fields, name, text) for name, text in empty_measurements().texts.items()}
    columns = [list(fields.get(name, ())) for name in COLUMNS.values()]
    count = min(MOST_ROWS, max(ROWS, *map(len, columns)) + (MORE_ROWS if "more" in fields else 0))
    padded = [(column + [""] * count)[:count] for column in columns]
    return Form(texts, rows=[(h, m, c) for h, m, c in zip(*padded, strict=True)])


def measurements_asked(form: Form) -> PlanRequest | None:
    """The request that a form of measurements makes; else the form says what is wrong."""
    if form.texts["json"].strip():
        return _from_json(form)
    filled = form.filled
    table = [[row[i] for row in (form.rows[j] for j in filled)] for i in range(3)]
    asked = {
        "depth": number(form.texts["depth"]),
        "horizons": [number(text) for text in table[0]],
        "memory_bytes": [size(text) for text in table[1]],
        "cosine": [number(text) for text in table[2]],
    }
    try:
        return PlanRequest.model_validate(asked | request_of(form.texts))
    except ValidationError as error:
        for one in error.errors():
            name = _measurement_name(one["loc"], filled)
            form.errors.setdefault(name, in_words(name.partition("[")[0], one))
    return None


def place_measurement(form: Form, name: str, message: str) -> None:
    """Put an error that the API's work found (``memory_bytes[2]``) to the field of the form."""
    if form.texts["json"].strip():
        form.errors["json"] = message
        return
    filled = form.filled
    column, _, rest = name.partition("[")
    path: list[str | int] = [column, int(rest[:-1])] if rest else [column]
    form.errors[_measurement_name(path, filled)] = message


def kinds(settings: JobSettings) -> dict[str, type[BaseModel]]:
    """The architectures that a job may ask for here, by kind."""
    found = {}
    for model in get_args(get_args(Architecture)[0]):
        for kind in get_args(model.model_fields["kind"].annotation):
            hugging_face = kind.endswith("Config")
            if hugging_face and importlib.util.find_spec("transformers") is None:
                continue
            if kind != "registered" or settings.models:
                found[kind] = model
    return found


def sizes(model: type[BaseModel], prefix: str = "architecture.") -> list[Size]:
    """The fields of an architecture; those of a part are named by a path."""
    found = []
    theirs = prefix.endswith(".numbers.")  # of a Hugging Face configuration
    for name, info in model.model_fields.items():
        default = info.get_default()
        if name in ("kind", "id"):
            continue
        if isinstance(default, BaseModel):
            found += sizes(type(default), f"{prefix}{name}.")
            continue
        kind = "list" if isinstance(default, list) else "flag" if isinstance(default, bool) else "number"
        text = ", ".join(map(str, default)) if kind == "list" else ("on" if default is True else str(default))
        label = name if theirs else name.replace("_", " ").capitalize()
        found.append(Size(prefix + name, label, kind, text, info.description or ""))
    return found


def empty_job(kind: str, settings: JobSettings) -> Form:
    """The form of a job as it is first shown for a kind of architecture."""
    texts = {"batch_size": "32", "device": "cpu", "rollout_steps": "", "seed": "0"}
    texts |= {one.name: one.text for one in sizes(kinds(settings)[kind])}
    if kind == "registered":
        texts |= {"architecture.id": next(iter(settings.models)), "batch_size": ""}
    return Form(dict(DEFAULTS) | {"architecture": kind} | texts)


def filled_job(fields: Fields, settings: JobSettings) -> Form:
    """The form of a job as somebody filled it in; of an unknown kind, the first."""
    kind = _first(fields, "architecture", "")
    known = kinds(settings)
    form = empty_job(kind if kind in known else next(iter(known)), settings)
    flags = {one.name for one in sizes(known[form.texts["architecture"]]) if one.kind == "flag"}
    for name, text in form.texts.items():
        form.texts[name] = _first(fields, name, "" if name in flags else text)
    form.texts["architecture"] = kind if kind in known else next(iter(known))
    return form


def job_asked(form: Form, settings: JobSettings) -> JobRequest | None:
    """The request that a form of a job makes; else the form says what is wrong."""
    kind = form.texts["architecture"]
    architecture: dict[str, Any] = {"kind": kind}
    for one in sizes(kinds(settings)[kind]):
        *path, last = one.name.split(".")[1:]
        place = architecture
        for part in path:
            place = place.setdefault(part, {})
        place[last] = _value(one.kind, form.texts[one.name])
    if kind == "registered":
        architecture["id"] = form.texts["architecture.id"]
    optional = {"batch_size": form.texts["batch_size"], "rollout_steps": form.texts["rollout_steps"]}
    numbers = {name: number(text) if text.strip() else None for name, text in optional.items()}
    asked = {
        "architecture": architecture,
        "batch_size": numbers["batch_size"],
        "device": form.texts["device"].strip(),
        "seed": number(form.texts["seed"]),
        "options": {"rollout_steps": numbers["rollout_steps"]},
    }
    try:
        return JobRequest.model_validate(asked | request_of(form.texts))
    except ValidationError as error:
        for wrong in error.errors():
            where: list[str | int] = [part for part in wrong["loc"] if part != kind]
            place_job(form, field_name(where), in_words("", wrong), where)
    return None


def place_job(form: Form, name: str, message: str, path: Sequence[str | int] = ()) -> None:
    """Put an error (``architecture.heads``, ``objective.epsilon``) to the field of the form."""
    name = name.partition("[")[0].removeprefix("options.")
    if name.startswith(("objective", "cost")):
        name = dial_of(path or name.split("."))
    form.errors.setdefault(name if name in form.texts else "form", message)


def name_in_words(name: str) -> str:
    """What a field of a form is called in a list of errors; empty where the error says it."""
    first, _, row = name.removeprefix("architecture.").partition("[")
    if row:
        return f"{first.capitalize()}, row {int(row[:-1]) + 1}"
    if first in ("form", "table", "json"):
        return ""
    return NAMES.get(first, first.rpartition(".")[2].replace("_", " ").capitalize())


def _from_json(form: Form) -> PlanRequest | None:
    try:
        return PlanRequest.model_validate(json.loads(form.texts["json"], object_pairs_hook=named_once))
    except ValidationError as error:
        told = [f"{field_name(one['loc'])}: {one['msg']}" for one in error.errors()[:5]]
        form.errors["json"] = "; ".join(told) + "."
    except Problem as problem:
        form.errors["json"] = f"{problem.detail}."
    except (ValueError, RecursionError) as error:
        form.errors["json"] = f"This is no JSON: {error}."
    return None


def _measurement_name(path: Sequence[str | int], filled: Sequence[int]) -> str:
    first = str(path[0])
    if first in COLUMNS:
        whole = len(path) == 1 or not filled
        return "table" if whole else f"{COLUMNS[first]}[{filled[int(path[1])]}]"
    return dial_of(path) if first in ("objective", "cost") else "depth" if first == "depth" else "form"


def _value(kind: str, text: str) -> Any:
    if kind == "flag":
        return bool(text)
    return [number(part) for part in text.split(",")] if kind == "list" else number(text)


def _first(fields: Fields, name: str, default: str) -> str:
    given = fields.get(name)
    return given[0] if given else default
