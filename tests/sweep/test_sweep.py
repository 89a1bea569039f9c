"""The sweep as tests, a class each: `pytest -n0 -m sweep tests/sweep`.

Classes that were swept with the installed versions are taken from results.jsonl; `python tests/sweep --again` is anew.
"""

import pytest

from sweep import results

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]


def swept(name: str) -> results.Line:
    from sweep.run import sweep_one

    line = results.read().get(name)
    return line if line is not None and results.is_done(line) else sweep_one(name)


@pytest.mark.parametrize("name", results.read())
def test_a_pipeline_class_works_or_is_refused(name):
    line = swept(name)
    assert line["outcome"] != "WRONG", line["words"]
    assert line["outcome"] == "works" or line["words"]


def test_every_class_of_diffusers_has_a_result():
    """A class that came with another version of diffusers is swept here, and has a test of its own the next time."""
    from sweep.classes import pipeline_classes

    new = {name: swept(name) for name in pipeline_classes() if name not in results.read()}
    assert not [name for name, line in new.items() if line["outcome"] == "WRONG"]
