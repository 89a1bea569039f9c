"""The sweep: every pipeline class of the installed diffusers that draws pictures from text, tried as a miniature.

    python tests/sweep                        # what is not done yet with the installed versions
    python tests/sweep 'Flux.*' --again       # classes by pattern, anew
    python tests/sweep --page                 # only docs/pipelines.md, from the results that are there
    pytest -n0 -m sweep tests/sweep  # the same as tests, a class each

Nothing is downloaded. Each class has a process of its own and a time limit, and its result is kept in results.jsonl at
once, so that a run can be stopped and goes on where it was.

- classes.py: which classes, and the arguments of their calls
- recipes.py, networks.py, parts.py: small settings, as data
- build.py: a class -> a miniature, from the type hints of its `__init__`
- checks.py: pictures, gradients, adapter file, a step of `align`, against references without the package
- run.py, results.py: one class apart; results and the page
"""
