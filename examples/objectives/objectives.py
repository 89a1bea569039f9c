"""Every objective of the paper on the bundled model, each in one command, over three seeds.

    python examples/objectives/objectives.py count         one of them
    python examples/objectives/objectives.py               all of them

Each run trains an adapter and looks at held-out prompts with the same noise before and after: the reward, the judge
that no training sees, and a true measure of what was asked for. Figures go to results.json, pictures to NAME.png, and
README.md is written anew from both.
"""

import argparse
import io
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, evaluate, parse_reward
from alignprop_pipe.bundled import REWARD
from alignprop_pipe.images import to_pil
from alignprop_pipe.records import Change, Evidence
from alignprop_pipe.rewards import AttributeJudge, Reward
from alignprop_pipe.runs import drawings
from alignprop_pipe.training.evidence import paired_change
from alignprop_pipe.training.result import AlignResult

HERE = Path(__file__).parent
ADAPTERS = Path(tempfile.gettempdir()) / "alignprop-objectives"
SEEDS, HELD_OUT = (0, 1, 2), 100
TOO_FAR = "-too-far"
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink", "white")
NUMBERS = {"one": "one dog", "two": "two dogs", "three": "three dogs", "four": "four dogs"}
DOGS = PromptSet(
    tuple(f"{dogs} on a {colour} background" for dogs in NUMBERS.values() for colour in COLOURS),
    {
        "subject": ("cat",) * len(NUMBERS) * len(COLOURS),
        "count": tuple(n for n in NUMBERS for _ in COLOURS),
        "background": COLOURS * len(NUMBERS),
    },
)


class SeesDog(AttributeJudge):
    """1.0 where the judge names the subject of a picture a dog."""

    name = "judge_sees_dog"

    def score(self, images: Tensor, prompts: list[str], targets: Any) -> Tensor:
        return images.new_tensor([float(subject == "dog") for subject in self.predict(images)["subject"]])

    def extras(self, images: Tensor, prompts: list[str], targets: Any) -> dict[str, Tensor]:
        return {}


SMOOTH_CLIP = parse_reward("smooth(clip)")


def clip_as_cats(images: Tensor, prompts: list[str]) -> Tensor:
    """`smooth(clip)`, as if the prompts had asked for cats where they ask for dogs."""
    return SMOOTH_CLIP(images, [prompt.replace("dog", "cat") for prompt in prompts]).total


class WebP(Reward):
    """Minus the size of the picture as a WebP file (quality 80) in 1000 bytes: only watched, since it has no slope."""

    name = "webp"
    reads_prompts = False

    def score(self, images: Tensor, prompts: list[str], targets: Any) -> Tensor:
        return -self.extras(images, prompts, targets)["webp_kb"]

    def extras(self, images: Tensor, prompts: list[str], targets: Any) -> dict[str, Tensor]:
        sizes = []
        for image in images:
            file = io.BytesIO()
            to_pil(image).save(file, format="WEBP", quality=80)
            sizes.append(file.tell() / 1000)
        return {"webp_kb": images.new_tensor(sizes)}


HERE_IS = Path(__file__).as_posix()
WATCHED = ("emoji_judge", "jpeg", "colour", f"{HERE_IS}:WebP")
RIGHT = {"emoji_judge": "right in everything, by the judge"}
NUMBER = {"emoji_judge.count": "right number, by the judge"}
SUBJECT = {"emoji_judge.subject": "right subject, by the judge"}
FILE_SIZE = {"webp_kb": "WebP file, kB", "jpeg_kb": "JPEG file, kB"}


@dataclass(frozen=True, slots=True)
class Objective:
    """A reward, what is meant by it, and the measures that say whether it was reached: name -> words.

    `too_far` is the reward alone, which ends in pictures that please it and nobody else; the one that is trained has a
    stopping point, or other rewards next to it that keep the pictures.
    """

    reward: str
    meant: str
    measures: dict[str, str]
    too_far: str = ""
    prompts: Any = "emoji"
    watched: tuple[str, ...] = field(default=WATCHED)


OBJECTIVES = {
    "alignment": Objective(REWARD, "pictures of what the prompt says", RIGHT),
    "aesthetics": Objective(
        "smooth(clip) + 3*clip_above(colour, 0.46)",
        "more colour, up to 0.46 and no further: colourfulness after Hasler and Süsstrunk, a stand-in for `aesthetic`, "
        "whose network reads photographs",
        {"colour": "colourfulness, 0 to 1"} | RIGHT,
        too_far="colour",
    ),
    "compressibility": Objective(
        "smooth(clip) + 0.5*contains + 0.1*count + 30*clip_above(jpeg, -0.025)",
        "pictures that make smaller files",
        FILE_SIZE | RIGHT,
        too_far="jpeg",
    ),
    "incompressibility": Objective(
        "smooth(clip) + 0.5*contains + 0.1*count - 10*jpeg",
        "pictures full of detail, which make larger files",
        FILE_SIZE | RIGHT,
        too_far="-jpeg",
    ),
    "count": Objective("count", "as many objects as the prompt says", NUMBER | RIGHT),
    "presence": Objective(
        "smooth(clip) + contains", "the object that the prompt names is there", SUBJECT | RIGHT, too_far="contains"
    ),
    "removal": Objective(
        f'clip_above(without("dog"), -0.1) + clip_above(contains, -0.1) + 0.2*count + 10*{HERE_IS}:clip_as_cats',
        "no dogs, though every prompt asks for some, and as many cats in their place",
        {"judge_sees_dog": "dogs, by the judge", "emoji_judge": "cats in the right number on the right background"},
        too_far='without("dog")',
        prompts=DOGS,
        watched=(*WATCHED, f"{HERE_IS}:SeesDog"),
    ),
    "alignment-compressibility": Objective("zscore(clip) + 0.15*zscore(jpeg)", "both, on one scale", FILE_SIZE | RIGHT),
}


def adapter_file(name: str, seed: int) -> Path:
    return ADAPTERS / f"{name}-{seed}.safetensors"


def trained(name: str, seed: int) -> AlignResult:
    """Train for one objective, or for its reward alone, and keep the adapter for mixing."""
    objective = OBJECTIVES[name.removesuffix(TOO_FAR)]
    reward = objective.too_far if name.endswith(TOO_FAR) else objective.reward
    pipe = AlignPropPipeline.from_pretrained("emoji")
    result = pipe.align(
        reward, objective.prompts, AlignConfig.preset("emoji"),
        eval_prompts=HELD_OUT, eval_every=0, seed=seed, judges=objective.watched, keep_best=False,
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
    return before, evaluate(pipe, parse_reward("clip"), judges, held_out, config, config.steps)


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


def names() -> list[str]:
    """All that can be asked for: the objectives, each with the same followed too far, and the mixed adapters."""
    return [
        *(part for name, one in OBJECTIVES.items() for part in (name, *([name + TOO_FAR] if one.too_far else []))),
        "mixed-adapters",
    ]


def _rounded(change: Change) -> list[float]:
    return [round(change.before, 4), round(change.after, 4)]


# --- the page ---

HEAD = """# The paper's objectives on the bundled model

One command each, for example

```bash
python examples/objectives/objectives.py count
alignprop train --reward count                # the same on the command line
```

The preset of the bundled model ({steps} steps of {batch} pictures), and {held_out} held-out prompts with the same noise
before and after; seeds {seeds}, or the first only. This page is written by the script from results.json. A run took
{low} to {high} seconds on one core. The judge, which no training sees, says what share of the pictures shows what it
should. The size as WebP is an outside measure too: the reward `jpeg` never sees that format. Of a JPEG file of these
small pictures 0.62 kB are headers and tables, the same for every picture.

A reward that says nothing of what the picture shows is followed too far sooner or later. So such an objective has a
stopping point (`clip_above`: good enough, no further) or other rewards next to it that keep the pictures; what the
reward alone does in the same number of steps stands below it as the warning.

What is pulled hard may still cost something: files get 30 % smaller as WebP on the mean of three seeds with as many
pictures right as before, but one of the three seeds loses 14 points.
"""


def page(results: dict[str, Any]) -> str:
    """The text of README.md."""
    seconds = [run["seconds"] for runs in results.values() for run in runs.values() if run["seconds"]]
    seeds = ", ".join(sorted({seed for runs in results.values() for seed in runs}))
    preset = AlignConfig.preset("emoji")
    head = HEAD.format(
        steps=preset.steps, batch=preset.batch_size, held_out=HELD_OUT, seeds=seeds, low=min(seconds), high=max(seconds)
    )
    sections = [section(name, dict(sorted(results[name].items()))) for name in names() if name in results]
    return "\n".join([head, *sections])


def section(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """One objective: the table over the seeds, and the pictures of the first one."""
    objective = OBJECTIVES.get(name.removesuffix(TOO_FAR))
    if objective is not None and name.endswith(TOO_FAR):
        title, meant, measures = f"`{objective.too_far}`", "the reward alone", {"reward": "reward"} | objective.measures
    elif objective is not None:
        title, meant, measures = (
            f"`{objective.reward.replace(HERE_IS, 'objectives.py')}`",
            objective.meant,
            {"reward": "reward"} | objective.measures,
        )
    else:
        title = "half of the `alignment` adapter and half of the `compressibility` adapter"
        meant = "mixing finished adapters, next to training on the mixed reward above"
        measures = {"clip": "clip"} | FILE_SIZE | RIGHT
    lines = [f"{'###' if name.endswith(TOO_FAR) else '##'} {name}: {title}", "", f"{meant[0].upper()}{meant[1:]}.", ""]
    lines += [f"| | {' | '.join(f'seed {seed}' for seed in runs)} | mean change |", f"|---|{'---|' * (len(runs) + 1)}"]
    for key, words in measures.items():
        pairs = [run[key] for run in runs.values()]
        mean = statistics.mean(after - before for before, after in pairs)
        cells = " | ".join(f"{shown(before)} -> {shown(after)}" for before, after in pairs)
        relative = statistics.mean(after / before - 1 for before, after in pairs) if key in FILE_SIZE else None
        share = "" if relative is None else f" ({round(relative, 2) + 0.0:+.0%})"
        lines.append(f"| {words} | {cells} | {shown(mean, '+')}{share} |")
    return "\n".join([*lines, "", f"![before and after]({name}.png)", ""])


def shown(value: float, sign: str = "") -> str:
    """Two digits behind the point, three where that leaves too little; never -0."""
    digits = 3 if abs(value) < 0.1 else 2
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help=f"which ones, of: {', '.join(names())} (default: all)")
    options.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    chosen = options.parse_args()
    unknown = [name for name in chosen.names if name not in names()]
    if unknown:
        options.error(f"{unknown[0]!r} is not known; choose from {', '.join(names())}")
    file = HERE / "results.json"
    for name in chosen.names or names():
        for seed in chosen.seeds:
            figures = measure(name, seed)
            print(f"{name} seed {seed}: {figures}", flush=True)
            results = json.loads(file.read_text()) if file.exists() else {}
            results.setdefault(name, {})[str(seed)] = figures
            file.write_text(json.dumps(results, indent=1) + "\n")
            (HERE / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
