"""`ask`: a property said as a question; the score is how much likelier "yes" is than "no".

Images [B, 3, H, W] in [0, 1] to log p(answer) - log p(against), in nats, by a visual question answering model of
transformers: BLIP (Li et al., arXiv 2201.12086) or GIT (Wang et al., arXiv 2205.14100). The decoder is told each
answer, and the chances of its words and of ending there are summed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignprop_pipe.bundled import bundled_path
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.networks.network import NetworkReward
from alignprop_pipe.rewards.networks.preprocess import Preprocess
from alignprop_pipe.rewards.networks.pretrained import (
    load_config,
    load_network,
    load_preprocessor_config,
    load_tokenizer,
)

MODEL = "Salesforce/blip-vqa-base"

Pixels = Float[Tensor, "batch 3 side side"]
Odds = Callable[[Any, Tensor, list[list[int]], list[list[int]]], Tensor]


class Ask(NetworkReward):
    """Log-odds of the answer "yes" against "no" to a question about the picture: 0 is undecided, most are -10 to 10.

    Args:
        question: for example "is the dog wearing a hat?". `{prompt}` in it stands for the picture's prompt.
        answer: what the model should say.
        against: what it should not say.
        model: a BLIP for question answering (transformers' BlipForQuestionAnswering), or a GIT that learnt to answer
            (GitForCausalLM, such as microsoft/git-base-vqav2, MIT), by Hub id or folder; "emoji" is the bundled
            answerer, which knows yes and no about subject, number and background of emoji pictures.
        revision: branch, tag or commit of the model on the Hub.
        dtype: number format of the network: "float32", "bfloat16" or "float16".
        offload: keep the network in main memory between scores.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Ask
        >>> ask = Ask("does the picture show {prompt}?", model="emoji")
        >>> ask(torch.rand(2, 3, 64, 64), ["a fox", "two cats"]).total.shape
        torch.Size([2])
    """

    name = "ask"
    entry = RewardEntry(
        summary='any property that can be asked: log-odds of "yes" to "no" for ask("is the dog wearing a '
        'hat?"); for emoji pictures model="emoji" is bundled: ask("does the picture show {prompt}?", '
        'model="emoji")',
        licence="BSD-3-Clause; bundled weights: Apache-2.0",
        size_mb=1540,
        range_text="about -10 to 10, 0 is undecided",
        weights=(("Salesforce/blip-vqa-base", "model.safetensors"),),
        memory_mb=1378,
    )
    sources = ("model",)

    def __init__(
        self,
        question: str,
        answer: str = "yes",
        against: str = "no",
        model: str | Path = MODEL,
        revision: str | None = None,
        dtype: str = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, revision, dtype, offload)
        for name, text in (("question", question), ("answer", answer), ("against", against)):
            if not isinstance(text, str) or not text.strip():
                raise RewardError(f'ask({name}={text!r}): a text is needed, as in ask("is the dog wearing a hat?")')
        if answer.strip().lower() == against.strip().lower():
            raise RewardError(f"ask(answer={answer!r}, against={against!r}): two different answers are needed")
        self.question, self.answer, self.against = question, answer, against
        self.reads_prompts = "{prompt}" in question
        self._words: Any = None
        self._preprocess: Any = None

    def load(self) -> Any:
        import transformers

        source = str(bundled_path("emoji-answerer")) if self.model == "emoji" else self.model
        self._preprocess = Preprocess.from_config(load_preprocessor_config(source, self.revision))
        self._words = load_tokenizer(source, self.revision)
        for answer in (self.answer, self.against):
            if self._words.unk_token_id in self._words(answer).input_ids:
                raise RewardError(
                    f"the tokenizer in {self.model!r} does not know all of the answer {answer!r}: use other words, or "
                    "get its files again from where the model came"
                )
        family = load_config(source, self.revision).model_type
        if family not in _FAMILIES:
            known = ", ".join(kind for kind, _ in _FAMILIES.values())
            raise RewardError(f"{self.model!r} is a {family!r} model; ask can ask: {known}")
        return load_network(getattr(transformers, _FAMILIES[family][0]), source, self.revision)

    def text_of(self, prompt: str) -> str:
        return self.question.replace("{prompt}", prompt)

    def rate(self, network: Any, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        answers = [self._words(text, add_special_tokens=False).input_ids for text in (self.answer, self.against)]
        room = network.config.get_text_config().max_position_embeddings - max(map(len, answers)) - 1
        questions = list(map(self.text_of, prompts))
        for question in dict.fromkeys(questions):
            self.note_length(question, len(self._words(question, verbose=False).input_ids), room, "question")
        words = self._words(questions, truncation=True, max_length=room).input_ids
        _, odds = _FAMILIES[network.config.model_type]
        return odds(network, self._preprocess(images), words, answers).to(images.dtype)


def blip_odds(
    network: Any, pixels: Pixels, questions: list[list[int]], answers: list[list[int]]
) -> Float[Tensor, " batch"]:
    """Log-odds of the first answer to the second by BlipForQuestionAnswering: questions read by an encoder.

    Questions are asked in groups of one length: the cross-attention in transformers 5 ignores the mask that would
    hide filling words.
    """
    seen = network.vision_model(pixel_values=pixels).last_hidden_state
    rows_of: dict[int, list[int]] = {}
    for row, words in enumerate(questions):
        rows_of.setdefault(len(words), []).append(row)
    odds = []
    for rows in rows_of.values():
        ids = torch.tensor([questions[row] for row in rows], device=seen.device)
        asked = network.text_encoder(input_ids=ids, encoder_hidden_states=seen[rows]).last_hidden_state
        chances = [_blip_log_chance(network, asked, answer) for answer in answers]
        odds.append(chances[0] - chances[1])
    order = torch.tensor([row for rows in rows_of.values() for row in rows], device=seen.device)
    return torch.cat(odds)[order.argsort()]


def _blip_log_chance(network: Any, asked: Tensor, answer: list[int]) -> Float[Tensor, " batch"]:
    """Log-probability that the decoder gives this answer, word by word, and then ends."""
    said = [network.decoder_start_token_id, *answer, network.config.text_config.sep_token_id]
    said = torch.tensor(said, device=asked.device).expand(len(asked), -1)
    logits = network.text_decoder(input_ids=said[:, :-1], encoder_hidden_states=asked, use_cache=False).logits
    return _log_chances(logits, said[:, 1:]).sum(dim=1)


def git_odds(
    network: Any, pixels: Pixels, questions: list[list[int]], answers: list[list[int]]
) -> Float[Tensor, " batch"]:
    """Log-odds of the first answer to the second by GitForCausalLM: picture, question and answer in one row.

    Rows are filled up on the right, which words before cannot see.
    """
    end = network.config.eos_token_id
    # The question without its own end.
    rows = [(question[:-1], [*answer, end]) for answer in answers for question in questions]
    length = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), length), end)
    counted = torch.zeros(len(rows), length)
    for row, (question, answer) in enumerate(rows):
        stop = len(question) + len(answer)
        ids[row, :stop] = torch.tensor(question + answer)
        counted[row, len(question) : stop] = 1
    ids, counted = ids.to(pixels.device), counted.to(pixels.device)
    # One picture serves both answers: the network repeats what it saw when there are more texts.
    logits = network(input_ids=ids[:, :-1], pixel_values=pixels, use_cache=False).logits[:, 1 - length :]
    chances = (_log_chances(logits, ids[:, 1:]) * counted[:, 1:]).sum(dim=1)
    wanted, unwanted = chances.chunk(2)
    return wanted - unwanted


def _log_chances(logits: Tensor, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch words"]:
    # Half precision would lose small differences in the sum over the vocabulary.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(dim=-1).gather(-1, words[:, :, None]).squeeze(-1)


_FAMILIES: dict[str, tuple[str, Odds]] = {
    "blip": ("BlipForQuestionAnswering", blip_odds),
    "git": ("GitForCausalLM", git_odds),
}
"""What transformers calls a family: the class that answers in it, and how its answers are read."""
