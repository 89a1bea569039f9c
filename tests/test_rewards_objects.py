"""`count`, `contains`, `without`: the distribution by enumeration, whole scores by transformers and loops, slopes."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from miniatures import clip_tokenizer
from tiny_detectors import picture, save_owl, save_yolos, tensor
from transformers import (
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from alignprop_pipe.errors import RewardError
from alignprop_pipe.prompts import named_sets
from alignprop_pipe.rewards import Contains, Count, Without, check_reward, parse_reward
from alignprop_pipe.rewards.objects.count import Seen, hard_counts, log_exactly, log_some, overlaps, suppress

DOGS = ["two dogs", "a dog", "no dogs"]


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_owl(tmp_path_factory.mktemp("owl"))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_yolos(tmp_path_factory.mktemp("yolos"))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    corner, size = uniform(1, count, 2, seed=seed) * 0.6, 0.1 + 0.3 * uniform(1, count, 2, seed=seed + 1)
    return torch.cat([corner, corner + size], dim=-1)


def whole(number: int) -> torch.Tensor:
    return torch.tensor([number])


# --- the distribution ------------------------------------------------------------------------------------------------


def by_enumeration(chances: list[float], number: int) -> float:
    """P(N = number), over all ways that the boxes can be on and off."""
    return sum(
        math.prod(p if on else 1 - p for p, on in zip(chances, ways, strict=True))
        for ways in itertools.product((0, 1), repeat=len(chances))
        if sum(ways) == number
    )


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=7))
def test_the_distribution_equals_enumeration(chances):
    p = torch.tensor([chances], dtype=torch.float64)
    seen = Seen(on=p.log(), off=(1 - p).log())
    got = [log_exactly(seen, whole(number)).exp().item() for number in range(len(chances) + 1)]
    assert got == pytest.approx([by_enumeration(chances, number) for number in range(len(chances) + 1)], abs=1e-12)
    assert sum(got) == pytest.approx(1, abs=1e-12)
    assert log_some(seen).exp().item() == pytest.approx(1 - got[0], abs=1e-12)
    assert seen.off.sum().exp().item() == pytest.approx(got[0], abs=1e-12)


def test_several_names_at_once_are_each_its_own():
    p = uniform(3, 6)
    seen = Seen(on=p.log(), off=(1 - p).log())
    together = log_exactly(seen, torch.tensor([0, 4, 2]))
    for row, number in enumerate([0, 4, 2]):
        alone = log_exactly(Seen(seen.on[row : row + 1], seen.off[row : row + 1]), whole(number))
        torch.testing.assert_close(together[row : row + 1], alone)


def apart(count: int) -> torch.Tensor:
    """Boxes that do not touch."""
    left = torch.arange(count, dtype=torch.float64) / count
    return torch.stack([left, torch.zeros(count), left + 0.9 / count, torch.ones(count)], dim=-1)[None]


def chances(seen: Seen, most: int) -> list[float]:
    return [log_exactly(seen, whole(number)).exp().item() for number in range(most + 1)]


@pytest.mark.parametrize("copies", [2, 9])
def test_boxes_of_one_object_count_once(copies):
    box = torch.tensor([[0.2, 0.2, 0.6, 0.6]], dtype=torch.float64).expand(1, copies, 4)
    logits = torch.full((1, copies), math.log(0.9 / 0.1), dtype=torch.float64)
    got = chances(suppress(logits, box), 2)
    assert got == pytest.approx([0.1, 0.9, 0.0], abs=1e-3)
    assert hard_counts(logits, box).item() == 1


def test_boxes_apart_count_each():
    logits = torch.full((1, 2), math.log(0.9 / 0.1), dtype=torch.float64)
    assert chances(suppress(logits, apart(2)), 2) == pytest.approx([0.01, 0.18, 0.81], abs=1e-12)


def test_a_box_that_was_itself_suppressed_suppresses_none():
    """The middle box covers both others, which do not cover each other; as in non-maximum suppression two stay."""
    edges = torch.tensor([0.0, 0.23, 0.46], dtype=torch.float64)
    boxes = torch.stack([edges, torch.zeros(3), edges + 1, torch.ones(3)], dim=-1)[None]
    logits = torch.tensor([[9.0, 8.0, 7.0]], dtype=torch.float64)
    iou = overlaps(boxes)[0]
    assert [iou[0, 1].item(), iou[1, 2].item()] == pytest.approx([0.77 / 1.23, 0.77 / 1.23])
    assert iou[0, 2] < 0.4
    assert hard_counts(logits, boxes).item() == 2
    assert chances(suppress(logits, boxes), 3)[2] > 0.9


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 10_000))
def test_certain_boxes_count_as_ordinary_suppression_counts_them(certain, seed):
    boxes = random_boxes(len(certain), seed)
    iou = overlaps(boxes)[0] - torch.eye(len(certain), dtype=torch.float64)
    assume(not ((iou > 0.3) & (iou < 0.7)).any())
    logits = torch.tensor(
        [[30.0 - place if on else -30.0 - place for place, on in enumerate(certain)]], dtype=torch.float64
    )
    logits, order = logits.sort(descending=True)
    boxes = boxes[:, order[0]]
    number = hard_counts(logits, boxes)
    assert log_exactly(suppress(logits, boxes), number).exp().item() > 0.95


def test_overlaps_by_hand():
    boxes = torch.tensor([[[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6], [1, 1, 1, 1], [3, 3, 2, 2]]], dtype=torch.float64)
    got = overlaps(boxes)[0]
    assert got[0].tolist() == pytest.approx([1, 1 / 3, 0, 0, 0])
    assert got[3, 3] == got[4, 4] == 0  # nothing in them: nothing shared, and no division by zero


@pytest.mark.parametrize("number", [0, 1, 3])
def test_the_slope_in_logits_and_boxes(number):
    logits = torch.tensor([[2.0, 1.0, 0.3, -0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(5, seed=3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda o, b: log_exactly(suppress(o, b), whole(number)), (logits, boxes))
    assert torch.autograd.gradcheck(lambda o, b: log_some(suppress(o, b)), (logits, boxes))


@pytest.mark.parametrize("level", [-200.0, -60.0, -10.0, 0.0, 10.0, 60.0, 200.0])
@pytest.mark.parametrize("boxes", [apart(6).float(), random_boxes(6).float(), apart(1).float().expand(1, 6, 4)])
def test_far_from_right_the_slope_stays_and_does_not_explode(level, boxes):
    logits = torch.linspace(level + 1, level, 6)[None].requires_grad_(True)
    boxes = boxes.clone().requires_grad_(True)
    seen = suppress(logits, boxes)
    for score, wrong, up in (
        (log_exactly(seen, whole(2)), level < -5, True),
        (log_some(seen), level < -5, True),
        (seen.off.sum(dim=1), level > 5, False),
    ):
        slopes = torch.autograd.grad(score.sum(), (logits, boxes), retain_graph=True)
        assert score.isfinite().all()
        assert score <= 1e-5
        assert all(slope.isfinite().all() for slope in slopes)
        assert slopes[0].abs().max() <= 2.1
        if wrong:
            assert slopes[0].sum() > 0.9 if up else slopes[0].sum() < -0.9


# --- the whole score, by transformers and plain Python ---------------------------------------------------------------


def plain_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / sum(((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)), start=-shared) if shared else 0.0


def plain_chances(found: list[tuple[float, list[float]]], threshold: float, sharpness: float) -> list[float]:
    """P(N = 0), P(N = 1), ... by loops over (probability, box)."""
    found = sorted(found, key=lambda pair: -pair[0])
    left: list[float] = []
    for place, (_, box) in enumerate(found):
        share = 1.0
        for other in range(place):
            iou = plain_iou(box, found[other][1])
            share *= 1 - left[other] / (1 + math.exp(-30 * (iou - 0.5))) if iou else 1
        left.append(share)
    spread = [1.0]
    for (p, _), share in zip(found, left, strict=True):
        odds = (p / (1 - p) / (threshold / (1 - threshold))) ** sharpness
        q = odds / (1 + odds) * share
        spread = [a * (1 - q) + b * q for a, b in zip([*spread, 0.0], [0.0, *spread], strict=True)]
    return spread


def as_corners(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def owl_found(folder: Path, image, name: str) -> list[tuple[float, list[float]]]:
    model = Owlv2ForObjectDetection.from_pretrained(folder)
    pixels = Owlv2ImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt", do_resize=False)
    out = model(**clip_tokenizer()([f"a photo of a {name}"], return_tensors="pt"), **pixels)
    boxes = [as_corners(box) for box in out.pred_boxes[0].tolist()]
    return list(zip(out.logits[0, :, 0].sigmoid().tolist(), boxes, strict=True))


def yolos_found(folder: Path, image, index: int) -> list[tuple[float, list[float]]]:
    pixels = YolosImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    out = YolosForObjectDetection.from_pretrained(folder)(**pixels)
    boxes = [as_corners(box) for box in out.pred_boxes[0].tolist()]
    return list(zip(out.logits[0].softmax(dim=-1)[:, index].tolist(), boxes, strict=True))


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_owl_scores_equal_transformers_and_loops(owl, shift):
    image = picture(32, 32, shift)
    dog = plain_chances(owl_found(owl, image, "dog"), 0.2, 2.0)
    fox = plain_chances(owl_found(owl, image, "red fox"), 0.2, 2.0)
    images = tensor(image)
    counted = Count({"dog": 2, "red fox": 1}, model=owl)(images, [""]).total.item()
    assert counted == pytest.approx((math.log(dog[2]) + math.log(fox[1])) / 2, rel=1e-4, abs=1e-4)
    assert Contains(["dog"], model=owl)(images, [""]).total.item() == pytest.approx(
        math.log(1 - dog[0]), rel=1e-4, abs=1e-4
    )
    assert Without("red fox", model=owl)(images, [""]).total.item() == pytest.approx(
        math.log(fox[0]), rel=1e-4, abs=1e-4
    )
    assert 0.01 < dog[2] < 0.99


def test_yolos_scores_equal_transformers_and_loops(yolos):
    image = picture(32, 48)
    person = plain_chances(yolos_found(yolos, image, 1), 0.3, 2.0)
    images = tensor(image)
    for number in range(3):
        got = Count("woman", number, model=yolos, threshold=0.3)(images, [""]).total.item()
        assert got == pytest.approx(math.log(person[number]), rel=1e-4, abs=1e-4)
    got = Contains("person", model=yolos, threshold=0.3)(images, [""]).total.item()
    assert got == pytest.approx(math.log(1 - person[0]), rel=1e-4, abs=1e-4)


def test_only_the_likeliest_boxes_are_looked_at(owl, monkeypatch):
    from alignprop_pipe.rewards.objects import count as objects

    images = tensor(picture(32, 32))
    found = sorted(owl_found(owl, picture(32, 32), "dog"), key=lambda pair: -pair[0])
    monkeypatch.setattr(objects, "MOST_BOXES", 3)
    got = Count("dog", 1, model=owl)(images, [""]).total.item()
    assert got == pytest.approx(math.log(plain_chances(found[:3], 0.2, 2.0)[1]), abs=1e-3)
    with pytest.raises(RewardError, match="asks for 4 objects; .* finds 3 at most"):
        Count("dog", 4, model=owl)(images, [""])


# --- what is asked, and what is logged -------------------------------------------------------------------------------


def test_argument_columns_and_words_ask_the_same(owl):
    images, prompts = tensor(picture(32, 32), picture(32, 32, 2.0)), ["two dogs", "one cat"]
    reading = Count(model=owl)
    said = reading(images, prompts).total
    for targets in (
        {"count": [{"dog": 2}, {"cat": 1}]},
        {"count": ['{"dog": 2}', '{"cat": 1}']},
        {"subject": ["dog", "cat"], "count": ["two", "1"]},
        {"subject": ["dog", None], "count": [2, None]},
    ):
        assert torch.equal(reading(images, ["", "one cat"], targets).total, said)
    for reward in (Count("dog", 2, owl), Count("two dogs", model=owl), Count({"dog": 2}, model=owl)):
        reward._network = reading._network
        torch.testing.assert_close(reward(images, ["five pigs", ""]).total[0], said[0], rtol=1e-5, atol=1e-5)


def test_presence_and_absence_by_columns_and_words(owl):
    images, reading, removing = tensor(picture(32, 32)), Contains(model=owl), Without(model=owl)
    there = Contains(["dog", "ball"], owl)(images, [""]).total
    assert torch.equal(reading(images, [""], {"contains": ["dog, ball"]}).total, there)
    assert torch.equal(reading(images, ["three dogs and some balls"]).total, there)
    assert not torch.equal(reading(images, [""], {"subject": ["dog"]}).total, there)
    gone = Without("person", owl)(images, [""]).total
    assert torch.equal(removing(images, [""], {"without": ['["person"]']}).total, gone)
    assert torch.equal(removing(images, ["a street without people"]).total, gone)


def test_the_bundled_set_can_be_counted(owl):
    batch = named_sets()["emoji"].batch(seed=0, step=0, size=4)
    images = tensor(*(picture(32, 32, shift) for shift in range(4)))
    by_columns = Count(model=owl)(images, batch.prompts, batch.targets).total
    assert torch.equal(by_columns, Count(model=owl)(images, batch.prompts).total)


def test_two_words_for_one_name_are_counted_together(yolos):
    images = tensor(picture(32, 48))
    together = Count({"man": 1, "woman": 1}, model=yolos)(images, [""]).total
    assert torch.equal(together, Count({"person": 2}, model=yolos)(images, [""]).total)


def test_the_true_number_is_logged(owl):
    images = tensor(picture(32, 32), picture(32, 32, 2.0), picture(32, 32, 4.0))
    wanted: list[int] = []
    for image in (0.0, 2.0, 4.0):
        found = sorted(owl_found(owl, picture(32, 32, image), "dog"), key=lambda pair: -pair[0])
        kept: list[list[float]] = []
        for p, box in found:
            if p > 0.2 and all(plain_iou(box, other) <= 0.5 for other in kept):
                kept.append(box)
        wanted.append(len(kept))
    parts = Count("dog", wanted[0], owl)(images, DOGS).parts
    assert parts["count.detected"].tolist() == wanted
    assert parts["count.right"].tolist() == [float(number == wanted[0]) for number in wanted]
    assert Contains("dog", owl)(images, DOGS).parts["contains.right"].tolist() == [float(n > 0) for n in wanted]
    assert Without("dog", owl)(images, DOGS).parts["without.right"].tolist() == [float(n == 0) for n in wanted]
    assert set(parts) == {"count", "count.detected", "count.right"}
    assert sum(wanted) > 0


def test_logging_needs_no_second_look(owl):
    reward, images, calls = Count(model=owl), tensor(picture(32, 32), picture(32, 32, 2.0)), []
    reward(images, DOGS[:2])
    reward._network.network.register_forward_hook(lambda *_: None)
    reward._network.register_forward_hook(lambda *_: calls.append(1))
    for dtype in (torch.float32, torch.float16):
        reward(images.to(dtype), DOGS[:2])
    assert len(calls) == 2
    first = reward.extras(images, DOGS[:2], {})  # asked for by itself it looks anew
    assert len(calls) == 3
    reward.score(images.flip(0), DOGS[:2], {})
    again = reward.extras(images, DOGS[:2], {})  # and never takes another batch's numbers
    assert len(calls) == 5
    assert all(torch.equal(first[name], again[name]) for name in first)


# --- the contract of every scorer ------------------------------------------------------------------------------------

KINDS = [(Count, "owl"), (Contains, "owl"), (Count, "yolos")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}")
def kind(request: pytest.FixtureRequest):
    """Makes the reward with further arguments."""
    made, network = request.param
    folder = request.getfixturevalue(network)
    return lambda **given: made(model=folder, **given)


PEOPLE = ["two dogs and a person", "a dog", "a person"]


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (20, 50)])
def test_the_gradient_is_the_slope(kind, size):
    reward, generator = kind(), torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 0.4 + 0.3
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, PEOPLE[:2]).total.sum(), images)
    assert gradient.isfinite().all()
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, PEOPLE[:2]).total.sum() for h in (1e-6, -1e-6))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_batch_is_its_pictures_one_by_one(kind):
    reward, images = kind(), uniform(3, 3, 48, 56)
    single = torch.cat([reward(image[None], [prompt]).total for image, prompt in zip(images, PEOPLE, strict=True)])
    torch.testing.assert_close(reward(images, PEOPLE).total, single, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(kind, dtype):
    images = uniform(3, 3, 32, 32).float()
    full, half = kind()(images, PEOPLE).total, kind(dtype=dtype)(images, PEOPLE).total
    assert half.dtype == torch.float32
    # The miniature's random weights are rougher than a trained network's; float16 has three bits more.
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.5 if dtype == "bfloat16" else 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_scored_in_float32(kind, dtype):
    images = uniform(2, 3, 32, 32).to(dtype)
    got = kind()(images, PEOPLE[:2]).total
    assert torch.equal(got, kind()(images.float(), PEOPLE[:2]).total)


def test_offload_gives_the_same_value_and_gradient(kind):
    results = []
    for offload in (False, True):
        images = uniform(2, 3, 40, 32).float().requires_grad_(True)
        scores = kind(offload=offload)(images, PEOPLE[:2])
        (gradient,) = torch.autograd.grad(scores.total.sum(), images)
        results.append([scores.total.detach(), gradient, *scores.parts.values()])
    for plain, offloaded in zip(*results, strict=True):
        torch.testing.assert_close(offloaded, plain, rtol=1e-6, atol=1e-6)


def test_only_the_images_get_a_gradient(kind):
    reward, images = kind(), torch.rand(2, 3, 32, 32, requires_grad=True)
    reward(images, PEOPLE[:2]).total.sum().backward()
    assert images.grad is not None
    assert images.grad.any()
    assert not any(weight.requires_grad for weight in reward._network.parameters())
    assert not reward._network.training
    check_reward(reward, images, PEOPLE[:2], {})


def test_without_passes_the_dry_call(owl):
    check_reward(Without("dog", owl), torch.rand(1, 3, 20, 30), [""], {})


def test_as_a_judge_it_needs_no_graph(kind):
    images, reward = torch.rand(2, 3, 32, 32), kind()
    with torch.no_grad():
        scores = reward(images, PEOPLE[:2])
    assert not scores.total.requires_grad
    assert torch.equal(scores.total, reward(images, PEOPLE[:2]).total)


def test_first_used_in_inference_mode_it_can_train_later(kind):
    reward, images = kind(), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        reward(images, PEOPLE[:1])
    images.requires_grad_(True)
    reward(images, PEOPLE[:1]).total.sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (128, 40)])
def test_any_size_of_picture(kind, size):
    assert kind()(torch.rand(1, 3, *size), PEOPLE[:1]).total.isfinite().all()


@pytest.mark.parametrize("network", ["owl", "yolos"])
def test_steps_up_the_gradient_bring_two_dogs_nearer(network, request):
    reward = Count("dog", 2, model=request.getfixturevalue(network))
    images = (uniform(2, 3, 32, 48).float() * 0.4 + 0.3).requires_grad_(True)
    values = []
    for _ in range(16):
        scores = reward(images, ["", ""]).total
        values.append(scores.detach())
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-8)
        images = (images.detach() + 0.05 * gradient / norm).clamp(0, 1).requires_grad_(True)
    assert (values[-1] > values[0] + 0.05).all()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ['count({"dog": 2, "cat": 1})', 'count("dog", 2)', 'contains(["dog", "ball"])', 'without("person", threshold=0.3)'],
)
def test_expressions_come_back(text):
    assert str(parse_reward(text)) == text
    assert parse_reward(text) == parse_reward(text)
    assert not parse_reward(text).reads_prompts


def test_without_an_argument_prompts_are_read():
    assert parse_reward("count").reads_prompts
    assert parse_reward("contains").reads_prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('count("dog")', "a whole number from 0 to 24"),
        ('count({"dog": 2}, 3)', "one name goes with a number"),
        ('count("dog", 2.5)', "a whole number"),
        ("contains([])", "a name such as"),
        ("without(3)", "a name such as"),
        ('count("dog", 2, threshold=1.5)', "between 0 and 1"),
        ('count("dog", 2, threshold="high")', "between 0 and 1"),
        ('count("dog", 2, dtype="int8")', "bfloat16"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(text, message, unchecked):
    with pytest.raises(RewardError, match=message):
        parse_reward(text)


def test_a_prompt_that_says_nothing_is_refused_with_the_three_ways(owl):
    with pytest.raises(RewardError, match="three ways"):
        Count(model=owl)(torch.rand(1, 3, 32, 32), ["a lovely evening"])


def test_a_name_that_yolos_never_learnt_is_refused(yolos):
    with pytest.raises(RewardError, match="knows no 'zeppelin'"):
        Contains("zeppelin", yolos)(torch.rand(1, 3, 32, 32), [""])
