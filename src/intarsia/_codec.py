"""Frozen dataclasses <-> JSON, by registered name, strict in both directions.

Every specification that goes into a file (a method, a patch, a form, a card, a recipe) is a frozen dataclass registered
under a public name.  `encode` writes `{"type": name, field: value, ...}`; `decode` accepts exactly that and nothing
else: an unknown type or field, a missing field, a value of another type is a `SpecError` that says where.

    @register("low-rank")
    @dataclass(frozen=True, slots=True)
    class LowRank:
        rank: int
        scale: float = 1.0

    encode(LowRank(8))                                     {"type": "low-rank", "rank": 8}
    decode({"type": "low-rank", "rank": "eight"})          SpecError: $.rank: expected int, found str 'eight'

Fields may be `int`, `float`, `bool`, `str`, `None`, `Literal`, `tuple`, `Mapping[str, ...]`, unions of those, registered
dataclasses, a base class or runtime-checkable Protocol of registered dataclasses, and `object` for a plain value (see `plain`).

**A field equal to its default is left out.**  So a field added later, with a default, changes neither the encoding nor the
digest of what exists.  The price: a default belongs to the format; to change one, register the class under a new name.

What is not here: reading files, tensors.  Nothing in this module imports what a file names: a name is looked up among
registered classes (and among the entry points `intarsia.spec` of installed packages), never imported or evaluated.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, overload

from intarsia._registry import Registry
from intarsia.errors import IntarsiaError, SpecError, listing, nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)

MAX_DEPTH = 32
"""Containers within containers; a specification needs about eight."""
MAX_NODES = 200_000
"""Values in one encoded object."""
MAX_STRING = 1_000_000
"""Characters in one string."""
INT_RANGE = (-(2**63), 2**64 - 1)
"""Integers every reader can hold; the upper end leaves room for random seeds."""

specs: Registry[type] = Registry("spec")
_NAMES: dict[type, str] = {}
_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a frozen dataclass storable under `name`.

    Raises:
        SpecError: the name is taken or malformed, the class is not a frozen dataclass, or a field is called `type`.
    """

    def add(cls: C) -> C:
        if not _NAME.fullmatch(name):
            raise SpecError(f"cannot register {cls.__name__} as {name!r}: a name is lower case, [a-z][a-z0-9_.-]*, at most 64 characters")
        if not (dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen):  # noqa: B009
            raise SpecError(f"cannot register {cls.__name__} as {name!r}: it is not a frozen dataclass; write @dataclass(frozen=True) below @register")
        if any(f.name == "type" for f in dataclasses.fields(cls)):
            raise SpecError(f"cannot register {cls.__name__} as {name!r}: the field name 'type' is reserved for the registered name")
        if cls in _NAMES and _NAMES[cls] != name:
            raise SpecError(f"cannot register {cls.__name__} as {name!r}: it is already {_NAMES[cls]!r}")
        specs.add(name, cls)
        _NAMES[cls] = name
        return cls

    return add


def name_of(obj: object) -> str:
    """Registered name of an object or class.

    Raises:
        SpecError: the class itself (not one of its bases) was never registered.
    """
    cls = obj if isinstance(obj, type) else type(obj)
    if cls not in _NAMES:
        raise SpecError(_unregistered(cls))
    return _NAMES[cls]


def encode(obj: object, path: str = "$") -> dict[str, Any]:
    """JSON-able form of a registered dataclass, fields in order of definition, those equal to their default left out.

    Raises:
        SpecError: a value does not fit its field's type, is NaN or infinite, or has no JSON form.
    """
    return _Walk(back=False).dump(obj, path, 0)


@overload
def decode(data: object, expected: None = None, path: str = "$") -> Any: ...
@overload
def decode(data: object, expected: type[T], path: str = "$") -> T: ...
@overload
def decode(data: object, expected: Any, path: str = "$") -> Any: ...
def decode(data: object, expected: Any = None, path: str = "$") -> Any:
    """Inverse of `encode`.

    Args:
        data: what `json.loads` returned.
        expected: a registered class, a base class of registered ones, or any other supported type hint; None for any
            registered dataclass.
        path: where `data` stands, for messages.

    Raises:
        SpecError: see the module's docstring; the message begins with the path of the value.
    """
    walk = _Walk(back=True)
    return walk.load(data, object, path, 0) if expected is None else walk.convert(data, expected, path, 0)


def plain(value: object, path: str = "$") -> Any:
    """Check and normalise a plain value: None, bool, int, float, str, sequences as tuples and mappings with string keys.

    This is what a field annotated `object` may hold; registered dataclasses may not stand in it.

    Raises:
        SpecError: the value is of another type, NaN, infinite, too deep or too large.
    """
    return _Walk(back=True).plain(value, path, 0)


def canonical_json(obj: object) -> bytes:
    """The one UTF-8 text of a registered dataclass or plain value: keys sorted by code point, no white space, floats by `repr`.

    Raises:
        SpecError: as `encode` and `plain`.
    """
    data = encode(obj) if type(obj) in _NAMES else _Walk(back=False).plain(obj, "$", 0)
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def parse_json(text: bytes | str, what: str = "JSON") -> Any:
    """Parse JSON strictly: UTF-8, no duplicate keys, no NaN or infinity, bounded depth.

    Args:
        what: name of the text in messages.

    Raises:
        SpecError: the text is not such JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SpecError(f"{what}: key {_short(twice)} stands twice in one object")
        return found

    def constant(name: str) -> Any:
        raise SpecError(f"{what}: {name} is not a number that can be stored")

    def number(literal: str) -> float:
        value = float(literal)
        return value if math.isfinite(value) else constant(literal)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except UnicodeDecodeError as error:
        raise SpecError(f"{what}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise SpecError(f"{what}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise SpecError(f"{what}: {error}") from None


def _unregistered(cls: type) -> str:
    return (
        f"{cls.__module__}.{cls.__qualname__} cannot be stored: it has no registered name; "
        "write @register('name') above the frozen dataclass"
    )


def _lookup(name: object) -> Any:
    """The class registered under a name, None for an unknown one."""
    return specs[name] if isinstance(name, str) and name in specs else None


class _Field(typing.NamedTuple):
    """One field of a registered class, its type hint resolved, its default as JSON text (None: it has none)."""

    name: str
    hint: Any
    default: str | None


@functools.cache
def _fields(cls: Any) -> tuple[_Field, ...]:
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # a name known to type checkers only, a misspelt one: any failure is the class author's
        raise SpecError(f"the type hints of {cls.__module__}.{cls.__qualname__} cannot be resolved: {error}") from error
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        hint, path = hints[field.name], f"default of {cls.__qualname__}.{field.name}"
        default: object = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = None if default is dataclasses.MISSING else _text(_Walk(back=False).convert(default, hint, path, 0))
        found.append(_Field(field.name, hint, text))
    return tuple(found)


def _text(data: object) -> str:
    """JSON text, by which encoded values are compared: there 1, 1.0 and true differ."""
    return json.dumps(data, sort_keys=True)


class _Walk:
    """One pass over a value, guided by type hints: dataclasses to JSON, or (`back`) JSON to dataclasses."""

    def __init__(self, back: bool) -> None:
        self.back = back
        self.nodes = 0

    def step(self, path: str, depth: int) -> None:
        """Count one value."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError(f"{path}: more than {MAX_NODES:,} values in one specification")
        if depth > MAX_DEPTH:
            raise SpecError(f"{path}: nested more than {MAX_DEPTH} levels deep")

    def dump(self, obj: Any, path: str, depth: int) -> dict[str, Any]:
        """A registered dataclass as a dictionary."""
        self.step(path, depth)
        cls: Any = type(obj)
        if cls not in _NAMES:
            raise SpecError(f"{path}: {_unregistered(cls)}")
        out: dict[str, Any] = {"type": _NAMES[cls]}
        for field in _fields(cls):
            value = self.convert(getattr(obj, field.name), field.hint, f"{path}.{field.name}", depth + 1)
            if field.default is None or _text(value) != field.default:
                out[field.name] = value
        return out

    def load(self, data: object, base: Any, path: str, depth: int) -> Any:
        """A dictionary as an object of the registered class it names, which must be `base` or derive from it."""
        self.step(path, depth)
        if not isinstance(data, dict):
            raise SpecError(f"{path}: expected {_describe(base)}, found {_found(data)}")
        name = data.get("type")
        if not isinstance(name, str):
            raise SpecError(f"{path}: expected {_describe(base)}; the key 'type' is missing or not a string")
        cls = _lookup(name)
        if cls is None or _NAMES.get(cls) != name or not issubclass(cls, base):
            fitting = [known for known, other in specs.items() if issubclass(other, base)]
            problem = "unknown type" if cls is None else f"expected {_describe(base)}, found type"
            raise SpecError(f"{path}: {problem} {_short(name)}{nearest(name[:100], fitting)} (known here: {listing(fitting, 12)})")
        fields = {field.name: field for field in _fields(cls)}
        for key in data:
            if key != "type" and key not in fields:
                raise SpecError(f"{path}: {name!r} has no field {_short(key)}{nearest(str(key)[:100], fields)} (fields: {listing(fields, 20)})")
        missing = [field.name for field in fields.values() if field.default is None and field.name not in data]
        if missing:
            raise SpecError(f"{path}: {name!r} lacks the field {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        values = {key: self.convert(data[key], fields[key].hint, f"{path}.{key}", depth + 1) for key in fields if key in data}
        try:
            return cls(**values)
        except (IntarsiaError, ValueError, TypeError) as error:
            raise SpecError(f"{path}: {name!r}: {error}") from error

    def convert(self, value: Any, hint: Any, path: str, depth: int) -> Any:
        """One value of a field annotated `hint`."""
        hint = getattr(hint, "__supertype__", hint)
        if hint is Any or hint is object:
            return self.plain(value, path, depth)
        members = _members(hint)
        if len(members) > 1:
            return self.union(value, members, path, depth)
        if not self.fits(value, hint):
            hint_text = _describe(hint)
            known = [v for v in typing.get_args(hint) if isinstance(v, str)] if typing.get_origin(hint) is Literal else []
            raise SpecError(f"{path}: expected {hint_text}, found {_found(value)}{nearest(value[:100], known) if isinstance(value, str) else ''}")
        origin = typing.get_origin(hint)
        if origin is tuple:
            return self.sequence(value, typing.get_args(hint), path, depth)
        if origin in _MAPPINGS:
            inner = typing.get_args(hint)[1]
            return self.mapping(value, lambda item, where: self.convert(item, inner, where, depth + 1), path, depth)
        if hint in (None, type(None), bool, int, float, str) or origin is Literal:
            self.step(path, depth)
            return _scalar(_float(value, path) if hint is float else value, path)
        return self.load(value, hint, path, depth) if self.back else self.dump(value, path, depth)

    def union(self, value: Any, members: tuple[Any, ...], path: str, depth: int) -> Any:
        """A value of one of several types; an int is a float only where no int is allowed."""
        fitting = [m for m in members if self.fits(value, m)]
        exact = [m for m in fitting if not (m is float and type(value) is int)] or fitting
        classes = [m for m in exact if _is_class(m)]
        if self.back and classes and isinstance(value, dict):
            return self.choose(value, classes, path, depth)
        if not exact:
            raise SpecError(f"{path}: expected {' or '.join(_describe(m) for m in members)}, found {_found(value)}")
        for member in exact[:-1]:
            try:
                return self.convert(value, member, path, depth)
            except SpecError:
                continue
        return self.convert(value, exact[-1], path, depth)

    def choose(self, value: dict[str, Any], classes: list[type], path: str, depth: int) -> Any:
        """A dictionary where dataclasses of several families may stand: the named type decides."""
        name = value.get("type")
        cls = _lookup(name)
        for base in classes:
            if cls is not None and issubclass(cls, base):
                return self.load(value, base, path, depth)
        fitting = [known for known, other in specs.items() if issubclass(other, tuple(classes))]
        raise SpecError(
            f"{path}: expected {' or '.join(_describe(c) for c in classes)}, found type {_short(name)}"
            f"{nearest(str(name)[:100], fitting)} (known here: {listing(fitting, 12)})"
        )

    def fits(self, value: Any, hint: Any) -> bool:
        """Whether a value has the outer shape of `hint`; what it contains is looked at later."""
        origin = typing.get_origin(hint)
        if origin is Literal:
            return any(type(value) is type(v) and value == v for v in typing.get_args(hint))
        if origin is tuple:
            return isinstance(value, list if self.back else tuple)
        if origin in _MAPPINGS:
            return isinstance(value, Mapping)
        if hint is None or hint is type(None):
            return value is None
        if hint is float:
            return isinstance(value, float) or type(value) is int
        if hint in (bool, int, str):
            return type(value) is hint
        if hint is Any or hint is object:
            return True
        if not _is_class(hint):
            raise SpecError(
                f"a field annotated {hint!r} cannot be stored: use int, float, bool, str, None, Literal, tuple[...], "
                "Mapping[str, ...], object for plain values, a registered dataclass, a base class or runtime-checkable Protocol "
                "of registered dataclasses, or a union of these"
            )
        return isinstance(value, dict) if self.back else isinstance(value, hint)

    def sequence(self, value: Any, args: tuple[Any, ...], path: str, depth: int) -> Any:
        """`tuple[X, ...]` or a tuple of fixed length."""
        self.step(path, depth)
        if len(args) == 2 and args[1] is Ellipsis:
            hints: tuple[Any, ...] = (args[0],) * len(value)
        else:
            hints = args
        if len(hints) != len(value):
            raise SpecError(f"{path}: expected {len(hints)} values, found {len(value)}")
        items = [self.convert(v, h, f"{path}[{i}]", depth + 1) for i, (v, h) in enumerate(zip(value, hints))]
        return tuple(items) if self.back else items

    def mapping(self, value: Mapping[Any, Any], inner: Callable[[Any, str], Any], path: str, depth: int) -> dict[str, Any]:
        """A mapping with string keys."""
        self.step(path, depth)
        for key in value:
            if type(key) is not str:
                raise SpecError(f"{path}: keys are strings, found {_found(key)}")
            _scalar(key, path)
        return {key: inner(value[key], _join(path, key)) for key in value}

    def plain(self, value: Any, path: str, depth: int) -> Any:
        """A value without dataclasses."""
        self.step(path, depth)
        if value is None or type(value) in (bool, int, str) or isinstance(value, float):
            return _scalar(float(value) if isinstance(value, float) else value, path)
        if isinstance(value, (list, tuple)):
            items = [self.plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
            return tuple(items) if self.back else items
        if isinstance(value, Mapping):
            return self.mapping(value, lambda item, where: self.plain(item, where, depth + 1), path, depth)
        raise SpecError(f"{path}: expected a plain value (None, bool, int, float, str, list or mapping), found {_found(value)}")


_MAPPINGS = (dict, typing.get_origin(typing.Mapping[str, int]))


def _members(hint: Any) -> tuple[Any, ...]:
    """Types of a union, or the hint alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(m for arg in typing.get_args(hint) for m in _members(getattr(arg, "__supertype__", arg)))
    return (hint,)


def _is_class(hint: Any) -> bool:
    """Whether a hint is a class of specifications (registered, or a base of registered ones)."""
    scalar = (bool, int, float, str, type(None), object, bytes, list, tuple, dict, set, frozenset)
    if not isinstance(hint, type) or typing.get_origin(hint) is not None or hint in scalar:
        return False
    try:
        issubclass(_Walk, hint)
    except TypeError:  # a Protocol that is not runtime-checkable, or has more than methods
        return False
    return True


def _float(value: float, path: str) -> float:
    """The number of a float field, where an integer may stand that a float holds exactly."""
    if type(value) is int and abs(value) > 2**53:
        raise SpecError(f"{path}: expected float, found an integer beyond 2**53, which a float cannot hold exactly")
    return float(value)


def _scalar(value: Any, path: str) -> Any:
    """Refuse what JSON readers cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{path}: {value} is not a number that can be stored")
    if type(value) is int and not INT_RANGE[0] <= value <= INT_RANGE[1]:
        raise SpecError(f"{path}: the integer does not fit 64 bits")
    if isinstance(value, str):
        if len(value) > MAX_STRING:
            raise SpecError(f"{path}: a string of {len(value):,} characters; the limit is {MAX_STRING:,}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SpecError(f"{path}: the string is not valid Unicode at character {error.start} (lone surrogate)") from None
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if key.isidentifier() and len(key) <= 60 else f"{path}[{_short(key)}]"


def _short(value: object) -> str:
    """`repr`, cut for messages."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _found(value: object) -> str:
    """What was found, for messages: type and beginning of its text; containers by size."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"{kind} with {len(value)} keys"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"{kind} of {len(value)}"
    return f"{kind} {_short(value)}"


def _describe(hint: Any) -> str:
    """A type hint in words."""
    if hint is None or hint is type(None):
        return "None"
    if hint is object:
        return "a registered object"
    if typing.get_origin(hint) is Literal:
        values = [_short(v) for v in typing.get_args(hint)]
        return values[0] if len(values) == 1 else f"one of {listing(values, 20)}"
    if typing.get_origin(hint) is tuple:
        items = [_describe(h) for h in typing.get_args(hint) if h is not Ellipsis]
        return f"a tuple of {items[0]}" if Ellipsis in typing.get_args(hint) else f"a tuple ({', '.join(items)})"
    if len(_members(hint)) > 1:
        return " or ".join(_describe(m) for m in _members(hint))
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    if hint in _NAMES:
        return f"{{'type': {_NAMES[hint]!r}, ...}}"
    return getattr(hint, "__name__", str(hint))
