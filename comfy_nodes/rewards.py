"""The nodes that make rewards, and the one that scores pictures with them."""

from functools import reduce
from operator import add
from typing import Any

from comfy_api.latest import io

from . import host
from .widgets import Widget, code_allowed, connected, reward_names, reward_script_data, reward_text

TERMS = 8
"""Rewards that one Combine node takes; its output goes into another for more."""
METHODS = ("sum", "min", "softmin")


def _reward(text: str, accept_license: bool) -> Any:
    from alignprop_pipe import parse_reward

    return parse_reward(text, accept_license=accept_license, allow_code=code_allowed())


class Reward(io.ComfyNode):
    """One reward of the registry, with its parameters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = Widget(
            "reward", "COMBO", "clip", "what a picture is scored by; every one is explained on the node's help page",
            options=tuple(reward_names()), required=True, extra={"alignprop_rewards": reward_script_data()},
        )  # fmt: skip
        return host.schema(
            node_id="AlignPropReward",
            display_name="Reward (AlignProp)",
            description="What the pictures shall become better at: agreement with the prompt, aesthetics, number of "
            "objects, small files, any question, ... The widgets change with the reward.",
            search_aliases=["alignprop", "reward", "aesthetic", "CLIP score", "HPSv2", "PickScore", "count objects"],
            inputs=[
                host.widget_input(names),
                io.String.Input("parameters", default="{}", optional=True, tooltip=PARAMETERS),
                io.Boolean.Input("accept_license", default=False, optional=True, tooltip=ACCEPT),
            ],
            outputs=[host.RewardSocket.Output(display_name="reward", tooltip="for Align, Combine Rewards and Score")],
        )

    @classmethod
    def validate_inputs(cls, reward: Any = None, parameters: Any = "{}", accept_license: Any = False) -> bool | str:
        if reward is None or parameters is None:  # comes from another node
            return True
        with host.working():
            return _checked(lambda: _reward(reward_text(reward, parameters), bool(accept_license)))

    @classmethod
    def execute(cls, reward: str, parameters: str = "{}", accept_license: bool = False) -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(_reward(reward_text(reward, parameters), accept_license))


class RewardText(io.ComfyNode):
    """A reward written as an expression."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropRewardText",
            display_name="Reward from Text (AlignProp)",
            description="A reward, or several with weights, written as one line: clip + 0.1*jpeg(quality=80).",
            search_aliases=["alignprop", "reward", "expression", "RLHF"],
            inputs=[
                io.String.Input("expression", default="clip", multiline=True, tooltip=EXPRESSION),
                io.Boolean.Input("accept_license", default=False, optional=True, tooltip=ACCEPT),
            ],
            outputs=[host.RewardSocket.Output(display_name="reward", tooltip="for Align, Combine Rewards and Score")],
        )

    @classmethod
    def validate_inputs(cls, expression: Any = None, accept_license: Any = False) -> bool | str:
        if expression is None:
            return True
        with host.working():
            return _checked(lambda: _reward(_one_line(expression), bool(accept_license)))

    @classmethod
    def execute(cls, expression: str, accept_license: bool = False) -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(_reward(_one_line(expression), accept_license))


class CombineRewards(io.ComfyNode):
    """A weighted sum of rewards, or the smallest of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[Any] = [
            io.Combo.Input("method", options=list(METHODS), default="sum", optional=True, tooltip=METHOD),
            io.Boolean.Input("same_scale", default=True, optional=True, tooltip=SAME_SCALE),
        ]
        for number in range(1, TERMS + 1):
            inputs += [
                host.RewardSocket.Input(f"reward_{number}", optional=True, tooltip=f"reward {number}"),
                io.Float.Input(
                    f"weight_{number}", default=1.0, min=-100.0, max=100.0, step=0.05, optional=True,
                    tooltip=f"how much reward {number} counts; below 0 it is held down (sum only)",
                ),
            ]  # fmt: skip
        return host.schema(
            node_id="AlignPropCombineRewards",
            display_name="Combine Rewards (AlignProp)",
            description="Several rewards at once, with weights. A muted or missing reward is left out.",
            search_aliases=["alignprop", "reward", "mix rewards", "weighted sum"],
            inputs=inputs,
            outputs=[host.RewardSocket.Output(display_name="reward", tooltip="for Align, Combine Rewards and Score")],
        )

    @classmethod
    def execute(cls, method: str = "sum", same_scale: bool = True, **terms: Any) -> io.NodeOutput:
        numbers = [number for number in range(1, TERMS + 1) if terms.get(f"reward_{number}") is not None]
        rewards = [connected(terms[f"reward_{number}"]) for number in numbers]
        weights = [float(terms.get(f"weight_{number}", 1.0)) for number in numbers]
        if not rewards:
            raise ValueError("Combine Rewards has no reward: connect one or more, and check that they are not muted")
        with host.working():
            return io.NodeOutput(combined(rewards, weights, method, same_scale))


def combined(rewards: list[Any], weights: list[float], method: str, same_scale: bool) -> Any:
    """The rewards as one; `same_scale` measures each on the base model's pictures before it is weighted."""
    from alignprop_pipe.rewards import Min, SoftMin, ZScore

    parts = [ZScore(reward) if same_scale and len(rewards) > 1 else reward for reward in rewards]
    if method == "sum":
        return reduce(add, [weight * part for weight, part in zip(weights, parts, strict=True)])
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; known: {', '.join(METHODS)}")
    return (Min if method == "min" else SoftMin)(*parts)


class Score(io.ComfyNode):
    """The scores of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropScore",
            display_name="Score (AlignProp)",
            description="Scores pictures by a reward: the mean as a number, and every picture's score as text.",
            search_aliases=["alignprop", "reward", "aesthetic score", "CLIP score", "judge"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="the pictures to score"),
                host.RewardSocket.Input("reward", tooltip="what to score them by"),
                io.String.Input("prompt", default="", multiline=True, optional=True, tooltip=SCORE_PROMPT),
                host.Prompts.Input("prompts", optional=True, tooltip="instead of prompt: the prompts that Sample drew"),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="the mean score"),
                io.String.Output(display_name="text", tooltip="every picture's score, part by part"),
            ],
        )

    @classmethod
    def execute(cls, images: Any, reward: Any, prompt: str = "", prompts: Any = None) -> io.NodeOutput:
        with host.working():
            from alignprop_pipe.rewards.networks.network import doubt_about

            pictures, reward = host.image_socket(images), connected(reward)
            batch = prompts_for(len(pictures), prompt, prompts)
            device = host.memory.get_torch_device()
            try:
                scores = reward.to(device)(pictures.to(device), batch.prompts, batch.targets)
            finally:
                reward.to("cpu")
            doubt = doubt_about(reward, [(pictures.shape[-1], pictures.shape[-2])])
            text = "\n".join([*([f"warning: {doubt}"] if doubt else []), score_lines(scores)])
            mean = float(scores.total.mean())
            return io.NodeOutput(mean, text, ui={"text": (text,)})


def prompts_for(count: int, prompt: str, prompts: Any) -> Any:
    """The prompts of `count` pictures with their columns. Raises ValueError for another number of prompts."""
    from alignprop_pipe import PromptSet

    if prompts is not None:
        return prompts.take([place % len(prompts) for place in range(count)])
    lines = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
    if len(lines) not in (1, count):
        raise ValueError(f"{len(lines)} prompts for {count} pictures: give one line for all, or one line for each")
    lines = lines * count if len(lines) == 1 else lines
    return PromptSet(tuple(lines)).take(range(count)) if all(lines) else _without_words(count)


def _without_words(count: int) -> Any:
    from alignprop_pipe.records import PromptBatch

    return PromptBatch([""] * count, {})


def score_lines(scores: Any) -> str:
    """`mean 0.43` and a line for each picture, with the parts where there are several."""
    parts = {name: values.tolist() for name, values in scores.parts.items()} if len(scores.parts) > 1 else {}
    lines = [f"mean {float(scores.total.mean()):.4g}"]
    for number, total in enumerate(scores.total.tolist()):
        words = "".join(f"  {name} {values[number]:.4g}" for name, values in parts.items())
        lines.append(f"{number + 1}: {total:.4g}{words}")
    return "\n".join(lines)


def _one_line(expression: str) -> str:
    return " ".join(expression.split())


def _checked(check: Any) -> bool | str:
    """True, or what is wrong in the words of the package."""
    try:
        check()
    except Exception as error:
        return str(error)
    return True


PARAMETERS = 'the parameters as JSON, such as {"quality": 60}; the widgets below write it'
ACCEPT = "accept the licence of a reward that binds its users (aesthetic2.5: AGPL-3.0)"
EXPRESSION = (
    "names with arguments, numbers, + - *: for example clip + 0.1*jpeg(quality=80), min(zscore(clip), zscore(colour)), "
    'count("dog", 2)'
)
METHOD = "sum: weighted sum. min: a picture is as good as its worst side. softmin: the same, smoothly"
SAME_SCALE = "bring them to one scale first, measured on the base model's pictures, so that weights mean something"
SCORE_PROMPT = "what the pictures should show: one line for all, or one line for each picture"
