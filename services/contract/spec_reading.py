"""From YAML files and plain data to specifications, and from mistakes to lines that say what to write instead."""

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from services.contract.errors import SpecError
from services.contract.evaluation_spec import EvaluationSpec
from services.contract.spec import RunSpec, SweepSpec, expand


def parse_sweep(data: object) -> SweepSpec:
    """A sweep from plain data; SpecError names every wrong field, its value and the way out."""
    return _parse(SweepSpec, data)


def parse_run(data: object) -> RunSpec:
    """A run from plain data; SpecError names every wrong field, its value and the way out."""
    return _parse(RunSpec, data)


def parse_evaluation(data: object) -> EvaluationSpec:
    """What to measure, from plain data; SpecError as for ``parse_sweep``."""
    return _parse(EvaluationSpec, data)


def load_sweep(path: Path) -> SweepSpec:
    """A sweep from a YAML file."""
    return parse_sweep(_read_yaml(path))


def load_run(path: Path) -> RunSpec:
    """A run from a YAML file."""
    return parse_run(_read_yaml(path))


def load_runs(path: Path) -> list[RunSpec]:
    """The runs of a YAML file: those that a sweep expands to, or the one that it describes.

    A sweep has a name and a grid, a run has neither.
    """
    data = _read_yaml(path)
    is_sweep = isinstance(data, Mapping) and not {"name", "grid"}.isdisjoint(data)
    return expand(parse_sweep(data)) if is_sweep else [parse_run(data)]


def read_yaml(text: str, *, source: str) -> object:
    """The plain data of a YAML text; SpecError names ``source`` and the line that does not parse."""
    try:
        return yaml.load(text, Loader=_Yaml)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{source} is not YAML: {error}", fix="Mend the line named above.") from None


def describe_errors(error: ValidationError, spec: type[BaseModel]) -> list[str]:
    """One line per mistake: the field's path, the value given, and what to write instead."""
    lines = []
    mistakes = error.errors(include_url=False)
    places = [item["loc"] for item in mistakes]
    for item in mistakes:
        # A list counts its sound members alone: one that is wrong makes it too short as well.
        if item["type"] == "too_short" and any(_lies_in(at, item["loc"]) for at in places):
            continue
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: {_unknown_field(item['loc'], spec)}")
        elif item["type"] == "missing":
            lines.append(f"{place}: is missing; add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            shown = "" if isinstance(given, Mapping | BaseModel) else f"{_shorten(given)}: "
            lines.append(f"{place}: {shown}{message}" if place else message)
    return lines


MAX_MISTAKES = 20
"""As many as one message names."""
SpecT = typing.TypeVar("SpecT", bound=BaseModel)


def _parse(spec: type[SpecT], data: object) -> SpecT:
    if not isinstance(data, Mapping):
        raise SpecError(
            f"a specification is a mapping of fields, not {_shorten(data)}",
            fix="Start from sweeps/demo.yaml.",
        )
    try:
        return spec.model_validate(data)
    except ValidationError as error:
        lines = describe_errors(error, spec)
        if len(lines) > MAX_MISTAKES:
            lines = [*lines[:MAX_MISTAKES], f"and {len(lines) - MAX_MISTAKES} more mistakes"]
        raise SpecError(
            "; ".join(lines),
            fix="Correct these fields and try again; sweeps/ holds complete examples.",
            details={f"error.{index}": line for index, line in enumerate(lines)},
        ) from None


def _lies_in(place: Sequence[object], outer: Sequence[object]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _read_yaml(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}", fix="Name a readable YAML file.") from None
    return read_yaml(text, source=str(path))


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text and accepts a key twice; here it is a number, and twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, typing.Hashable):
                raise yaml.constructor.ConstructorError(None, None, "this is no name of a field", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _unknown_field(location: tuple[int | str, ...], spec: type[BaseModel]) -> str:
    owner = _model_at(location[:-1], spec)
    known = sorted(owner.model_fields) if owner else []
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"unknown field; did you mean {close[0]}?"
    return f"unknown field; remove it or use one of {', '.join(known)}"


def _model_at(location: tuple[int | str, ...], spec: type[BaseModel]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = spec
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for part in typing.get_args(annotation):
            found = _model_in(part)
            if found:
                return found
    return None


def _shorten(value: object) -> str:
    # Bounded before it is built: YAML's aliases let a short text stand for an endless value.
    bounded = reprlib.Repr()
    bounded.maxlevel, bounded.maxstring, bounded.maxlong = 3, 100, 100
    text = bounded.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
