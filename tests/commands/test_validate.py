"""What a configuration gives to the parts it names is checked against their signatures and type hints."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bae.commands.cli import UserError
from bae.commands.validate import check_options, check_parts, describe, find_target, parts


def function(
    count: int,
    share: float = 0.5,
    flag: bool = False,
    name: str = "",
    limit: int | None = None,
    kind: Literal["a", "b"] = "a",
    sizes: Sequence[int] = (),
    pair: tuple[float, float] = (0.9, 0.999),
    table: Mapping[str, float] | None = None,
    rule: Callable[[int], int] | None = None,
    weights: Tensor | None = None,
    untyped=None,
) -> None:
    """Take one option of each type."""


class Part:
    """Take options by its constructor, as most parts do."""

    def __init__(self, every: int, folder: str = "x") -> None: ...


def takes_more(count: int, **more: Any) -> None:
    """Take any options."""


def takes_strange(x: "NoSuchName", count: int = 1) -> None:  # noqa: F821
    """Have a hint that only a type checker could find."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 3, "share": 0.25, "flag": True, "name": "text", "limit": 5, "kind": "b"},
        {"share": 1, "limit": None},  # a whole number is a number
        {"sizes": [1, 2], "pair": [0.9, 0.999], "table": {"x": 1, "y": 0.5}},
        {"sizes": [], "table": None},
        {"rule": "anything", "weights": 3, "untyped": object()},  # not made of plain types: the part itself decides
    ],
)
def test_options_that_fit(options):
    check_options("part", function, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "abc"}, "part.count=abc: must be a whole number"),
        ({"count": 1.5}, "part.count=1.5: must be a whole number"),
        ({"count": None}, "part.count=None: must be a whole number"),
        ({"count": True}, "part.count=True: must be a whole number"),
        ({"share": "much"}, "part.share=much: must be a number"),
        ({"flag": "maybe"}, "part.flag=maybe: must be true or false"),
        ({"flag": 1}, "part.flag=1: must be true or false"),
        ({"name": 3}, "part.name=3: must be a text"),
        ({"limit": "x"}, "part.limit=x: must be a whole number or null"),
        ({"kind": "c"}, "part.kind=c: must be one of a, b"),
        ({"sizes": 3}, "part.sizes=3: must be a list, each a whole number"),
        ({"sizes": [1, "x"]}, "part.sizes=[1, 'x']: must be a list, each a whole number"),
        ({"pair": [0.9]}, "part.pair=[0.9]: must be a list, each a number"),
        ({"table": [1]}, "part.table=[1]: must be a mapping or null"),
        ({"shape": 1}, "there is no key part.shape; did you mean share?"),
        ({"zzz": 1}, "there is no key part.zzz; there are count, share, flag"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        check_options("part", function, options)
    assert "\n" not in str(refused.value)


def test_classes_and_partials_are_judged_as_functions_are():
    check_options("part", Part, {"every": 3})
    with pytest.raises(UserError, match=r"there is no key part\.evry; did you mean every"):
        check_options("part", Part, {"evry": 3})
    with pytest.raises(UserError, match=r"part\.every=abc: must be a whole number"):
        check_options("part", Part, {"every": "abc"})
    check_options("part", partial(function, 1), {"share": 0.5})


def test_what_tells_nothing_of_its_options_refuses_nothing():
    check_options("part", takes_more, {"count": 1, "any": "thing"})
    check_options("part", dict, {"anything": 1})  # a built-in one without a signature
    check_options("part", takes_strange, {"x": "abc", "count": "abc"})  # hints that cannot be found
    with pytest.raises(UserError, match=r"no key part\.y"):
        check_options("part", takes_strange, {"y": 1})  # but its names are known
    with pytest.raises(UserError, match=r"part\.count=abc"):
        check_options("part", takes_more, {"count": "abc"})


def test_an_option_that_is_a_part_itself_is_left_to_its_own_check():
    inner = {"_target_": "bae.method.baselines.group_mean", "_partial_": True}
    check_options("part", function, {"name": inner, "sizes": [inner], "table": {"x": inner}})


TREE = {
    "a": {"_target_": "bae.method.baselines.MonteCarlo", "rollouts": 2},
    "b": {"c": [{"_target_": "bae.objectives.rao_blackwell.RaoBlackwell",
                 "text": {"_target_": "bae.method.baselines.leave_one_out", "_partial_": True}}]},
    "d": 3,
}  # fmt: skip


def test_every_part_is_found_with_its_path():
    assert [path for path, _ in parts(TREE, "")] == ["a", "b.c.0", "b.c.0.text"]
    assert [path for path, _ in parts(TREE, "run.")] == ["run.a", "run.b.c.0", "run.b.c.0.text"]
    check_parts(TREE)


def test_the_first_wrong_part_is_named():
    wrong = {**TREE, "b": {"c": [TREE["b"]["c"][0] | {"all_acton": True}]}}
    with pytest.raises(UserError, match=r"there is no key b\.c\.0\.all_acton; did you mean all_action"):
        check_parts(wrong)
    with pytest.raises(UserError, match=r"there is no key run\.b\.c\.0\.all_acton"):
        check_parts(wrong, "run.")


@pytest.mark.parametrize("target", ["no_such_module.thing", "bae.method.baselines.grup_mean", "bae..x", "3", ""])
def test_what_cannot_be_imported_is_one_sentence(target):
    with pytest.raises(UserError, match=r"baseline\._target_=.*: cannot be imported") as refused:
        find_target("baseline", target)
    assert "\n" not in str(refused.value)


def test_a_module_of_the_users_that_fails_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "my_broken_study.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"task\._target_=my_broken_study\.Task: cannot be imported") as refused:
        check_parts({"task": {"_target_": "my_broken_study.Task"}})
    assert "\n" not in str(refused.value)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))


@given(VALUES)
def test_a_plain_value_fits_exactly_the_hints_of_its_type(value):
    """A whole number is also a number; true and false are no numbers; null is a value of its own."""
    fits = {"count": type(value) is int, "share": type(value) in (int, float), "flag": type(value) is bool,
            "name": type(value) is str, "limit": value is None or type(value) is int, "untyped": True}  # fmt: skip
    for key, wanted in fits.items():
        if wanted:
            check_options("part", function, {key: value})
        else:
            with pytest.raises(UserError, match=rf"part\.{key}="):
                check_options("part", function, {key: value})


@given(st.lists(VALUES, max_size=4))
def test_a_list_fits_if_each_of_its_values_does(values):
    if all(type(value) is int for value in values):
        check_options("part", function, {"sizes": values})
    elif None in values:  # texts of digits are read as numbers inside a list, so other values may fit
        with pytest.raises(UserError, match=r"part\.sizes="):
            check_options("part", function, {"sizes": values})


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (int | None, "a whole number or null"),
        (Literal["a", "b"], "one of a, b"),
        (list[float], "a list, each a number"),
        (tuple[int, ...], "a list, each a whole number"),
        (dict[str, int], "a mapping"),
        (float | str | None, "a number or a text or null"),
        (Sequence[str] | str, "a list, each a text or a text"),
        (Tensor, "another value"),
    ],
)
def test_hints_in_words(hint, words):
    assert describe(hint) == words
