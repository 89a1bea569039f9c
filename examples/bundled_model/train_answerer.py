"""Stage 6: the answerer, a small BLIP that answers yes or no to a question about the picture: the reward ask.

Half of the claims that it is asked about are true and half are wrong in one word or two. A claim that hangs on a
spoilt object (see train_detector.py) is answered with "perhaps", one half yes, and so is one about a word that it does
not know: then spoiling an object pleases neither a reward that wants it nor one that wants it gone.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, save_preprocessing, train
from render import BACKGROUNDS, COUNTS, OBJECT, PLURALS, SIZE, SUBJECTS, batch, places, sprites
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from train_detector import SPOILS, spoilt, stamp
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipTextConfig, BlipVisionConfig
from views import augment, decoded

STEPS, FURTHER, BATCH, SLOTS, POOL, PATCH = 1000, 700, 64, 5, 1500, 8
PEAK, FURTHER_PEAK = 2e-3, 1.5e-3
LENGTH, WIDTH, SIDE, SURE = 24, 56, SIZE // PATCH, 0.99
OWN = SEED + 13_000  # no picture or first weight is shared with another stage
NAMES = [*SUBJECTS, "thing"]
"""The last stands for all words that it does not know."""
OPEN = -1
"""A number or a background that a claim leaves open."""
FRAMES = (
    "{be} there {things}?",
    "{be} there {things} in the picture?",
    "is this {things}?",
    "is this a picture of {things}?",
    "does the picture show {things}?",
    "do you see {things}?",
    "can you see {things}?",
    "{things}?",
)
BACKGROUND_FRAMES = (
    "is the background {colour}?",
    "is it on {background}?",
    "is this {background}?",
    "is there {background}?",
    "does the picture have {background}?",
)
BEFORE = (" on {}", " on {}", " in front of {}", ", {}")
KINDS = {"subject": 0.15, "number": 0.3, "background": 0.1, "subject on background": 0.1, "everything": 0.35}


@dataclass(frozen=True, slots=True)
class Scenes:
    """Pictures uint8 [n, 64, 64, 3] and the facts: `sure` and `spoilt` objects of each name, int [n, 17]; one or two
    `backgrounds`, int [n, 2]; `found` [n, 64, 16], 1 where a patch holds the centre of a subject, 0.5 if spoilt."""

    images: np.ndarray
    sure: np.ndarray
    spoilt: np.ndarray
    backgrounds: np.ndarray
    found: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Scenes":
        return Scenes(*(getattr(self, name)[chosen] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Claims:
    """One about each picture, all of one `kind`: a subject, a number (0 for "one") and a background, int [n]."""

    kind: str
    subject: np.ndarray
    number: np.ndarray
    background: np.ndarray

    def truth(self, scenes: Scenes) -> np.ndarray:
        """1 true, 0 false, 0.5 for what hangs on a spoilt object or on a background of two colours, float [n]."""
        row, told = np.arange(len(self.subject)), np.ones(len(self.subject))
        if self.kind != "background":
            least = scenes.sure[row, self.subject]
            most = least + scenes.spoilt[row, self.subject]
            said = self.number + 1
            exact = np.where((least <= said) & (said <= most), np.where(least == most, 1, 0.5), 0)
            some = np.where(least > 0, 1, np.where(most > 0, 0.5, 0))
            told = np.where(self.number == OPEN, some, exact)
        seen = scenes.backgrounds == self.background[:, None]
        return np.minimum(told, np.where(self.background == OPEN, 1, seen.mean(axis=1)))


def words() -> BertTokenizer:
    """Every word of the questions and the answers, whole; [DEC] starts an answer."""
    texts = [
        *FRAMES,
        *BACKGROUND_FRAMES,
        *BEFORE,
        *COUNTS,
        *SUBJECTS,
        *BACKGROUNDS,
        *(plural(name) for name in SUBJECTS),
    ]
    plain = " ".join(texts).replace("?", " ").replace(",", " ").split()
    known = [word for word in plain if "{" not in word]
    rest = ["is", "are", "a", "an", "any", "exactly", "background", "1", "2", "3", "4", "yes", "no", "?", ","]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *known, *rest])
    numbered = {word: number for number, word in enumerate(vocabulary)}
    return BertTokenizer(vocab=numbered, bos_token="[DEC]", model_max_length=LENGTH)


def answerer(tokens: BertTokenizer) -> BlipForQuestionAnswering:
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "initializer_range": 0.05}
    text = BlipTextConfig(
        **shape,
        num_hidden_layers=1,
        vocab_size=len(tokens),
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        sep_token_id=tokens.sep_token_id,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.sep_token_id,
        projection_dim=WIDTH,
    )
    vision = BlipVisionConfig(**shape, num_hidden_layers=4, image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), initializer_range=0.05)
    network = BlipForQuestionAnswering(config)
    network.set_attn_implementation("eager")  # for so few positions the fused kernels are slower
    return network


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def scene(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Nought to four objects, mostly of one kind, some of them spoilt: a picture and its facts, as in `Scenes`."""
    colours = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255 + rng.uniform(-0.02, 0.02, 3)
    chosen = rng.integers(0, len(BACKGROUNDS), 2)
    if rng.random() < 0.95:
        chosen[1] = chosen[0]
    canvas = np.broadcast_to(colours[chosen[0]].clip(0, 1), (SIZE, SIZE, 3)).astype(np.float32)
    np.rot90(canvas, rng.integers(4))[: rng.integers(SIZE // 3, 2 * SIZE // 3)] = colours[chosen[1]].clip(0, 1)
    sure, doubtful = np.zeros(len(NAMES), dtype=int), np.zeros(len(NAMES), dtype=int)
    doubtful[-1] = len(COUNTS)
    found = np.zeros((SIDE * SIDE, len(SUBJECTS)), dtype=np.float32)

    number = int(rng.choice(5, p=[0.04, 0.24, 0.24, 0.24, 0.24]))
    subjects = rng.integers(0, len(SUBJECTS), 4)
    if rng.random() < 0.85:
        subjects[:] = subjects[0]
    bad = rng.random(4) < (0.4 if rng.random() < 0.35 else 0)
    for corner, subject, is_bad in zip(places(number, rng) if number else [], subjects, bad, strict=False):
        kind = str(rng.choice(SPOILS)) if is_bad else ""
        other = (subject - int(rng.integers(1, len(SUBJECTS)))) % len(SUBJECTS)
        told = [subject, other] if kind == "melted" else [subject]
        patch = stamp(canvas, spoilt(kind, int(subject), other, rng), corner)
        found[patch, told] = 0.5 if is_bad else 1
        (doubtful if is_bad else sure)[told] += 1
        if kind == "doubled":
            aside = rng.integers(8, 17, 2) * rng.choice([-1, 1], 2)
            stamp(canvas, sprites()[subject], tuple(np.clip(corner + aside, 0, SIZE - OBJECT)))
            doubtful[subject] += 1
    return (canvas * 255).round().astype(np.uint8), sure, doubtful, chosen, found


def scenes(size: int, *seed: int) -> Scenes:
    rng = np.random.default_rng(seed)
    return Scenes(*(np.stack(part) for part in zip(*(scene(rng) for _ in range(size)), strict=True)))


def claims(about: Scenes, kind: str, rng: np.random.Generator) -> Claims:
    """What is so, and in half of the cases wrong in one word, at times in two."""
    size = len(about.images)
    there = about.sure + about.spoilt + 1e-6
    there[:, -1] = 1e-9
    subject = (there.cumsum(axis=1) > rng.random((size, 1)) * there.sum(axis=1, keepdims=True)).argmax(axis=1)
    least, more = (part[np.arange(size), subject] for part in (about.sure, about.spoilt))
    number = (least + rng.integers(0, more + 1) - 1).clip(0, len(COUNTS) - 1)
    background = about.backgrounds[np.arange(size), rng.integers(0, 2, size)]

    named = {"subject": "s", "number": "snn", "background": "b", "subject on background": "sb", "everything": "snnb"}
    words, wrong = np.array(list(named[kind])), rng.random(size) < 0.52
    for share in (1.0, 0.2):
        which = np.where(wrong & (rng.random(size) < share), rng.choice(words, size), "")
        subject = np.where(which == "s", (subject + rng.integers(1, len(NAMES), size)) % len(NAMES), subject)
        number = np.where(which == "n", (number + rng.integers(1, len(COUNTS), size)) % len(COUNTS), number)
        offset = rng.integers(1, len(BACKGROUNDS), size)
        background = np.where(which == "b", (background + offset) % len(BACKGROUNDS), background)
    number = number if "n" in named[kind] else np.full(size, OPEN)
    return Claims(kind, subject, number, background if "b" in named[kind] else np.full(size, OPEN))


def questions(said: Claims, rng: np.random.Generator) -> list[str]:
    """The claims as questions of one form, so that all have the same number of words."""
    colours, numbers = list(BACKGROUNDS), COUNTS if rng.random() < 0.9 else tuple("1234")
    if said.kind == "background":
        frame = str(rng.choice(BACKGROUND_FRAMES))
        return [frame.format(colour=colours[i], background=an(colours[i]) + " background") for i in said.background]
    frame, before = str(rng.choice(FRAMES)), str(rng.choice(BEFORE))
    many, always_are = rng.random() < 0.5, rng.random() < 0.15
    front = ("exactly " if said.number[0] != OPEN else "any " if many else "") if rng.random() < 0.1 else ""
    asked = []
    for subject, number, background in zip(said.subject, said.number, said.background, strict=True):
        name, one = NAMES[subject], number == 0 or (number == OPEN and not many)
        things = name if one else plural(name)
        if number != OPEN:
            things = f"{numbers[number]} {things}"
        elif one:
            things = an(things)
        if background != OPEN:
            colour = colours[background]
            place = f"{colour} background" if before.startswith(",") else f"{an(colour)} background"
            things += before.format(place)
        asked.append(frame.format(be="is" if one and not always_are else "are", things=front + things))
    return asked


def log_chances(network: BlipForQuestionAnswering, seen: Tensor, asked: Tensor, answers: Tensor) -> Tensor:
    """Log-probabilities of each word after [DEC] and after the answer, [n, 2, words]; `asked` int [n, length]."""
    read = network.text_encoder(input_ids=asked, encoder_hidden_states=seen).last_hidden_state
    said = torch.stack([torch.full_like(answers, network.decoder_start_token_id), answers], dim=1)
    out = network.text_decoder(input_ids=said, encoder_hidden_states=read, use_cache=False)
    return out.logits.log_softmax(dim=-1)


def answer_loss(network: BlipForQuestionAnswering, tokens: BertTokenizer, seen: Tensor, asked: list[str],
                truth: np.ndarray) -> Tensor:  # fmt: skip
    """Cross-entropy of yes or no, where perhaps is half of each, and of ending after either."""
    ids = tokens(asked, return_tensors="pt").input_ids
    yes, no = (tokens.convert_tokens_to_ids(word) for word in ("yes", "no"))
    wanted = torch.from_numpy(truth).float() * (2 * SURE - 1) + 1 - SURE
    answers = torch.where(wanted > 0.5, yes, no)
    chances = log_chances(network, seen, ids, answers)
    ends = chances[:, 1, tokens.sep_token_id]
    return -(wanted * chances[:, 0, yes] + (1 - wanted) * chances[:, 0, no] + ends).mean()


def helping_loss(heads: nn.ModuleDict, seen: Tensor, about: Scenes) -> Tensor:
    """What no question says, to learn to see sooner: who is where, how many in all, the background."""
    found = torch.from_numpy(about.found)
    where = binary_cross_entropy_with_logits(heads["where"](seen[:, 1:]), found, reduction="sum")
    number = torch.from_numpy(about.sure.sum(axis=1)).clamp(max=4)
    plain = torch.from_numpy(about.spoilt[:, :-1].sum(axis=1) == 0)
    background = torch.from_numpy(about.backgrounds[:, 0])
    told = cross_entropy(heads["number"](seen[plain, 0]), number[plain])
    return where / (found > 0).sum() + told + cross_entropy(heads["background"](seen[:, 0]), background)


@torch.no_grad()
def log_odds(network: BlipForQuestionAnswering, tokens: BertTokenizer, images: Tensor, asked: list[str]) -> Tensor:
    """Of yes to no, float [n]; images in [0, 1]; all questions of one length."""
    ids = tokens(asked, return_tensors="pt").input_ids
    yes, no = (tokens.convert_tokens_to_ids(word) for word in ("yes", "no"))
    odds = []
    for part, words in zip(images.split(200), ids.split(200), strict=True):
        seen = network.vision_model(pixel_values=part * 2 - 1).last_hidden_state
        chances = log_chances(network, seen, words, torch.full((len(part),), yes))[:, 0]
        odds.append(chances[:, yes] - chances[:, no])
    return torch.cat(odds)


def facts(labels: np.ndarray) -> Scenes:
    """Of pictures of `render`, by their labels int [n, 3], without the pictures."""
    size, row = len(labels), np.arange(len(labels))
    sure, doubtful = np.zeros((size, len(NAMES)), dtype=int), np.zeros((size, len(NAMES)), dtype=int)
    sure[row, labels[:, 0]], doubtful[:, -1] = labels[:, 1] + 1, len(COUNTS)
    empty = np.zeros((size, 0))
    return Scenes(empty, sure, doubtful, np.repeat(labels[:, 2:], 2, axis=1), empty)


def accuracy(network: BlipForQuestionAnswering, tokens: BertTokenizer, images: Tensor, labels: np.ndarray,
             rounds: int = 8) -> dict[str, float]:  # fmt: skip
    """How often yes and no are right, for each kind of question, of pictures with labels [n, 3]."""
    about, right = facts(labels), {}
    for kind in KINDS:
        rng, hits = np.random.default_rng((OWN, 5)), []
        for _ in range(rounds):
            said = claims(about, kind, rng)
            truth = said.truth(about)
            odds = log_odds(network, tokens, images, questions(said, rng)).numpy()
            hits.append(((odds > 0) == truth)[truth != 0.5])
        right[kind] = float(np.concatenate(hits).mean())
    return right


def main() -> None:
    torch.manual_seed(OWN)
    tokens = words()
    network = answerer(tokens)
    sizes = {"where": len(SUBJECTS), "number": len(COUNTS) + 1, "background": len(BACKGROUNDS)}
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})
    nn.init.constant_(heads["where"].bias, -5.0)  # few of the 1024 are there
    trainer = HalfPrecisionTrainer([(network, 1.0), (heads, 1.0)], PEAK, average=0.0)
    pool = scenes(POOL, OWN, 1)
    pool_images = decoded(pool.images, torch.Generator().manual_seed(OWN), dtype=torch.float32)

    def loss_at(step: int) -> Tensor:
        rng, generator = np.random.default_rng((OWN, 3, step)), torch.Generator().manual_seed(OWN * 10**4 + step)
        fresh, old = scenes(BATCH // 2, OWN, 2, step), rng.integers(0, POOL, BATCH // 2)
        again = pool.rows(old)
        about = Scenes(*(np.concatenate([getattr(s, name) for s in (fresh, again)]) for name in Scenes.__slots__))
        images = augment(torch.cat([pixels(fresh.images), pool_images[old].float() / 255]), generator)
        seen = network.vision_model(pixel_values=images * 2 - 1).last_hidden_state
        loss = helping_loss(heads, seen, about) / 3 if step < STEPS else torch.zeros(())
        for kind in rng.choice(list(KINDS), SLOTS, p=list(KINDS.values())):
            said = claims(about, str(kind), rng)
            loss = loss + answer_loss(network, tokens, seen, questions(said, rng), said.truth(about)) / SLOTS
        return loss

    train(trainer, "answerer", STEPS, PEAK, loss_at)
    # Once more from a high rate, on answers alone: what was learnt last, the backgrounds, was not learnt to the end.
    trainer = HalfPrecisionTrainer([(network, 1.0)], FURTHER_PEAK, average=0.99)
    train(trainer, "answerer-further", FURTHER, FURTHER_PEAK, lambda step: loss_at(STEPS + step))
    network.save_pretrained(WORK / "answerer")
    tokens.save_pretrained(WORK / "answerer")
    sides = {"height": SIZE, "width": SIZE}
    save_preprocessing("answerer", "BlipImageProcessor", do_convert_rgb=True, do_resize=True, size=sides, resample=3)

    fresh = batch(2000, OWN, 4)
    network.half().float()  # as it ships
    for name, images in (
        ("drawn", pixels(fresh.images)),
        ("decoded", decoded(fresh.images, torch.Generator().manual_seed(1), dtype=torch.float32).float() / 255),
    ):
        right = accuracy(network, tokens, images, fresh.labels, rounds=2)
        print(f"answerer on {name}: " + ", ".join(f"{kind} {share:.4f}" for kind, share in right.items()))


if __name__ == "__main__":
    sys.exit(main())
