"""`ask` against transformers' own processors and models, on random miniatures of BLIP and of GIT."""

import functools
import logging
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPImageProcessorPil,
    GitConfig,
    GitForCausalLM,
    GitVisionConfig,
)

from alignprop_pipe import AlignPropPipeline, PromptSet
from alignprop_pipe.bundled import MODELS_DIR
from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import Ask, AttributeJudge, check_reward, parse_reward
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.training.align import tell_about

PROMPTS = ["a dog on a red background", "two cats", "the sea"]
QUESTION = "is the dog wearing a hat?"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "yes",
    "no",
    "is",
    "the",
    "dog",
    "wearing",
    "a",
    "hat",
    "?",
    "this",
]
WORDS += ["on", "red", "background", "two", "cats", "sea", "not", "at", "all", "##s", "cat", "it"]


# --- a miniature ---------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path) -> None:
    (folder / "vocab").mkdir(parents=True)
    (folder / "vocab" / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    BertTokenizer.from_pretrained(folder / "vocab").save_pretrained(folder)
    shutil.rmtree(folder / "vocab")


def save_random(kind: Any, config: Any, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for name, weight in model.named_parameters():
            if "norm" not in name.lower() and "visual_projection.1" not in name:
                torch.nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)


def save_blip(folder: Path) -> Path:
    save_tokenizer(folder)
    # As published: the decoder's first word, [DEC], is the first after the tokenizer's.
    text = BlipTextConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=len(WORDS), sep_token_id=3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    save_random(BlipForQuestionAnswering, config, folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_git(folder: Path) -> Path:
    save_tokenizer(folder)
    vision = GitVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = GitConfig(
        vision_config=vision.to_dict(), vocab_size=len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    save_random(GitForCausalLM, config, folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("ask")
    return {"blip": save_blip(place / "blip"), "git": save_git(place / "git")}


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["blip"]


BOTH = pytest.mark.parametrize("family", ["blip", "git"])


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64) * 0.4 + 0.3


@functools.cache
def blip_parts(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = BertTokenizer.from_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), tokenizer)
    return BlipForQuestionAnswering.from_pretrained(folder).eval(), processor, tokenizer


def by_blip(folder: Path, image: Image.Image, question: str, answers: tuple[str, str]) -> float:
    """The log-odds from PIL to the end: by the processor, and by the model's own loss for each answer."""
    model, processor, tokenizer = blip_parts(folder)
    inputs = processor(images=image, text=question, return_tensors="pt")
    chances = []
    for answer in answers:
        words = tokenizer(answer, add_special_tokens=False).input_ids
        said = torch.tensor([[model.decoder_start_token_id, *words, tokenizer.sep_token_id]])
        loss = model(**inputs, decoder_input_ids=said, labels=said).loss  # the mean over the words and the end
        chances.append(-loss.item() * (len(words) + 1))
    return chances[0] - chances[1]


@functools.cache
def git_parts(folder: Path) -> tuple[Any, Any, Any]:
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder)
    return GitForCausalLM.from_pretrained(folder).eval(), processor, tokenizer


def by_git(folder: Path, image: Image.Image, question: str, answers: tuple[str, str]) -> float:
    """As above, with the question written as GIT's documentation does it: [CLS] and the words, without an end."""
    model, processor, tokenizer = git_parts(folder)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    chances = []
    for answer in answers:
        asked = [tokenizer.cls_token_id, *tokenizer(question, add_special_tokens=False).input_ids]
        said = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.sep_token_id]
        labels = torch.tensor([[-100] * len(asked) + said])
        loss = model(input_ids=torch.tensor([asked + said]), pixel_values=pixels, labels=labels).loss
        chances.append(-loss.item() * len(said))
    return chances[0] - chances[1]


BY_TRANSFORMERS = {"blip": by_blip, "git": by_git}


# --- value ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 90), (91, 35), (20, 20)])
@pytest.mark.parametrize("answers", [("yes", "no"), ("not at all", "yes it is"), ("no", "not at all")])
def test_it_equals_transformers_on_pil_images(folders, family, size, answers):
    images = [picture(*size, seed=n) for n in range(3)]
    questions = [f"is this {prompt}?" for prompt in PROMPTS]
    pairs = zip(images, questions, strict=True)
    expected = torch.tensor([BY_TRANSFORMERS[family](folders[family], *pair, answers) for pair in pairs])
    got = Ask("is this {prompt}?", *answers, model=folders[family])(tensor(*images), PROMPTS).total
    # Where nothing is resized only rounding is left; a resize differs from PIL's 8 bits by up to 1/255.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 if size == (32, 32) else 2e-2)
    assert expected.std() > 0.05


@BOTH
def test_it_is_what_generate_would_have_found(folders, family):
    """`generate`, which users of the models call, made to say each answer: its logits give the same odds."""
    folder, image = folders[family], picture(32, 32)
    model, processor, tokenizer = blip_parts(folder) if family == "blip" else git_parts(folder)
    look = processor.image_processor if family == "blip" else processor
    asked = tokenizer(QUESTION, return_tensors="pt").input_ids
    asked = asked if family == "blip" else asked[:, :-1]
    start, chances = 1 if family == "blip" else asked.shape[1], []
    for answer in ("yes it is", "no"):
        said = tokenizer(answer).input_ids[1:]
        made = model.generate(
            input_ids=asked, pixel_values=look(image, return_tensors="pt")["pixel_values"], max_new_tokens=len(said),
            prefix_allowed_tokens_fn=lambda _, ids, said=said: [said[len(ids) - start]],
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        steps = zip(made.logits, said, strict=True)
        chances.append(sum(logits[0].log_softmax(-1)[word] for logits, word in steps))
    got = Ask(QUESTION, "yes it is", "no", model=folder)(tensor(image), [""]).total
    torch.testing.assert_close(got[0], chances[0] - chances[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 90), (91, 35), (20, 20), (200, 300), (512, 448)])
def test_preprocessing_is_that_of_transformers(size):
    processor = BlipImageProcessorPil(size={"height": 48, "width": 48})
    expected = processor(picture(*size), return_tensors="pt")["pixel_values"]
    recipe = Preprocess.from_config(processor.to_dict())
    difference = (recipe(tensor(picture(*size))) - expected) * torch.tensor(recipe.std).view(1, 3, 1, 1)
    assert difference.abs().max() <= 2 / 255


def test_the_answers_swapped_change_the_sign(folder):
    images = noise(2, 32, 32)
    there, back = (
        Ask(QUESTION, *pair, model=folder)(images, PROMPTS[:2]).total for pair in (("yes", "no"), ("no", "yes"))
    )
    torch.testing.assert_close(there, -back)
    assert there.abs().min() > 0.01


def test_only_a_question_with_prompt_depends_on_the_prompt(folder):
    images = noise(2, 32, 32)[:1].expand(2, -1, -1, -1)
    plain, filled = (Ask(text, model=folder)(images, PROMPTS[:2]).total for text in (QUESTION, "is it {prompt}?"))
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-12)
    assert (filled[0] - filled[1]).abs() > 0.01


# --- gradient, batches, number formats -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(32, 32), (50, 41), (20, 24)])
def test_the_gradient_is_the_slope(folders, family, size):
    reward, images, generator = Ask(QUESTION, model=folders[family]), noise(2, *size), torch.Generator().manual_seed(0)
    images.requires_grad_(True)
    # transformers' GIT takes each softmax of its picture encoder in float32, whatever the rest is.
    step, tolerance = (1e-5, 1e-6) if family == "blip" else (1e-4, 3e-3)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).total.sum(), images)
    assert gradient.isfinite().all()
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, PROMPTS[:2]).total.sum() for h in (step, -step))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=tolerance, atol=1e-8)


@BOTH
def test_a_batch_is_its_pictures_one_by_one(folders, family):
    """Also where the questions are of different lengths."""
    reward, images = Ask("is this {prompt}?", model=folders[family]), noise(3, 48, 56)
    single = torch.cat([reward(image[None], [text]).total for image, text in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(reward(images, PROMPTS).total, single, rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_half_precision(folders, family, dtype, tolerance):
    images = noise(3, 40, 40).float().requires_grad_(True)
    half = Ask(QUESTION, model=folders[family], dtype=dtype)(images, PROMPTS).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, Ask(QUESTION, model=folders[family])(images, PROMPTS).total, rtol=0, atol=tolerance
    )
    (gradient,) = torch.autograd.grad(half.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@BOTH
def test_offloading_changes_nothing(folders, family):
    images = noise(2, 40, 48).requires_grad_(True)
    kept, offloaded = (
        Ask(QUESTION, model=folders[family], offload=offload)(images, PROMPTS[:2]).total for offload in (False, True)
    )
    torch.testing.assert_close(kept, offloaded, rtol=0, atol=1e-12)
    weights = torch.tensor([2.0, -3.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * total).sum(), images)[0] for total in (kept, offloaded)]
    # Part of GIT is always computed in float32.
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12 if family == "blip" else 1e-6)


@BOTH
def test_it_can_train_and_only_the_pictures_get_a_gradient(folders, family):
    reward, images = Ask(QUESTION, model=folders[family]), noise(2, 32, 32).float().requires_grad_(True)
    check_reward(reward, images, PROMPTS[:2], {})
    reward(images, PROMPTS[:2]).total.sum().backward()
    assert images.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in reward._network.parameters())
    assert not reward._network.training


def test_its_gradient_makes_yes_likelier(folder):
    reward, images = Ask(QUESTION, model=folder), noise(1, 32, 32).requires_grad_(True)
    before = reward(images, PROMPTS[:1]).total
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = reward((images + 0.02 * gradient.sign()).detach(), PROMPTS[:1]).total
    assert after > before


def test_a_judge_needs_no_graph(folder):
    reward, images = Ask(QUESTION, model=folder), noise(2, 32, 32).requires_grad_(True)
    with torch.no_grad():
        watched = reward(images, PROMPTS[:2]).total
    assert not watched.requires_grad
    assert torch.equal(watched, reward(images, PROMPTS[:2]).total)


@BOTH
def test_a_long_prompt_is_cut(folders, family):
    assert Ask("is it {prompt}?", model=folders[family])(noise(1, 32, 32), ["dog " * 100]).total.isfinite().all()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [("",), ("is it?", " "), ("is it?", "yes", "")])
def test_an_empty_text_is_refused(wrong):
    with pytest.raises(RewardError, match="a text is needed"):
        Ask(*wrong)


@pytest.mark.parametrize("against", ["no", "No "])
def test_two_answers_are_needed(against):
    with pytest.raises(RewardError, match="two different answers"):
        Ask(QUESTION, answer="no", against=against)


def score(model: str | Path, **kwargs) -> torch.Tensor:
    return Ask(QUESTION, model=model, **kwargs)(torch.full((1, 3, 32, 32), 0.5), ["a dog"]).total


def test_an_answer_that_the_tokenizer_does_not_know_is_refused(folder):
    with pytest.raises(RewardError, match=r"does not know all of the answer 'purple'"):
        score(folder, answer="purple")


def test_a_missing_model_says_what_to_do():
    with pytest.raises(RewardError, match=r"hf download Salesforce/blip-vqa-base --local-dir FOLDER"):
        score("Salesforce/blip-vqa-base")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_an_error(copy, file):
    (copy / file).unlink()
    with pytest.raises(RewardError, match=str(copy)):
        score(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_truncated_file_is_named(copy, file):
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RewardError, match=f"{file} is damaged"):
        score(copy)


def test_nothing_is_half_loaded(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    name = "text_encoder.encoder.layer.0.crossattention.self.key.weight"
    save_file({key: value for key, value in weights.items() if key != name}, copy / "model.safetensors")
    with pytest.raises(RewardError, match="crossattention"):
        score(copy)
    save_file(weights | {name: torch.zeros(3, 3)}, copy / "model.safetensors")
    with pytest.raises(RewardError, match="crossattention"):
        score(copy)


def test_no_pickle_is_loaded(copy):
    marker = copy / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(RewardError, match="safetensors"):
        score(copy)
    assert not marker.exists()


def test_another_model_is_refused(copy):
    from transformers import ViltConfig, ViltForQuestionAnswering

    vilt = ViltForQuestionAnswering(
        ViltConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    )
    vilt.save_pretrained(copy)
    with pytest.raises(RewardError, match=r"a 'vilt' model; ask can ask: BlipForQuestionAnswering, GitForCausalLM"):
        score(copy)


def test_it_is_written_as_a_sentence_in_an_expression(folder):
    text = (
        f'ask("is the dog wearing a hat?", model="{folder}") - 0.5*ask("is it {{prompt}}?", answer="no", against="yes")'
    )
    reward = parse_reward(text)
    assert str(reward) == text
    assert reward.children()[0] == Ask(QUESTION, model=str(folder))


# --- the bundled answerer ------------------------------------------------------------------------------------------


BUNDLED = MODELS_DIR / "emoji-answerer"
SHOWN = "does the picture show {prompt}?"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures [n, 3, 64, 64] of the bundled model, and what the judge, which is another network, reads in each."""

    images: torch.Tensor
    seen: list[dict[str, str]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    prompts = PromptSet.load("emoji").split(16, seed=5)[1].prompts
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pipe = AlignPropPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(list(prompts), num_inference_steps=10, guidance_scale=1.0, generator=noise, output_type="pt").images
    read = AttributeJudge().predict(made)
    return Drawn(made, [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)])


def other(value: str, *values: str) -> str:
    return next(one for one in values if one != value)


def things(subject: str, count: str) -> str:
    plural = {"fish": "fish", "fox": "foxes", "cactus": "cacti"}.get(subject, f"{subject}s")
    return f"{count} {subject if count == 'one' else plural}"


def phrases(seen: dict[str, str]) -> tuple[str, list[str]]:
    """What is in a picture, and the same with each of its words wrong."""
    subject, count, background = seen["subject"], seen["count"], seen["background"]
    rows = [
        (subject, count, background),
        (other(subject, "dog", "car"), count, background),
        (subject, other(count, "two", "three"), background),
        (subject, count, other(background, "white", "blue")),
    ]
    told = [f"{things(*row[:2])} on {'an' if row[2] == 'orange' else 'a'} {row[2]} background" for row in rows]
    return told[0], told[1:]


@pytest.mark.parametrize(
    "question", [SHOWN, "is this {prompt}?", "are there {prompt}?", "is this a picture of {prompt}?"]
)
def test_the_bundled_answerer_agrees_with_the_judge(drawn, question):
    reward = Ask(question, model="emoji")
    true, wrong = zip(*map(phrases, drawn.seen), strict=True)
    yes = reward(drawn.images, list(true)).total > 0
    no = torch.stack([reward(drawn.images, list(texts)).total < 0 for texts in zip(*wrong, strict=True)])
    assert yes.float().mean() >= 0.85
    assert no.float().mean() >= 0.9


def test_it_answers_what_is_there_and_on_what(drawn):
    """Questions of one word of the picture, each asked rightly and wrongly."""
    right, reward = [], Ask("{prompt}", model="emoji")
    for image, seen in zip(drawn.images, drawn.seen, strict=True):
        subject, background = seen["subject"], seen["background"]
        asked = {
            f"is there {'an' if subject == 'apple' else 'a'} {subject}?": True,
            f"is there a {other(subject, 'dog', 'car')}?": False,
            f"is the background {background}?": True,
            f"is the background {other(background, 'white', 'blue')}?": False,
        }
        said = reward(image.expand(len(asked), -1, -1, -1), list(asked)).total > 0
        right += [one == truth for one, truth in zip(said.tolist(), asked.values(), strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_a_word_that_it_does_not_know_is_answered_with_perhaps(drawn):
    odds = Ask("is there a zebra?", model="emoji")(drawn.images, [""] * len(drawn.images)).total
    known = Ask("is there a dog?", model="emoji")(drawn.images, [""] * len(drawn.images)).total
    assert odds.abs().median() < 1
    assert known.abs().median() > 3


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (333, 200), (720, 1280)])
def test_trained_weights_answer_as_after_pils_own_resize(drawn, size):
    """To 1e-3 of the range, -5 to 5."""
    pictures = (drawn.images[:4] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC) for picture in pictures]
    questions = [SHOWN.replace("{prompt}", phrases(seen)[0]) for seen in drawn.seen[:4]]
    expected = [by_blip(BUNDLED, *pair, ("yes", "no")) for pair in zip(images, questions, strict=True)]
    got = Ask("{prompt}", model="emoji")(tensor(*images), questions).total
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-2)


def test_the_bundled_answerer_has_a_slope_and_scores_one_by_one(drawn):
    reward = Ask(SHOWN, model="emoji")
    prompts = ["a dog", "two cats on a red background", "one rocket"]
    images = drawn.images[:3].double().requires_grad_(True)
    totals = reward(images, prompts).total
    single = [reward(image[None], [prompt]).total for image, prompt in zip(images, prompts, strict=True)]
    torch.testing.assert_close(totals, torch.cat(single), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(totals.sum(), images)
    assert gradient.isfinite().all()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, prompts).total.sum() for h in (1e-6, -1e-6))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-7)
    check_reward(reward, drawn.images[:3], prompts, {})


def test_it_needs_no_network(monkeypatch):
    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert parse_reward('ask("is there a dog?", model="emoji")')(torch.rand(1, 3, 50, 70), [""]).total.isfinite().all()


def test_it_is_told_that_it_knows_emoji_pictures_alone(caplog):
    pipe = AlignPropPipeline.from_pipe(miniatures.sd15())
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        tell_about(pipe, PromptSet(("a dog",)), parse_reward('ask("is there a dog?", model="emoji")'))
        tell_about(pipe, PromptSet(("a dog",)), parse_reward('ask("is there a dog?")'))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_pipe")]
    assert said == "the bundled scorer of ask knows only emoji pictures"
