"""The page of the documentation about pipelines is made from the results of the sweep, and says what they say."""

import re

from sweep import results

LINES = results.read()
PAGE = results.PAGE.read_text(encoding="utf-8")


def test_the_page_is_that_of_the_results():
    assert results.page(LINES) == PAGE


def test_the_sweep_went_far_and_nothing_is_wrong_in_silence():
    found = results.counts(LINES)
    attempted = found["works"] + found["refused"] + found["cannot be built"] + found["WRONG"]
    assert attempted >= 120
    assert set(found) <= set(results.OUTCOMES)
    assert all(line["words"] for line in LINES.values() if line["outcome"] not in ("works", "not reached"))


def test_every_class_stands_on_the_page_once():
    listed = re.findall(r"^\| (\w+) \|", PAGE, re.MULTILINE)
    assert sorted(set(listed) - {"class"}) == sorted(LINES)


def test_what_works_was_checked():
    for line in LINES.values():
        if line["outcome"] == "works":
            assert {"pictures", "adapter file", "align"} <= set(line["checks"]), line["name"]
            assert any(check.startswith("gradient") for check in line["checks"]), line["name"]
