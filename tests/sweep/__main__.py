"""The command `python tests/sweep`; see __init__.py."""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import conftest  # noqa: E402, F401  # offline, one thread

from sweep import results  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Sweep the pipeline classes of diffusers; write docs/pipelines.md.")
    parser.add_argument("pattern", nargs="?", default=".*", help="a regular expression for class names")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--page", action="store_true", help="write the page and sweep nothing")
    chosen = parser.parse_args()
    if not chosen.page:
        from sweep.classes import pipeline_classes
        from sweep.run import sweep_one

        results.write({name: results.not_reached(name) for name in pipeline_classes()} | results.read())
        for name in pipeline_classes():
            if not re.fullmatch(chosen.pattern, name):
                continue
            if not chosen.again and results.is_done(results.read().get(name)):
                continue
            line = sweep_one(name)
            sys.stdout.write(f"{line['outcome']:16} {name} {line['seconds']:.0f} s {line['words'][:300]}\n")
            sys.stdout.flush()
    results.PAGE.parent.mkdir(exist_ok=True)
    results.PAGE.write_text(results.page(results.read()), encoding="utf-8")
    return int(results.counts(results.read())["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
