"""Text to reward and back; errors that point at the character."""

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import REGISTRY, Brightness, Colour, Jpeg, Reward, RewardEntry, WeightedSum, parse_reward

NAMES = ["brightness", "colour", "sharpness", "symmetry", "tv", "jpeg", "clip"]


class Least(Reward):
    """A combinator, as others will write them: rewards among its arguments."""

    name = "least"

    def __init__(self, *rewards, above=None, table=None):
        self.rewards = rewards


class Dotted(Brightness):
    name = "bright2.1"


@pytest.fixture(autouse=True)
def _more_names(monkeypatch):
    for kind in (Least, Dotted):
        where = f"{__name__}:{kind.__name__}"
        monkeypatch.setitem(REGISTRY, kind.name, RewardEntry(name=kind.name, summary="", licence="", where=where))


@pytest.mark.parametrize(
    "text",
    [
        "clip",
        "-jpeg",
        "clip + 0.1*jpeg(quality=80) - tv",
        "bright2.1 + 0.5*bright2.1 - 0.1*jpeg(quality=80)",
        "-0.5*clip + 3*jpeg(95)",
        'clip(model="openai/clip-vit-base-patch32", scale=2.5)',
        "clip(revision=None)",
        "1e-05*tv",
        "0*tv",
        "least(clip, 0.5*jpeg - tv, above=-0.3)",
        'least(least(tv), least(-clip), table={"dog": 2, "häuser": [1, 2.5, True]})',
        "tv - torch:sigmoid",
        "min(clip + tv, 0.5*jpeg)",
        "zscore(clip + 0.5*bright2.1, mean=0.71, std=0.08) - 2*scaled(jpeg(quality=30), low=-0.3, high=1e-05)",
        "softmin(zscore(clip), -zscore(tv), least(torch:sigmoid), temperature=0.25)",
        "clip_above(min(zscore(clip, 0.7, 0.1), clip_above(-tv, -0.02)), 2) + watch(emoji_judge)",
        'least(tv, above=[1, [clip, -0.5*tv], {"a": min(tv, jpeg)}], table={})',
        'clip(model="C:\\\\new\\\\models")',
        'clip(model="a\u2003b\u00a0c\\n\\ud800")',
        "clip(scale=1e999) + clip(scale=-1e999)",
    ],
)
def test_round_trip_is_exact(text):
    value = parse_reward(text, allow_code=True)
    assert str(value) == text
    assert parse_reward(str(value), allow_code=True) == value


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" clip+0.10*jpeg ", "clip + 0.1*jpeg"),
        ("clip*2 + +tv", "2*clip + tv"),
        ("-(clip - 2*(tv + jpeg))", "-clip + 2*tv + 2*jpeg"),
        ("1*clip", "clip"),
        ("jpeg(\n  quality=80\n) \t- tv", "jpeg(quality=80) - tv"),
        ("clip(model='a\\'b')", 'clip(model="a\'b")'),
        ("jpeg()", "jpeg"),
        ("2*(clip + tv)", "2*clip + 2*tv"),
        ("-(clip - tv)", "-clip + tv"),
        ("clip*0.5", "0.5*clip"),
        ("2*(0.5*clip)", "clip"),
        ("--clip", "clip"),
        ("min(clip*2, -(tv - jpeg))", "min(2*clip, -tv + jpeg)"),
        ("clip_above(2*(0.5*clip), 1)", "clip_above(clip, 1)"),
        (r'clip(model="C:\models")', r'clip(model="C:\\models")'),
    ],
)
def test_spelling_is_made_plain(text, plain):
    assert str(parse_reward(text)) == plain
    assert parse_reward(text) == parse_reward(plain)


def test_text_and_operators_give_the_same_value():
    assert parse_reward("brightness + 0.5*colour - 0.1*jpeg(quality=30)") == (
        Brightness() + 0.5 * Colour() - 0.1 * Jpeg(quality=30)
    )
    assert parse_reward("brightness - 0.5*(colour - jpeg)") == Brightness() - 0.5 * (Colour() - Jpeg())


WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)
TERMS = st.one_of(
    st.sampled_from(NAMES),
    st.integers(1, 100).map(lambda quality: f"jpeg(quality={quality})"),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda model: REGISTRY["clip"].make(model=model)),
)


@given(st.lists(st.tuples(WEIGHTS, TERMS), min_size=1, max_size=5))
def test_any_sum_survives_text(terms):
    rewards = [(weight, parse_reward(term) if isinstance(term, str) else term) for weight, term in terms]
    value = WeightedSum(rewards)
    again = parse_reward(str(value))
    assert str(again) == str(value)
    assert (again if isinstance(again, WeightedSum) else WeightedSum([(1, again)])) == value


MODELS = st.text(st.characters(), max_size=8)  # also quotes, line ends, spaces of every kind and half surrogates
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def made(name, *children, **arguments):
    return REGISTRY[name].make(*children, **arguments)


def combined(inner):
    """Rewards of rewards, of every kind."""
    return st.one_of(
        st.lists(st.tuples(NUMBERS.filter(lambda x: abs(x) < 1e20), inner), min_size=1, max_size=3).map(WeightedSum),
        st.tuples(inner, inner).map(lambda pair: pair[0] - 0.5 * pair[1]),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: made("min", *some)),
        st.tuples(inner, inner).map(lambda pair: made("softmin", *pair, temperature=0.1)),
        inner.map(lambda one: made("zscore", one)),
        st.tuples(inner, NUMBERS).map(lambda pair: made("zscore", pair[0], mean=pair[1], std=1e-07)),
        st.tuples(inner, NUMBERS).map(lambda pair: made("scaled", pair[0], pair[1], high=pair[1] * 0.5 + 1)),
        st.tuples(inner, st.integers(-5, 5)).map(lambda pair: made("clip_above", *pair)),
        inner.map(lambda one: made("least", one, above=[1, (one, None, True)], table={"a b": {"häuser": one}, "2": 2})),
    )


LEAVES = st.one_of(
    TERMS, st.sampled_from(["bright2.1", "torch:sigmoid", "python"]), MODELS.map(lambda model: made("clip", model))
)
TREES = st.recursive(
    LEAVES.map(
        lambda leaf: (
            made("python", "torch:tanh")
            if leaf == "python"
            else parse_reward(leaf, allow_code=True)
            if isinstance(leaf, str)
            else leaf
        )
    ),
    combined,
    max_leaves=6,
)


@given(TREES)
@settings(max_examples=60)
def test_any_tree_survives_text(value):
    again = parse_reward(str(value), allow_code=True)
    assert str(again) == str(value)
    assert parse_reward(str(again), allow_code=True) == again
    assert list(map(repr, again.trained())) == list(map(repr, value.trained()))


@given(st.text(alphabet="cliptv +-*()[]{}.,:=\"'0123456789e\\\n#é", max_size=30))
def test_no_text_gives_anything_but_a_reward_or_a_reward_error(text):
    with contextlib.suppress(RewardError):
        assert isinstance(parse_reward(text), Reward)


def caret(error: RewardError) -> int:
    """The place that an error points at."""
    lines = str(error).splitlines()
    assert len([line for line in lines if line.strip() == "^"]) == 1
    return lines[-1].index("^") - 2


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("clip + jpge", 7, "did you mean jpeg"),
        ("clip + 0.5*hpsv3.1", 11, "'hpsv3.1' is not known"),
        ("  zzz", 2, "known: "),
        ("clip + * tv", 7, "cannot be read"),
        ("clip +", 6, "cannot be read"),
        ("clip tv", 5, "cannot be read"),
        ("(clip", 0, "cannot be read"),
        ("clip / 2", 5, "'/' has no meaning"),
        ("clip; tv", 4, "';' has no meaning"),
        ("clip # best", 5, "'#'"),
        ("2*(clip + 1)", 3, "added and subtracted"),
        ("tv + clip*jpeg", 5, "multiplied with numbers"),
        ('tv - "jpeg"', 0, "added and subtracted"),
        ("tv + 1e999*clip", 5, "finite"),
        ("tv + jpeg(qualty=3)", 5, "it takes: quality"),
        ("tv + tv(3)", 5, "takes no arguments"),
        ("tv + jpeg(quality=0)", 5, "1 to 100"),
        ('least("é", jpge)', 11, "did you mean jpeg"),
        ("tv + jpeg(quality=3, quality=4)", 5, "given twice"),
        ("tv + jpeg(*3)", 10, "no meaning"),
        ("tv + jpeg(**{})", 5, "no meaning"),
        ("tv + clip[0]", 5, "no meaning"),
        ("least({1: tv, **{}})", 6, "no meaning"),
        ("tv + jpeg(quality=b'3')", 18, "no meaning"),
        ("tv + (lambda: 3)", 6, "no meaning"),
        ("tv if clip else tv", 0, "no meaning"),
        ("tv - my-blur.py:score", 5, "spaces around"),
        ("tv(), clip", 0, "no meaning"),
        ("clip + min(jpge, tv)", 11, "did you mean jpeg"),
        ("clip + min(tv, 0.5*(jpeg - zscore(softmni(tv, clip))))", 34, "did you mean softmin"),
        ("clip + min(tv)", 7, "two rewards or more are needed"),
        ("clip - zscore(tv, mean=0.5)", 7, "std= is missing"),
        ("clip - zscore(tv, 0.5, 0)", 7, "over 0"),
        ("scaled(tv, 1, high=1.0)", 0, "two different"),
        ("clip + softmin(tv, clip, temperature=0)", 7, "over 0"),
        ("clip_above(tv)", 0, "missing a required argument: 'value'"),
        ("zcore(clip)", 0, "did you mean zscore"),
        ("1e200*(1e200*clip)", 0, "finite"),
        (f"clip - {'9' * 400}*tv", 7, "finite"),
        ("clip + least(tv, größe=3)", 7, "größe"),
        ("clip + min(tv, watch(jpeg))", 7, "add it outside"),
    ],
)
def test_errors_point_at_the_character(text, place, message):
    with pytest.raises(RewardError, match=message.replace("(", r"\(")) as caught:
        parse_reward(text, allow_code=True)
    assert caret(caught.value) == place, str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zscore(3)", "a reward is needed"),
        ("min(clip, 'tv')", "not 'tv'"),
        ("clip_above(tv, '1')", "finite number"),
        ("softmin(tv, clip, temperature=None)", "finite number"),
    ],
)
def test_arguments_of_the_wrong_kind_are_said(text, said, unchecked):
    with pytest.raises(RewardError, match=said) as caught:
        parse_reward(f"tv + {text}")
    assert caret(caught.value) == 5


def test_an_expression_inside_a_reward_leaves_one_caret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from alignprop_pipe.rewards import parse_reward\nmine = lambda: 0\nparse_reward('cilp')"
    )
    with pytest.raises(RewardError) as caught:
        parse_reward("tv + own.py:mine", allow_code=True)
    assert str(caught.value).count("^") == 1
    assert caret(caught.value) == 5


@pytest.mark.parametrize("text", ["", "   ", "3", "'clip'", "None", "[clip]", "2*3"])
def test_what_is_no_reward_is_refused(text):
    with pytest.raises(RewardError, match="for example"):
        parse_reward(text)


@pytest.mark.parametrize("text", ["(" * 3000 + "tv" + ")" * 3000, "+".join(["tv"] * 20000), "tv\0", "clip('\0')"])
def test_hostile_text_is_refused(text):
    with pytest.raises(RewardError):
        parse_reward(text)


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(RewardError):
        parse_reward(f"tv + __import__('pathlib').Path('{target}').touch()")
    assert not target.exists()


def test_every_name_can_be_made_and_says_what_it_is():
    needed = {"ask": {"question": "Is it red?"}}
    for name, entry in REGISTRY.items():
        if name in ("python", "least") or entry.combines or entry.needs_acceptance:
            continue
        reward = entry.make(**needed.get(name, {}))
        assert reward.name == name == entry.name
        assert parse_reward(str(reward)) == reward
        assert name in needed or str(reward) == name
        assert entry.judge is not reward.trainable
    assert all(
        entry.summary and entry.licence for name, entry in REGISTRY.items() if name not in ("least", "bright2.1")
    )


def test_the_table_is_read_without_torch():
    code = "import sys; from alignprop_pipe.rewards import REGISTRY; assert REGISTRY['jpeg'].summary; "
    code += "import alignprop_pipe.rewards.registry, alignprop_pipe.config.expression; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_attribute_of_the_package():
    import alignprop_pipe.rewards as rewards

    assert set(dir(rewards)) == set(rewards.__all__)
    assert all(getattr(rewards, name) is not None for name in rewards.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        rewards.nothing  # noqa: B018
