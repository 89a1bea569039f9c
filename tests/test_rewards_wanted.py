"""What is asked for: arguments, columns and prompts, and what is said when nothing is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.objects.targets import (
    absent_for,
    counts_for,
    counts_from,
    known_name,
    names_from,
    present_for,
)

names = st.sampled_from(["dog", "red apple", "cell phone", "fox"])


@given(st.dictionaries(names, st.integers(0, 24), min_size=1))
def test_a_mapping_and_its_json_are_the_same(counts):
    assert counts_from(counts, "here") == counts_from(json.dumps(counts), "here") == counts
    assert counts_for("any prompt", {"count": counts}) == counts_for("", {"count": json.dumps(counts)}) == counts


@given(st.lists(names, min_size=1, unique=True))
def test_a_list_its_json_and_commas_are_the_same(listed):
    assert names_from(listed, "here") == names_from(json.dumps(listed), "here") == names_from(", ".join(listed), "here")
    assert names_from(listed, "here") == listed


def test_names_are_tidied():
    assert counts_from({"  Red  Apple": "two", "dog": 3.0}, "here") == {"red apple": 2, "dog": 3}
    assert names_from("Dog, dog,  Cat", "here") == ["dog", "cat"]
    assert counts_from("two dogs and a cat", "here") == {"dog": 2, "cat": 1}


@pytest.mark.parametrize(
    "value", [{}, "dog", "", {"dog": -1}, {"dog": 1.5}, {"dog": True}, {"dog": 25}, {"": 1}, {3: 1}, 2]
)
def test_no_counts(value):
    with pytest.raises(RewardError, match="needed"):
        counts_from(value, "here")


@pytest.mark.parametrize("value", [[], "", ["dog", ""], [3], 3, "dog,,cat"])
def test_no_names(value):
    with pytest.raises(RewardError, match="needed"):
        names_from(value, "here")


def test_broken_json_is_shown():
    with pytest.raises(RewardError, match="is not JSON"):
        counts_for("", {"count": "{'dog': 2}"})
    with pytest.raises(RewardError, match="is not JSON"):
        present_for("", {"contains": "[dog"})


@pytest.mark.parametrize("count", ["two", "2", 2, 2.0, " Two "])
def test_a_number_goes_with_the_subject(count):
    assert counts_for("a dog", {"subject": "fox", "count": count}) == {"fox": 2}
    with pytest.raises(RewardError, match="how many of what"):
        counts_for("a dog", {"count": count})


def test_a_column_goes_before_the_prompt_and_none_is_no_column():
    assert counts_for("two dogs", {"count": {"cat": 1}}) == {"cat": 1}
    assert counts_for("two dogs", {"count": None, "subject": None}) == {"dog": 2}
    assert present_for("two dogs", {"contains": "cat", "subject": "fox"}) == ["cat"]
    assert present_for("two dogs", {"contains": None, "subject": "fox"}) == ["fox"]
    assert present_for("two dogs and some cats without collars", {}) == ["dog", "cat"]
    assert absent_for("two dogs", {"without": ["person"], "subject": "dog"}) == ["person"]
    assert absent_for("a street without cars or people", {}) == ["car", "person"]


def test_only_what_has_a_number_is_counted():
    assert counts_for("two dogs and some cats, no birds", {}) == {"dog": 2, "bird": 0}


@pytest.mark.parametrize(("read", "name"), [(counts_for, "count"), (present_for, "contains"), (absent_for, "without")])
def test_where_nothing_says_it_the_three_ways_are_shown(read, name):
    with pytest.raises(RewardError, match=rf"{name} finds no .* three ways.*{name}\(.*column '{name}'.*own words"):
        read("a lovely evening", {"background": "red"})


def test_a_name_that_a_detector_never_learnt():
    assert known_name("anything at all", None, "x") == "anything at all"
    assert known_name("red foxes", ("fox", "dog"), "x") == "fox"
    with pytest.raises(RewardError, match="'x' knows no 'fxo'; did you mean fox"):
        known_name("fxo", ("fox", "dog"), "x")
    with pytest.raises(RewardError, match="it knows: dog, fox"):
        known_name("zeppelin", ("fox", "dog"), "x")
