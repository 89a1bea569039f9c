"""Which steps carry gradient: always a tail, K uniform, drawn once for a trajectory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.config import truncation
from alignprop_pipe.config.truncation import FullBackprop, LastK, RandomLastK, truncation_from_text
from alignprop_pipe.errors import ConfigError

RULES = st.one_of(
    st.just(FullBackprop()),
    st.builds(LastK, st.integers(1, 60)),
    st.builds(lambda low, more: RandomLastK(low, low + more), st.integers(1, 60), st.integers(0, 60)),
    st.builds(RandomLastK, st.integers(1, 60)),
)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@given(rule=RULES, num_steps=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_graded_steps_are_a_tail_that_is_never_empty(rule, num_steps, seed):
    graded = rule.plan(num_steps, seeded(seed))
    assert graded.step == 1
    assert graded.stop == num_steps
    assert 0 <= graded.start < num_steps


@given(rule=RULES)
def test_the_text_gives_the_rule_back(rule):
    assert truncation_from_text(str(rule)) == rule


def test_full_grades_every_step():
    assert FullBackprop().plan(7, seeded()) == range(7)


@pytest.mark.parametrize(("k", "start"), [(1, 6), (3, 4), (7, 0), (8, 0), (1000, 0)])
def test_last_k_is_clipped_to_the_steps_there_are(k, start):
    assert LastK(k).plan(7, seeded()) == range(start, 7)


@pytest.mark.parametrize(
    ("rule", "num_steps", "possible"),
    [
        (RandomLastK(), 10, range(1, 11)),
        (RandomLastK(3), 10, range(3, 11)),
        (RandomLastK(2, 6), 10, range(2, 7)),
        (RandomLastK(4, 40), 10, range(4, 11)),
        (RandomLastK(30, 40), 10, range(10, 11)),
        (RandomLastK(5, 5), 10, range(5, 6)),
    ],
)
def test_k_is_uniform(rule, num_steps, possible):
    generator, draws = seeded(0), 4000
    counts = torch.zeros(num_steps + 1)
    for _ in range(draws):
        counts[len(rule.plan(num_steps, generator))] += 1
    assert counts.sum() == counts[possible.start : possible.stop].sum() == draws
    expected = draws / len(possible)
    chi_square = float(((counts[possible.start : possible.stop] - expected) ** 2 / expected).sum())
    freedom = len(possible) - 1
    # Mean plus four standard deviations of chi-square: one seed in ten thousand would fail, and the seed is fixed.
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5
    mean = float((counts * torch.arange(num_steps + 1)).sum()) / draws
    assert rule.expected(num_steps) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("rule", [FullBackprop(), LastK(4)])
def test_rules_without_chance_draw_nothing(rule):
    generator = seeded(5)
    before = generator.get_state()
    rule.plan(10, generator)
    assert torch.equal(generator.get_state(), before)
    assert rule.expected(10) == len(rule.plan(10, generator))


def test_the_generator_decides():
    first, second, other = ([RandomLastK().plan(50, seeded(s)) for _ in range(3)] for s in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("rule", truncation.RULES, ids=lambda rule: rule.keyword)
def test_every_rule_is_written_as_its_examples(rule):
    for example in rule.examples:
        assert type(truncation_from_text(example)) is rule
        assert str(truncation_from_text(example)) == example


@pytest.mark.parametrize(
    "text", ["", "full:1", "last", "last:", "last:0", "random:", "random:5", "random:3-2", "randomly", "first:3"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError):
        truncation_from_text(text)
