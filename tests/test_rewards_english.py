"""Reading prompts: examples that say the rules, and properties over sentences put together at random."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.prompts import named_sets
from alignprop_pipe.rewards.objects.english import MOST, NUMBER_WORDS, in_vocabulary, number_of, read_objects, singular

COCO = ("person", "dog", "cat", "couch", "apple", "orange", "dining table", "skis", "scissors", "car", "cell phone")
PLURALS = {
    "dog": "dogs", "fox": "foxes", "mouse": "mice", "child": "children", "person": "people", "cactus": "cacti",
    "fish": "fish", "sheep": "sheep", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "woman": "women",
    "man": "men", "fireman": "firemen", "house": "houses", "horse": "horses", "bus": "buses", "glass": "glasses",
    "box": "boxes", "dish": "dishes", "church": "churches", "cherry": "cherries", "puppy": "puppies", "toy": "toys",
    "movie": "movies", "cookie": "cookies", "pie": "pies", "tomato": "tomatoes", "shoe": "shoes", "glove": "gloves",
    "dove": "doves", "cave": "caves", "goose": "geese", "tooth": "teeth", "foot": "feet", "octopus": "octopuses",
    "rose": "roses", "vase": "vases", "bee": "bees", "tree": "trees", "sandwich": "sandwiches", "lens": "lenses",
    "deer": "deer", "goldfish": "goldfish", "dress": "dresses", "blouse": "blouses", "virus": "viruses", "key": "keys",
    "mushroom": "mushrooms", "sunflower": "sunflowers", "banana": "bananas", "panda": "pandas", "axe": "axes",
    "pencil case": "pencil cases", "specimen": "specimens", "photo": "photos", "iris": "irises", "tie": "ties",
}  # fmt: skip
WORDS = ("a", "two", "3", "no", "without", "dog", "dogs", "and", ",", "of", "with", "on", "the", "red", "pair", "photo")
NOUNS = sorted(set(PLURALS) - {"glass", "photo", "pencil case"})


@pytest.mark.parametrize(("one", "many"), PLURALS.items())
def test_singular(one, many):
    expected = "glasses" if many == "glasses" else one  # spectacles are glasses too
    assert singular(many.split()[-1]) == expected.split()[-1]
    assert singular(one.split()[-1]) == one.split()[-1]


@given(st.text(alphabet="abcdeilmnosuvxy", max_size=9))
def test_singular_takes_any_word_and_never_makes_it_longer_by_much(word):
    assert len(singular(word)) <= len(word) + 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two dogs and a cat", {"dog": 2, "cat": 1}),
        ("Two dogs, three foxes and 12 mice.", {"dog": 2, "fox": 3, "mouse": 12}),
        ("one dog on a red background", {"dog": 1}),
        ("one dog on an orange background", {"dog": 1}),
        ("three red apples on a table", {"red apple": 3}),
        ("two black and white cats", {"black and white cat": 2}),
        ("two big, red dogs", {"big red dog": 2}),
        ("an orange and a banana", {"orange": 1, "banana": 1}),
        ("a photo of two dogs, highly detailed, 4k", {"dog": 2}),
        ("a group of three foxes in the snow", {"fox": 3}),
        ("a pair of shoes and a couple of wolves", {"shoe": 2, "wolf": 2}),
        ("a dozen eggs", {"egg": 12}),
        ("two dozen eggs", {"egg": 24}),
        ("a bowl of apples", {"bowl": 1}),
        ("a man with two dogs", {"man": 1, "dog": 2}),
        ("a dog running on the beach with three balls", {"dog": 1, "ball": 3}),
        ("a dog next to a cat", {"dog": 1, "cat": 1}),
        ("a woman wearing a hat", {"woman": 1, "hat": 1}),
        ("a dog that chases 2 cats", {"dog": 1, "cat": 2}),
        ("a dog and cat", {"dog": 1, "cat": 1}),
        ("dogs in the park", {"dog": None}),
        ("dog", {"dog": None}),
        ("a few dogs and several cats", {"dog": None, "cat": None}),
        ("the dog and the cats", {"dog": 1, "cat": None}),
        ("no cats and two dogs", {"cat": 0, "dog": 2}),
        ("a house without people or cars", {"house": 1, "person": 0, "car": 0}),
        ("two dogs without collars and a cat", {"dog": 2, "collar": 0, "cat": 1}),
        ("a beach with no people", {"person": 0}),
        ("a red fish and a blue fish", {"red fish": 1, "blue fish": 1}),
        ("a dog, a dog and a dog", {"dog": 3}),
        ("100 dogs", {"dog": None}),
        ("3d render of a car, 16:9, f/1.8, 35mm", {"car": 1}),
        ("(two dogs:1.3)", {"dog": 2}),
        ('"two dogs" - photo', {"dog": 2}),
        ("a 3 year old child", {"old child": None}),
        ("a child\N{RIGHT SINGLE QUOTATION MARK}s toy and five fish", {"child's toy": 1, "fish": 5}),
        ("four cacti on a pink background", {"cactus": 4}),
        ("a bus and two buses", {"bus": 3}),
        ("a beautiful sunset over the sea", {}),
        ("", {}),
    ],
)
def test_what_a_prompt_says(prompt, expected):
    assert read_objects(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("three red apples on a table", {"apple": 3, "dining table": 1}),
        ("a man and two women in a park", {"person": 3}),
        ("one dog on an orange background", {"dog": 1}),
        ("a bowl of oranges and a zeppelin", {"orange": None}),
        ("two phones beside a pair of skis", {"cell phone": 2, "skis": 2}),
        ("a street without cars", {"car": 0}),
    ],
)
def test_with_a_vocabulary_its_words_count_wherever_they_stand(prompt, expected):
    assert read_objects(prompt, COCO) == expected


def test_the_bundled_set_says_in_its_prompts_what_its_columns_say():
    bundled = named_sets()["emoji"]
    for prompt, subject, count in zip(
        bundled.prompts, bundled.targets["subject"], bundled.targets["count"], strict=True
    ):
        assert read_objects(prompt) == {subject: NUMBER_WORDS[count]}


def phrase(number: int, noun: str, as_word: bool) -> str:
    words = [word for word, value in NUMBER_WORDS.items() if value == number]
    return f"{words[0] if as_word and words else number} {noun if number == 1 else PLURALS[noun]}"


objects = st.dictionaries(st.sampled_from(NOUNS), st.integers(1, MOST), min_size=1, max_size=4)


@given(
    objects, st.booleans(), st.sampled_from(["", "a photo of ", "A picture of "]),
    st.sampled_from(["", " on a blue background", " in the snow", " at a lake under a tree", ", highly detailed"]),
)  # fmt: skip
def test_sentences_are_read_back(asked, as_word, start, end):
    listed = [phrase(number, noun, as_word) for noun, number in asked.items()]
    said = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]
    assert read_objects(start + said + end) == asked
    assert read_objects(start + ", ".join(reversed(listed)) + end) == asked


@given(objects, st.sampled_from(["red", "small", "happy"]))
def test_an_adjective_stays_in_an_open_name_and_goes_from_a_known_one(asked, adjective):
    said = " and ".join(phrase(number, noun, False).replace(" ", f" {adjective} ", 1) for noun, number in asked.items())
    assert read_objects(said) == {f"{adjective} {noun}": number for noun, number in asked.items()}
    assert read_objects(said, NOUNS) == asked


@given(st.text(max_size=60))
def test_any_text_can_be_read(text):
    for name, number in (read_objects(text) | read_objects(text, COCO)).items():
        assert name
        assert number is None or number >= 0


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_any_order_of_its_words_can_be_read(words):
    assert all(name.strip() == name for name in read_objects(" ".join(words)))


def test_numbers():
    assert [number_of(word) for word in ("two", "2", "an", "no", "twelve", "dog", "2.5", "1" * 9)] == [
        2, 2, 1, 0, 12, None, None, None,
    ]  # fmt: skip


def test_in_vocabulary():
    names = ("red apples", "apple", "woman", "sofa", "skis", "pair of scissors", "zeppelin", "dog house")
    assert [in_vocabulary(name, COCO) for name in names] == [
        "apple", "apple", "person", "couch", "skis", "scissors", None, None,
    ]  # fmt: skip
