"""States become flat names and come back."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.runtime.errors import ConfigError
from gossamer.runtime.state import flatten, restore


@dataclass
class Inner:
    m: torch.Tensor
    count: int = 0


@dataclass
class Outer:
    x: torch.Tensor
    inner: Inner | None = None
    parts: list[Any] = field(default_factory=list)
    table: dict[str, Any] = field(default_factory=dict)
    pair: tuple[Any, ...] = ()
    rate: float = 0.5
    flag: bool = True
    name: str | None = None


def state(value=1.0):
    def full():
        return torch.full((2, 3), value)

    return Outer(
        x=full(),
        inner=Inner(full(), count=int(value)),
        parts=[full(), Inner(full())],
        table={"a": full(), "b": 3},
        pair=(full(), Inner(full())),
        name="text",
    )


def test_names_are_the_path_through_the_state():
    tensors, scalars = flatten(state())
    assert set(tensors) == {
        *("x", "inner.m", "parts.0", "parts.1.m", "table.a", "pair.0", "pair.1.m"),
    }
    counts = {"inner.count": 1, "parts.1.count": 0, "pair.1.count": 0}
    assert scalars == counts | {"table.b": 3, "rate": 0.5, "flag": True, "name": "text"}


def test_restoring_copies_into_the_memory_that_is_there():
    saved = flatten(state(4.0))
    fresh = state(0.0)
    addresses = {name: t.data_ptr() for name, t in flatten(fresh)[0].items()}
    restore(fresh, *saved)
    assert {name: t.data_ptr() for name, t in flatten(fresh)[0].items()} == addresses
    assert all(bool((t == 4).all()) for t in flatten(fresh)[0].values())
    assert fresh.inner.count == 4


@settings(max_examples=50, deadline=None)
@given(
    value=st.recursive(
        st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(), st.none()),
        lambda children: st.lists(children) | st.dictionaries(st.sampled_from("abcde"), children),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, list | dict))
)
def test_any_nest_of_numbers_comes_back(value):
    tensors, scalars = flatten(value)
    assert tensors == {}
    restore(value, {}, dict(scalars))
    assert flatten(value)[1] == scalars


def test_a_missing_name_is_another_algorithm():
    tensors, scalars = flatten(state())
    del tensors["parts.1.m"]
    with pytest.raises(ConfigError, match=r"no 'parts\.1\.m'.*configuration of its run"):
        restore(state(), tensors, scalars)


def test_a_missing_number_is_another_algorithm():
    tensors, scalars = flatten(state())
    del scalars["inner.count"]
    with pytest.raises(ConfigError, match=r"no 'inner\.count'"):
        restore(state(), tensors, scalars)


@pytest.mark.parametrize("other", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)])
def test_another_shape_or_dtype_is_another_model(other):
    tensors, scalars = flatten(state())
    with pytest.raises(ConfigError, match=r"'x' is .*in the checkpoint and \(2, 3\)"):
        restore(state(), tensors | {"x": other}, scalars)


def test_a_field_that_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match="inner is object"):
        flatten(Outer(torch.zeros(1), inner=object()))


def test_numbers_in_a_tuple_come_back_too():
    given, fresh = Outer(torch.zeros(1), pair=(3, 4)), Outer(torch.zeros(1), pair=(0, 0))
    restore(fresh, *flatten(given))
    assert fresh.pair == (3, 4)


def test_two_fields_of_one_name_are_refused():
    with pytest.raises(TypeError, match=r"two fields are called 'table\.1'"):
        flatten(Outer(torch.zeros(1), table={1: 2, "1": 3}))


def test_a_tensor_made_at_the_first_step_comes_back_where_none_was():
    given, fresh = Outer(torch.zeros(1), table={"m": torch.ones(3)}), Outer(torch.zeros(1))
    fresh.table = {"m": None}
    restore(fresh, *flatten(given))
    assert fresh.table["m"].tolist() == [1, 1, 1]


def test_none_comes_back_where_a_tensor_was():
    given, fresh = Outer(torch.zeros(1), table={"m": None}), Outer(torch.zeros(1))
    fresh.table = {"m": torch.ones(3)}
    restore(fresh, *flatten(given))
    assert fresh.table["m"] is None


def test_a_number_where_a_tensor_belongs_is_another_algorithm():
    given = Outer(torch.zeros(1), table={"m": 3})
    fresh = Outer(torch.zeros(1), table={"m": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"'table\.m'"):
        restore(fresh, *flatten(given))
