"""One class in a process of its own, with a time limit: a hang or a crash is that class's result."""

import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from sweep import results
from sweep.checks import NOT_REACHED, WRONG, Result, check
from sweep.classes import pipeline_classes, why_not

LIMIT = 900
"""Seconds for a class; a few draw a million pixels, whatever they are asked for."""


def sweep_one(name: str) -> results.Line:
    """Sweep a class and keep its result."""
    kind = pipeline_classes()[name]
    began = time.monotonic()
    reason = why_not(kind)
    line = {"name": name, "outcome": "out of scope", "words": reason, "checks": [], "notes": []} if reason else {}
    line = line or _apart(name)
    line |= {"versions": results.versions(), "seconds": round(time.monotonic() - began, 1)}
    results.write({**results.read(), name: line})
    return line


def _apart(name: str) -> results.Line:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT):
            return ours.recv()
        return Result(name, NOT_REACHED, f"not done after {LIMIT} s").as_dict()
    except EOFError:
        process.join()
        return Result(name, WRONG, f"its process ended with code {process.exitcode}").as_dict()
    finally:
        process.kill()
        process.join()


def _child(name: str, answer: Connection) -> None:
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    answer.send(check(pipeline_classes()[name]).as_dict())
    answer.close()
