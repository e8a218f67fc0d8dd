from __future__ import annotations

import json

from disthess.store.fingerprint import differences

OLD = {
    "loss": "mse",
    "parameters": [{"name": "w", "shape": [2, 3]}, {"name": "b", "shape": [2]}],
    "data": {"sha": "aa", "sizes": [1, 2, 3, 4, 5, 6]},
    "flag": True,
}


def test_the_same_problem_has_no_differences_after_json() -> None:
    assert differences(json.loads(json.dumps(OLD)), {**OLD, "data": {"sha": "aa", "sizes": (1, 2, 3, 4, 5, 6)}}) == []


def test_every_difference_is_named() -> None:
    new = {
        "parameters": [{"name": "w", "shape": [2, 4]}, {"name": "c", "shape": [2]}],
        "data": {"sha": "bb", "sizes": [1, 2, 3, 4, 5, 7], "more": 1},
        "flag": 1,
    }
    assert differences(OLD, new) == [
        "data: more is in this problem (1) and not in the store",
        "data: sha is 'bb', the store has 'aa'",
        "data: sizes[5] is 7, the store has 6",
        "flag is 1, the store has True",
        "loss is in the store ('mse') and not in this problem",
        "parameters[0]: shape is [2, 4], the store has [2, 3]",
        "parameters[1]: name is 'c', the store has 'b'",
    ]


def test_another_number_of_entries_is_said() -> None:
    assert differences({"p": [{"a": 1}]}, {"p": [{"a": 1}, {"a": 2}]}) == ["p has 2 entries, the store has 1"]


def test_many_differences_are_counted() -> None:
    found = differences({str(i): i for i in range(50)}, {str(i): -i - 1 for i in range(50)})
    assert len(found) == 13
    assert found[-1] == "and 38 more differences"
