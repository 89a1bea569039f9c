"""Last stage: half precision weights, configurations and figures into alignprop_pipe/models/, ready to ship.

python export.py            reads the trained networks and the figures that measure.py wrote
"""

import json
import shutil
from pathlib import Path

import torch
from common import WORK
from diffusers import DiffusionPipeline
from train_denoiser import CLEAN_STEPS, WEAK_STEPS, WRONG
from transformers import (
    AutoModelForImageClassification,
    BertTokenizer,
    BlipForQuestionAnswering,
    CLIPModel,
    CLIPTokenizer,
    Owlv2ForObjectDetection,
)

MODELS = Path(__file__).parents[2] / "alignprop_pipe" / "models"

CARD = """---
license: apache-2.0
---
# The models that ship inside alignprop-pipe

| folder | what | format |
|---|---|---|
| `emoji` | text-to-image, 64x64: one to four emoji of one kind on a plain background | Stable Diffusion folder |
| `emoji-scorer` | how well such a picture and a prompt agree: the default reward | CLIPModel of transformers |
| `emoji-detector` | finds objects by name: the rewards `count`, `contains`, `without` | Owlv2ForObjectDetection |
| `emoji-answerer` | answers yes or no to a question: the reward `ask` with `model="emoji"` | BlipForQuestionAnswering |
| `emoji-judge` | reads subject, number, background; watched, never trained on | ResNetForImageClassification |

Trained by `examples/bundled_model` from one seed. The base was trained on true captions for {clean} steps and then for
{weak} steps on captions of which {wrong} % were taken from another picture, as captions on the web often are wrong:
its pictures are crisp, but often not of what was asked for. That weakness is on purpose: it is what alignment mends.

{figures}

The answerer is asked about what the picture shows, in half of the cases with a word or two wrong: its figures are how
often its yes and its no are right.

Limits: {subjects} subjects, four numbers and eight colours are all the words that mean anything to it.

## Licence and credit

The weights are Apache-2.0. The training pictures were rendered from **Noto Color Emoji**, copyright Google Inc., under
the SIL Open Font License 1.1 (https://openfontlicense.org; Debian package fonts-noto-color-emoji). The font itself is
not part of this package.
"""


def emoji(source: Path, target: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(source).to(torch.float16)
    pipe.save_pretrained(target)
    vae_config = target / "vae" / "config.json"
    config = json.loads(vae_config.read_text())
    config.pop("block_out_channels")  # AutoencoderTiny writes it and then warns of it
    vae_config.write_text(json.dumps(config, indent=2) + "\n")


def scorer(source: Path, target: Path) -> None:
    CLIPModel.from_pretrained(source).half().save_pretrained(target)
    CLIPTokenizer.from_pretrained(source).save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)


def judge(source: Path, target: Path) -> None:
    AutoModelForImageClassification.from_pretrained(source).half().save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)


def detector(source: Path, target: Path) -> None:
    Owlv2ForObjectDetection.from_pretrained(source).half().save_pretrained(target)
    CLIPTokenizer.from_pretrained(source).save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)


def answerer(source: Path, target: Path) -> None:
    BlipForQuestionAnswering.from_pretrained(source).half().save_pretrained(target)
    BertTokenizer.from_pretrained(source).save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)


def portable(path: Path) -> None:
    """No folder that it was loaded from; float32 in memory: transformers would keep the file's half precision."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def figures() -> str:
    """Both bases' figures as a table; they come from measure.py."""
    measured = {name: json.loads((WORK / f"{name}-measured.json").read_text()) for name in ("clean", "weak")}
    columns = ("subject", "count", "background", "all")
    lines = [
        "| 300 pictures, 20 steps, no guidance | subject | number | background | everything |",
        "|---|---|---|---|---|",
    ]
    rows = {
        "trained on true captions, by the judge": measured["clean"]["samples by the judge"],
        "**what ships**, by the judge": measured["weak"]["samples by the judge"],
        "scorer agrees with the judge on what ships": measured["weak"]["scorer agrees with the judge"],
        "scorer on fresh renderings": measured["weak"]["scorer on rendered"],
        "detector agrees with the judge on what ships": measured["weak"]["detector agrees with the judge"],
        "detector on fresh renderings": measured["weak"]["detector on rendered"],
        "answerer agrees with the judge on what ships": measured["weak"]["answerer agrees with the judge"],
        "answerer on fresh renderings": measured["weak"]["answerer on rendered"],
        "judge on fresh renderings": measured["weak"]["judge on rendered"],
        "judge on renderings through the autoencoder": measured["weak"]["judge on autoencoded"],
    }
    for name, row in rows.items():
        cells = (f"{100 * row[column]:.1f} %" if column in row else "" for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from render import SUBJECTS

    for name, source, write in (
        ("emoji", WORK / "weak", emoji),
        ("emoji-scorer", WORK / "scorer", scorer),
        ("emoji-judge", WORK / "judge", judge),
        ("emoji-detector", WORK / "detector", detector),
        ("emoji-answerer", WORK / "answerer", answerer),
    ):
        shutil.rmtree(MODELS / name, ignore_errors=True)
        write(source, MODELS / name)
        for path in (*(MODELS / name).rglob("config.json"), *(MODELS / name).glob("model_index.json")):
            portable(path)
        for path in (MODELS / name).rglob("*.safetensors"):
            path.chmod(0o644)  # save_pretrained keeps them to their owner
    card = CARD.format(
        clean=CLEAN_STEPS, weak=WEAK_STEPS, wrong=round(100 * WRONG), figures=figures(), subjects=len(SUBJECTS)
    )
    (MODELS / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file())
    print(f"{MODELS.name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
