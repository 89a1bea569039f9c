"""Which objects an English prompt names, and how many of each: a few rules and lists of words, no network.

"Two red apples on a table and a dog" -> {"red apple": 2}, see `read_objects` for what counts. `in_vocabulary` gives a
detector's word for an object, `singular` the singular of a noun.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

MOST = 24
"""The largest number of objects of one name that can be asked for."""

# --- words -----------------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBER_WORDS: Mapping[str, int] = {word: number for number, word in enumerate(_COUNTS)}
_ARTICLES = {**dict.fromkeys(("a", "an", "another", "single"), 1), "both": 2, "no": 0}
_DEFINITE = _words("the this that my your his her its our their")
_PAIRS = ("pair", "couple")
_SOME = _words("some any several many few various multiple numerous lots these those all")
_FILLERS = _words("exactly only just precisely very really half")
_PICTURES = _words(
    """photo photograph picture image painting drawing sketch illustration rendering render portrait closeup close-
    up shot view scene depiction print poster watercolor watercolour cartoon icon"""
)
_GROUPS = _words("group herd flock bunch crowd pack set collection row pile lot lots variety swarm school line")
_NO_OBJECTS = _words(
    """background foreground backdrop day night sunset sunrise morning evening afternoon sky weather light lighting
    style landscape distance front middle center centre top bottom side left right row line lot way mood color
    colour quality detail details resolution time kind sort type world air sunshine rain snow fog shade sea
    ocean beach forest jungle desert meadow park city town street room kitchen water grass sand ground floor
    space"""
)
_ADJECTIVES = _words(
    """red orange yellow green blue purple pink brown black white grey gray golden silver big small large little
    tiny huge tall short long old young new cute happy sad fluffy round bright dark beautiful"""
)
_PLACES = _words(
    """on in at under over above below into inside onto through across against around behind before by during for
    from near of off outside to toward towards underneath upon within with between among amid beneath atop along
    past like as"""
)
_JOINING = _words("and or nor plus & beside alongside versus vs while")
_VERBS = _words(
    """is are was were be has have had sit sits sat stand stands stood sleep sleeps play plays run runs jump jumps
    eat eats ride rides wear wears hold holds look looks lie lies lay walk walks chase chases swim swims that
    which who where dressed covered seated made surrounded filled drawn shaped perched isolated asleep alone
    together there"""
)
_ING_NOUNS = _words(
    """ring king wing string spring swing building painting thing ceiling earring pudding clothing darling duckling
    sibling herring starling dumpling awning railing
    evening morning lighting drawing rendering wedding"""
)
_UNITS = _words("year years month months day days hour hours mm cm inch inches percent dimensional am pm")

_IRREGULAR = {
    **{"children": "child", "people": "person", "persons": "person", "mice": "mouse", "lice": "louse", "dice": "die"},
    **{"geese": "goose", "feet": "foot", "teeth": "tooth", "oxen": "ox", "cacti": "cactus", "fungi": "fungus"},
    **{"octopi": "octopus", "leaves": "leaf", "wolves": "wolf", "knives": "knife", "wives": "wife", "lives": "life"},
    **{"shelves": "shelf", "bookshelves": "bookshelf", "loaves": "loaf", "thieves": "thief", "halves": "half"},
    **{"calves": "calf", "elves": "elf", "scarves": "scarf", "hooves": "hoof", "werewolves": "werewolf"},
    **{"buses": "bus", "gases": "gas", "lenses": "lens", "irises": "iris", "axes": "axe", "quizzes": "quiz"},
    **{"movies": "movie", "cookies": "cookie", "zombies": "zombie", "brownies": "brownie", "hoodies": "hoodie"},
    **{"selfies": "selfie", "smoothies": "smoothie", "collies": "collie", "pixies": "pixie", "genies": "genie"},
    **{"shoes": "shoe", "toes": "toe", "canoes": "canoe", "hoes": "hoe", "horseshoes": "horseshoe"},
    **{"snowshoes": "snowshoe", "headaches": "headache", "moustaches": "moustache", "avalanches": "avalanche"},
    **{"muses": "muse", "fuses": "fuse", "tortoises": "tortoise", "canvases": "canvas", "atlases": "atlas"},
}
_UNCHANGED = _words(
    """sheep fish deer moose bison aircraft spacecraft hovercraft salmon trout shrimp squid series species scissors
    pants jeans trousers shorts binoculars pliers tweezers headphones sunglasses glasses gas lens canvas atlas
    christmas iris skis"""
)
_MEN_ALONE = _words("specimen omen abdomen ramen cyclamen regimen")

_SYNONYMS = {
    **dict.fromkeys(_words("man woman boy girl child kid baby lady guy human pedestrian"), "person"),
    **{"sofa": "couch", "bike": "bicycle", "motorbike": "motorcycle", "plane": "airplane", "aeroplane": "airplane"},
    **{"television": "tv", "phone": "cell phone", "smartphone": "cell phone", "table": "dining table"},
    **{"plant": "potted plant", "ball": "sports ball", "puppy": "dog", "kitten": "cat", "doughnut": "donut"},
    **{"fridge": "refrigerator", "cup": "cup", "mug": "cup", "hydrant": "fire hydrant", "glass": "wine glass"},
}


def singular(word: str) -> str:
    """The singular of an English noun by simple rules: foxes -> fox, mice -> mouse, sheep -> sheep, bus -> bus."""
    if word in _UNCHANGED or word.endswith("fish"):
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and word not in _MEN_ALONE:
        return f"{word[:-3]}man"
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("sses", "xes", "shes", "ches", "zzes", "oes")):
        return word[:-2]
    return word[:-2] if word.endswith("uses") and not word.endswith("ouses") else word[:-1]


def in_vocabulary(name: str, vocabulary: Collection[str]) -> str | None:
    """What a detector calls the object: "red apples" -> "apple", "woman" -> "person". None for one it never learnt."""
    words = name.split()
    for start in range(len(words)):
        rest = words[start:]
        for spelling in (" ".join(rest), " ".join([*rest[:-1], singular(rest[-1])])):
            known = spelling if spelling in vocabulary else _SYNONYMS.get(spelling)
            if known in vocabulary:
                return known
    return None


# --- the reader of prompts -------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\d+(?:[.,:/-]?\w+)*|\w+(?:['-]\w+)*|[^\w\s\"'`]")
_STOP = re.compile(r"[^\w\s&]")


class _Role(Enum):
    SHOWN = auto()
    SETTING = auto()  # after a preposition: where it is, not what it shows
    ABSENT = auto()  # after "without"


class _Opener(Enum):
    """What a noun phrase starts with."""

    NONE = auto()
    BARE = auto()
    SOME = auto()
    ARTICLE = auto()
    DEFINITE = auto()
    NUMBER = auto()


@dataclass(slots=True)
class _Reader:
    """Walks over the words of one prompt, opens noun phrases and closes them wherever they must end."""

    vocabulary: Collection[str] | None
    found: dict[str, int | None] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    opener: _Opener = _Opener.BARE
    number: int | None = None
    role: _Role = _Role.SHOWN
    last: int | None = None
    """The number of the phrase before: in "a dog and cat" it holds for both."""

    def read(self, tokens: Sequence[str]) -> dict[str, int | None]:
        for token, following in zip(tokens, [*tokens, ""][1:], strict=True):
            self.step(token, following)
        self.close()
        return self.found

    def step(self, token: str, following: str) -> None:
        number = number_of(token)
        if _STOP.fullmatch(token) or token in _JOINING:
            self.join(token, following)
        elif token == "of":
            self.of()
        elif token in _PLACES:
            self.close()
            self.role, self.opener = _Role.SETTING, _Opener.NONE
        elif token == "without":
            self.close()
            self.role, self.opener = _Role.ABSENT, _Opener.BARE
        elif token == "dozen" and not self.words:
            self.open(_Opener.NUMBER, 12 * (self.number or 1))
        elif number is not None:
            self.open(_Opener.ARTICLE if token in ("a", "an") else _Opener.NUMBER, number)
        elif token in _PAIRS and following == "of":
            self.open(_Opener.NUMBER, 2)
        elif token in _SOME:
            self.open(_Opener.SOME)
        elif token in _DEFINITE and not (token == "that" and self.words):
            self.open(_Opener.DEFINITE)
        elif self.words and _is_verb(token):
            self.close()
        elif token in _UNITS and not self.words:
            self.opener, self.number = _Opener.SOME, None  # "3 years old" counts nothing
        elif token not in _FILLERS:
            self.words.append(token)

    def join(self, token: str, following: str) -> None:
        """A comma, a full stop or "and". Between adjectives it ends no phrase: two black and white cats."""
        told = number_of(following) is not None or following in _DEFINITE | _SOME
        if self.words and set(self.words) <= _ADJECTIVES and token in (",", "and") and not told:
            self.words += [] if token == "," else [token]
            return
        self.close()
        if token not in _JOINING:
            self.role, self.opener = _Role.SHOWN, _Opener.NONE
        elif self.role is _Role.ABSENT and told:
            self.role = _Role.SHOWN
        elif self.role is not _Role.SETTING:
            self.opener, self.number = (_Opener.ARTICLE, 1) if self.last == 1 else (_Opener.BARE, None)

    def of(self) -> None:
        """In "a photo of", "a group of" and "two of" what follows is meant; in "a bowl of" it is not."""
        if not self.words:
            return
        if singular(self.words[-1]) in _PICTURES | _GROUPS:
            self.words = []
            self.open(_Opener.BARE)
        else:
            self.close()
            self.role = _Role.SETTING

    def open(self, opener: _Opener, number: int | None = None) -> None:
        self.close()
        self.opener, self.number = opener, number

    def close(self) -> None:
        """End the phrase, and keep it if it names an object that the picture should show."""
        if self.words:
            number = self.meant()
            kept = self.opener is not _Opener.NONE and (
                self.role is not _Role.SETTING or (number or 0) > 1 or number == 0
            )
            name = self.named(number) if kept or self.vocabulary is not None else None
            if name:
                before = self.found.get(name, 0)
                self.found[name] = None if number is None or before is None else before + number
            self.last = number
        self.words, self.opener, self.number = [], _Opener.NONE, None

    def meant(self) -> int | None:
        if self.role is _Role.ABSENT:
            return 0
        head = self.words[-1]
        if self.opener is _Opener.DEFINITE and singular(head) == head and head not in _UNCHANGED:
            return 1
        return self.number if self.number is None or self.number <= MOST else None

    def named(self, number: int | None) -> str | None:
        if self.vocabulary is not None:
            return in_vocabulary(" ".join(self.words), self.vocabulary)
        head = self.words[-1] if number == 1 else singular(self.words[-1])
        drawn = head in _PICTURES and self.opener is not _Opener.NUMBER
        nothing = drawn or head in _NO_OBJECTS or not any(letter.isalpha() for letter in head)
        return None if nothing else " ".join([*self.words[:-1], head])


def read_objects(prompt: str, vocabulary: Collection[str] | None = None) -> dict[str, int | None]:
    """The objects that a prompt names, in the singular, with their number; None where it says no number ("dogs").

    A phrase counts that starts with a number (a word up to twelve or a numeral), an article or a word such as "some";
    at the start of the prompt and after "and" also a bare one. What stands after a preposition is the setting ("on a
    blue background") and counts only with a number of two or more ("with three apples"). "No" and "without" give 0.
    Adjectives stay in the name: "two red apples" -> {"red apple": 2}. With a `vocabulary` every phrase counts whose
    last words are in it, wherever it stands, and its name is the one in the vocabulary.
    """
    text = prompt.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _Reader(vocabulary).read(_TOKEN.findall(re.sub(r"\bnext\s+to\b", "beside", text)))


def number_of(token: str) -> int | None:
    """The number that a word says: "two", "2", "a" and "no" do; None for other words."""
    if token in NUMBER_WORDS or token in _ARTICLES:
        return NUMBER_WORDS.get(token, _ARTICLES.get(token))
    return int(token) if token.isdecimal() and len(token) < 7 else None


def _is_verb(token: str) -> bool:
    """A word that ends the phrase before it: a dog sleeping, a cat is, the man who."""
    return token in _VERBS or (token.endswith("ing") and token not in _ING_NOUNS)
