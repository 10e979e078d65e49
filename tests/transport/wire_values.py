"""Any value of a type that travels, drawn from its declaration: a field that is added is covered at once."""

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

# Numbers that arithmetic, clocks and indices stumble over, and all that a msgpack integer can be.
_NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 2**64 - 1]) | st.integers(
    -(2**63), 2**64 - 1
)
_TEXTS = st.sampled_from(["", "a", "../..", "/etc/passwd", "**", "\0", "é\u2028"]) | st.text(max_size=8)


def values_of(kind: Any) -> st.SearchStrategy[Any]:  # noqa: ANN401 a union is no type
    """Values of *kind*, a struct or a union of them."""
    return _drawn(inspect.type_info(kind), {})


_PLAIN: Mapping[type[inspect.Type], st.SearchStrategy[Any]] = {
    inspect.IntType: _NUMBERS,
    inspect.FloatType: st.floats() | st.sampled_from([0.0, -1.0, 1e-300, 1e300]),
    inspect.BoolType: st.booleans(),
    inspect.StrType: _TEXTS,
    inspect.BytesType: st.binary(max_size=8),
    inspect.NoneType: st.none(),
}


def _drawn(kind: inspect.Type, seen: Mapping[type, int]) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType():
            return _struct(kind, seen)
        case inspect.UnionType(types=types):
            return st.one_of(*(_drawn(one, seen) for one in types))
        case inspect.CollectionType(item_type=item):
            return st.lists(_drawn(item, seen), max_size=2).map(_MAKERS[type(kind)])
        case inspect.TupleType(item_types=items):
            return st.tuples(*(_drawn(item, seen) for item in items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_drawn(key, seen), _drawn(value, seen), max_size=2)
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
    return _PLAIN[type(kind)]


_MAKERS: Mapping[type[inspect.Type], Callable[[list[Any]], object]] = {
    inspect.VarTupleType: tuple,
    inspect.ListType: list,
    inspect.FrozenSetType: frozenset,
}


def _struct(kind: inspect.StructType, seen: Mapping[type, int]) -> st.SearchStrategy[Any]:
    if seen.get(kind.cls, 0) > 1:  # a struct that holds itself ends somewhere
        return st.nothing()
    deeper = {**seen, kind.cls: seen.get(kind.cls, 0) + 1}
    needed = {f.name: _drawn(f.type, deeper) for f in kind.fields if f.required}
    others = {f.name: _drawn(f.type, deeper) for f in kind.fields if not f.required}
    return st.fixed_dictionaries(needed, optional=others).map(lambda values: kind.cls(**values))
