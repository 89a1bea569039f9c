"""Every objective of the paper on the bundled model, each in one command, over three seeds.

    python examples/objectives/objectives.py count         one of them
    python examples/objectives/objectives.py               all of them

Each run trains an adapter and looks at held-out prompts with the same noise before and after: the reward, the judge
that no training sees, and a true measure of what was asked for. Figures go to results.json, pictures to NAME.png, and
README.md is written anew from both.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, drawings, evaluate, parse_reward
from alignprop_pipe.evidence import paired_change
from alignprop_pipe.records import Change, Evidence
from alignprop_pipe.result import AlignResult
from alignprop_pipe.rewards import AttributeJudge

HERE = Path(__file__).parent
ADAPTERS = Path(tempfile.gettempdir()) / "alignprop-objectives"
SEEDS, STEPS, HELD_OUT = (0, 1, 2), 25, 48
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink", "white")
DOGS = [f"{n} on a {c} background" for n in ("one dog", "two dogs", "three dogs", "four dogs") for c in COLOURS]


class SeesDog(AttributeJudge):
    """1.0 where the judge names the subject of a picture a dog."""

    name = "judge_sees_dog"

    def score(self, images: Tensor, prompts: list[str], targets: Any) -> Tensor:
        return images.new_tensor([float(subject == "dog") for subject in self.predict(images)["subject"]])

    def extras(self, images: Tensor, prompts: list[str], targets: Any) -> dict[str, Tensor]:
        return {}


def saturation(images: Tensor) -> Tensor:
    """Mean saturation of a picture, as in HSV: 0 (grey) to 1."""
    highest, lowest = images.amax(dim=1), images.amin(dim=1)
    return ((highest - lowest) / highest.clamp(min=1e-6)).mean(dim=(1, 2))


HERE_IS = Path(__file__).as_posix()
WATCHED = ("emoji_judge", "jpeg", f"{HERE_IS}:saturation")
RIGHT = {"emoji_judge": "right in everything, by the judge"}
NUMBER = {"emoji_judge.count": "right number, by the judge"}
SUBJECT = {"emoji_judge.subject": "right subject, by the judge"}
FILE_SIZE = {"jpeg_kb": "JPEG file, kB"}


@dataclass(frozen=True, slots=True)
class Objective:
    """A reward, what is meant by it, and the measures that say whether it was reached: name -> words.

    `steps` and `held_out` are `STEPS` and `HELD_OUT` where they are not given.
    """

    reward: str
    meant: str
    measures: dict[str, str]
    prompts: Any = "emoji"
    watched: tuple[str, ...] = field(default=WATCHED)
    steps: int | None = None
    held_out: int | None = None


OBJECTIVES = {
    "alignment": Objective("clip", "pictures of what the prompt says", RIGHT),
    "aesthetics": Objective(
        "colour",
        "a stand-in for `aesthetic`, whose network reads photographs: colourfulness after Hasler and Süsstrunk",
        {"saturation": "saturation, 0 to 1"} | RIGHT,
    ),
    "compressibility": Objective("jpeg", "pictures that make small files", FILE_SIZE | RIGHT),
    "incompressibility": Objective("-jpeg", "pictures full of detail, which make large files", FILE_SIZE | RIGHT),
    # The number is what moves slowest: it takes more steps, and more pictures to see it.
    "count": Objective("count", "as many objects as the prompt says", NUMBER | RIGHT, steps=40, held_out=100),
    "presence": Objective("contains", "the object that the prompt names is there", SUBJECT | RIGHT),
    "removal": Objective(
        'without("dog")',
        "no dogs, though every prompt asks for some",
        {"judge_sees_dog": "dogs, by the judge"},
        DOGS,
        (f"{HERE_IS}:SeesDog", *WATCHED[1:]),
    ),
    "alignment-compressibility": Objective("zscore(clip) + 0.5*zscore(jpeg)", "both, on one scale", FILE_SIZE | RIGHT),
    "alignment-colour": Objective(
        "min(zscore(clip), zscore(colour))",
        "both at once: a picture is as good as its worse side",
        {"saturation": "saturation, 0 to 1"} | RIGHT,
    ),
}


def adapter_file(name: str, seed: int) -> Path:
    return ADAPTERS / f"{name}-{seed}.safetensors"


def trained(name: str, seed: int) -> AlignResult:
    """Train for one objective, and keep the adapter for mixing."""
    objective = OBJECTIVES[name]
    pipe = AlignPropPipeline.from_pretrained("emoji")
    result = pipe.align(
        objective.reward, objective.prompts, AlignConfig.preset("emoji"),
        steps=objective.steps or STEPS, eval_prompts=objective.held_out or HELD_OUT, seed=seed,
        judges=objective.watched,
    )  # fmt: skip
    ADAPTERS.mkdir(exist_ok=True)
    pipe.save_adapter(adapter_file(name, seed), format="diffusers")
    return result


def mixed(seed: int) -> tuple[Evidence, Evidence]:
    """Before and after putting two finished adapters on at half strength each: their changes of the weights add up."""
    config = AlignConfig.preset("emoji").replace(seed=seed)
    pipe = AlignPropPipeline.from_pretrained("emoji")
    held_out = PromptSet.load("emoji").split(HELD_OUT, seed)[1]
    judges = [parse_reward(text, allow_code=True) for text in WATCHED]
    before = evaluate(pipe, parse_reward("clip"), judges, held_out, config, 0)
    parts = ("alignment", "compressibility")
    for name in parts:
        pipe.load_lora_weights(adapter_file(name, seed), adapter_name=name)
    pipe.set_adapters(list(parts), [0.5, 0.5])
    return before, evaluate(pipe, parse_reward("clip"), judges, held_out, config, STEPS)


def measure(name: str, seed: int) -> dict[str, Any]:
    """Every held-out figure before and after, and the seconds; the pictures of the first seed."""
    if name == "mixed-adapters":
        before, after = mixed(seed)
        changes, seconds = paired_change(before, after), 0.0
    else:
        result = trained(name, seed)
        before, after, changes, seconds = result.before, result.after, result.changes, result.seconds
    assert before
    assert after
    if seed == SEEDS[0]:
        drawings.draw_before_after(before, after, HERE / f"{name}.png")
    return {"seconds": round(seconds)} | {key: _rounded(change) for key, change in changes.items()}


def _rounded(change: Change) -> list[float]:
    return [round(change.before, 4), round(change.after, 4)]


# --- the page ---

HEAD = """# The paper's objectives on the bundled model

One command each, for example

```bash
python examples/objectives/objectives.py count
alignprop train --reward count --steps 40     # the same on the command line
```

{steps} steps of twelve pictures and {held_out} held-out prompts with the same noise before and after (`count`: 40 steps
and 100 prompts); seeds {seeds}. This page is written by the script from results.json. A run took {low} to {high}
seconds on two cores. Where the judge falls, the reward was followed too far: it says nothing of what the picture shows.
"""


def page(results: dict[str, Any]) -> str:
    """The text of README.md."""
    seconds = [run["seconds"] for runs in results.values() for run in runs.values() if run["seconds"]]
    seeds = ", ".join(sorted({seed for runs in results.values() for seed in runs}))
    head = HEAD.format(steps=STEPS, held_out=HELD_OUT, seeds=seeds, low=min(seconds), high=max(seconds))
    sections = [
        section(name, dict(sorted(results[name].items())))
        for name in (*OBJECTIVES, "mixed-adapters")
        if name in results
    ]
    return "\n".join([head, *sections])


def section(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """One objective: the table over the seeds, and the pictures of the first one."""
    if name in OBJECTIVES:
        objective = OBJECTIVES[name]
        title, meant, measures = f"`{objective.reward}`", objective.meant, {"reward": "reward"} | objective.measures
    else:
        title = "half of the `clip` adapter and half of the `jpeg` adapter"
        meant = "mixing finished adapters, beside training on the mixed reward above"
        measures = {"clip": "clip"} | FILE_SIZE | RIGHT
    lines = [f"## {name}: {title}", "", f"{meant[0].upper()}{meant[1:]}.", ""]
    lines += [f"| | {' | '.join(f'seed {seed}' for seed in runs)} | mean change |", f"|---|{'---|' * (len(runs) + 1)}"]
    for key, words in measures.items():
        pairs = [run[key] for run in runs.values()]
        mean = statistics.mean(after - before for before, after in pairs)
        cells = " | ".join(f"{before:.3g} -> {after:.3g}" for before, after in pairs)
        lines.append(f"| {words} | {cells} | {mean:+.3g} |")
    return "\n".join([*lines, "", f"![before and after]({name}.png)", ""])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*OBJECTIVES, "mixed-adapters"]
    options.add_argument("names", nargs="*", help=f"which ones, of: {', '.join(names)} (default: all)")
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    chosen = options.parse_args()
    unknown = [name for name in chosen.names if name not in names]
    if unknown:
        options.error(f"{unknown[0]!r} is not known; choose from {', '.join(names)}")
    file = HERE / "results.json"
    for name in chosen.names or names:
        for seed in chosen.seeds:
            figures = measure(name, seed)
            print(f"{name} seed {seed}: {figures}", flush=True)
            results = json.loads(file.read_text()) if file.exists() else {}
            results.setdefault(name, {})[str(seed)] = figures
            file.write_text(json.dumps(results, indent=1) + "\n")
            (HERE / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
