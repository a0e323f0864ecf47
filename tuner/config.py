"""Configuration: a YAML file and command-line flags -> a checked model."""

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from envs.errors import BadInput, UnknownName

M = TypeVar("M", bound=BaseModel)
LARGEST = 1 << 20  # bytes of a configuration file
DEEPEST = 20  # mappings and lists within each other
_OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken,
            yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)  # fmt: skip
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def with_flags(model: type[M]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each field of ``model``, and ``--config FILE``.

    The command is called with ``config``, the checked model: flags over file over defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "config"]
        flags = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(field) | None, _option(name, field)],
            )
            for name, field in model.model_fields.items()
        ]
        file = inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option("--config", help="YAML file with any of these keys.")
            ],
        )

        def wrapper(**given: Any) -> None:
            path = given.pop("config")
            chosen = {name: given.pop(name) for name in model.model_fields}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            command(config=resolve(model, path, chosen), **given)

        wrapper.__doc__ = inspect.cleandoc(command.__doc__ or "")
        wrapper.__name__ = command.__name__
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = inspect.Signature([*own, *flags, file])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def resolve(model: type[M], path: Path | None, flags: dict[str, Any]) -> M:
    """The checked configuration. Raises `BadInput` with the file or flag, the field, the fix."""
    content = read(path) if path is not None else {}
    for name, value in content.items():
        if name not in model.model_fields:
            raise BadInput(f"{path}: {UnknownName('key', name, model.model_fields)}")
        if isinstance(value, bool) and _bare(model.model_fields[name].annotation) is not bool:
            raise BadInput(f"{path}: {name}: {value} is yes or no, not a value of it; see --help")
    try:
        return model.model_validate(content | flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "configuration"
        where = f"--{name.replace('_', '-')}" if name in flags else f"{path}: {name}"
        value = str(first.get("input"))[:80]
        if first["type"] == "literal_error":
            kind = _bare(model.model_fields[name].annotation)
            if typing.get_origin(kind) is tuple:
                kind = typing.get_args(kind)[0]
            choices = typing.get_args(kind)
            raise BadInput(f"{where}: {UnknownName('value', value, map(str, choices))}") from None
        problem = first["msg"].lower().removeprefix("value error, ")
        raise BadInput(f"{where}: {value!r}: {problem}; see --help") from None


def read(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values: at most 1 MiB, UTF-8, no tags, aliases or repeated keys."""
    try:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give a YAML file")
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path}: is over 1 MiB; a configuration is a few lines")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
                kind = type(token).__name__.removesuffix("Token").lower()
                line = token.start_mark.line + 1
                raise BadInput(f"{path}: line {line}: {kind}s are not read; write plain values")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > DEEPEST:
                raise BadInput(f"{path}: is nested over {DEEPEST} deep; write plain values")
        content = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BadInput(f"{path}: is not a mapping; write `key: value` lines")
    for keys in _keys(node):
        for key in keys:
            if keys.count(key) > 1:
                raise BadInput(f"{path}: {key}: is given twice; keep one")
    return content


def _keys(node: Any) -> Iterator[list[str]]:
    """The keys of each mapping in a YAML node, at any depth."""
    within = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        yield [key.value for key, _ in within]
        within = [value for _, value in within]
    for each in within:
        yield from _keys(each)


def _bare(kind: Any) -> Any:
    """A type without the ``None`` that may stand in its place."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _flag_type(field: FieldInfo) -> Any:
    kind = _bare(field.annotation)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return types.GenericAlias(list, (item if isinstance(item, type) else str,))
    if typing.get_origin(kind) is typing.Literal:
        return str  # pydantic checks it, with the same sentence as for a file
    return kind


def _option(name: str, field: FieldInfo) -> Any:
    shown = field.default
    if isinstance(shown, tuple):
        shown = " ".join(map(str, shown))
    default = "" if shown in (None, "") or field.is_required() else f" [default: {shown}]"
    return typer.Option(
        f"--{name.replace('_', '-')}"
        + (f"/--no-{name.replace('_', '-')}" if field.annotation is bool else ""),
        help=(field.description or "") + default,
        show_default=False,
    )
