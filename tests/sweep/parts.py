"""Small parts for pipelines, by the name of their class: settings of networks, offline tokenizers, schedulers.

Everything is data that the builder hands to the real classes. Text encoders are `WIDTH` wide whatever their kind, so
that denoisers need one number.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import transformers
from miniatures import NOISE_SCHEDULE, WORDS, clip_tokenizer, make_scheduler, t5_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

WIDTH = 32

# --- tokenizers ------------------------------------------------------------------------------------------------------

CHAT_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|object_ref_start|>", "<|object_ref_end|>", "<think>", "</think>", "<pad>"),
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level pieces with merges for the miniatures' words, with and without a space in front."""
    merges: dict[tuple[str, str], None] = {}
    for word in [*WORDS, *("Ġ" + word for word in WORDS)]:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *dict.fromkeys(left + right for left, right in merges)]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, list(merges)


def qwen_tokenizer() -> Any:
    vocab, merges = _byte_pieces()
    for token in CHAT_TOKENS:
        vocab[token] = len(vocab)
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=merges, pad_token="<pad>", model_max_length=1024, padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS[1:-1])})
    tokenizer.chat_template = CHAT
    return tokenizer


def llama_tokenizer() -> Any:
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "<pad>", "<image>"))}
    for piece in [*("▁" + word for word in WORDS), "▁", *(chr(code) for code in range(33, 127)), "\n"]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = transformers.LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", model_max_length=1024)
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    vocab = {token: number for number, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    for piece in [*("▁" + word for word in WORDS), "▁", *(chr(code) for code in range(33, 127)), "\n"]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=1024)
    tokenizer.chat_template = CHAT
    return tokenizer


def bert_tokenizer() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(chr(code) for code in range(33, 127))]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=77)


def roberta_tokenizer() -> Any:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS if len(word) > 1]
    pieces += [(chr(code), -6.0) for code in range(33, 127)] + [("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=pieces, model_max_length=77)


def gpt2_tokenizer() -> Any:
    vocab, merges = _byte_pieces()
    vocab["<|endoftext|>"] = len(vocab)
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", model_max_length=77)


class TextAndPictures:
    """What a chat processor does with text and pictures; transformers' own needs torchvision for videos."""

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer()
        self.image_processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
            min_pixels=28 * 28, max_pixels=56 * 56
        )
        self.chat_template = CHAT
        self.image_token, self.image_token_id = "<|image_pad|>", self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **options: Any) -> Any:
        texts, found = [text] if isinstance(text, str) else list(text), {}
        options.pop("images_kwargs", None)
        if images is not None:
            found = dict(self.image_processor(images=images, return_tensors="pt"))
            sizes = iter((found["image_grid_thw"].prod(dim=1) // 4).tolist())
            texts = [self._with_room(one, sizes) for one in texts]
        tokens = self.tokenizer(texts, **options)
        if images is not None and hasattr(tokens["input_ids"], "shape"):
            found["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).long()
        return transformers.BatchFeature({**tokens, **found})

    def _with_room(self, text: str, sizes: Iterator[int]) -> str:
        head, *rest = text.split(self.image_token)
        return head + "".join(self.image_token * next(sizes) + part for part in rest)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **options: Any) -> Any:
        found = self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
        return [found] if tokenize and isinstance(messages[0], dict) and isinstance(found, list) else found

    def decode(self, *args: Any, **options: Any) -> str:
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)


class AllowsAll:
    """A safety checker that lets everything pass, in the place of one that is a package of its own."""

    def to(self, *_args: Any, **_options: Any) -> "AllowsAll":
        return self

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": clip_tokenizer,
    "T5Tokenizer": t5_tokenizer,
    "T5TokenizerFast": t5_tokenizer,
    "Qwen2Tokenizer": qwen_tokenizer,
    "LlamaTokenizer": llama_tokenizer,
    "GemmaTokenizer": gemma_tokenizer,
    "GemmaTokenizerFast": gemma_tokenizer,
    "BertTokenizer": bert_tokenizer,
    "XLMRobertaTokenizer": roberta_tokenizer,
    "GPT2Tokenizer": gpt2_tokenizer,
    "ByT5Tokenizer": transformers.ByT5Tokenizer,
    "RobertaTokenizer": roberta_tokenizer,
    "Qwen2VLProcessor": TextAndPictures,
    "Qwen2_5_VLProcessor": TextAndPictures,
    "Qwen3VLProcessor": TextAndPictures,
}
TOKENIZER_FOR = {
    r"U?M?T5Encoder.*": "T5Tokenizer",
    r"T5Gemma.*|Gemma.*": "GemmaTokenizer",
    r"CLIP.*": "CLIPTokenizer",
    r"Qwen.*|Glm.*|SmolLM.*|Mistral.*|Llama.*|PreTrainedModel": "Qwen2Tokenizer",
}
"""Where a pipeline takes any tokenizer: the one that goes with its text encoder."""

# --- text encoders ---------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
VISION = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e6}


def _vision_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _clip(kind: str) -> Callable[..., Any]:
    def make(tokenizer: Any, **config: Any) -> Any:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "projection_dim": WIDTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return getattr(transformers, kind)(transformers.CLIPTextConfig(**{**settings, **config}))

    return make


def _t5(kind: str, config_kind: str) -> Callable[..., Any]:
    def make(tokenizer: Any, **config: Any) -> Any:
        settings = {"vocab_size": len(tokenizer), "d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 1}
        settings |= {"num_heads": 2, "dropout_rate": 0.0}
        return getattr(transformers, kind)(getattr(transformers, config_kind)(**{**settings, **config}))

    return make


def _decoder_only(kind: str, config_kind: str, **usual: Any) -> Callable[..., Any]:
    def make(tokenizer: Any, **config: Any) -> Any:
        settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **SMALL, **usual, **config}
        return getattr(transformers, kind)(getattr(transformers, config_kind)(**settings))

    return make


def _qwen_vl(kind: str, config_kind: str, **vision: Any) -> Callable[..., Any]:
    def make(tokenizer: Any, **config: Any) -> Any:
        text = {"vocab_size": len(tokenizer), "head_dim": 16, "rope_parameters": ROPE, **SMALL, **config}
        settings = getattr(transformers, config_kind)(
            text_config=text, vision_config={**VISION, **vision}, **_vision_tokens(tokenizer)
        )
        return getattr(transformers, kind)(settings)

    return make


def _qwen_text(tokenizer: Any, **config: Any) -> Any:
    settings = {"vocab_size": len(tokenizer), "rope_parameters": ROPE, **SMALL, **config}
    return transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(
        transformers.Qwen2_5_VLTextConfig(**settings)
    )


def _bert(tokenizer: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **SMALL))


def _ldm_bert(tokenizer: Any) -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            encoder_layers=1,
            encoder_ffn_dim=WIDTH,
            encoder_attention_heads=2,
            head_dim=16,
            d_model=WIDTH,
            dropout=0.0,
        )
    )


def _multilingual_clip(tokenizer: Any) -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    return MultilingualCLIP(
        MCLIPConfig(numDims=WIDTH, transformerDimensions=WIDTH, vocab_size=len(tokenizer), pad_token_id=1, **SMALL)
    )


def _roberta_series(tokenizer: Any) -> Any:
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as series

    config = series.RobertaSeriesConfig(
        project_dim=WIDTH, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL
    )
    return series.RobertaSeriesModelWithTransformation(config)


def _t5_gemma(tokenizer: Any) -> Any:
    module = {"vocab_size": len(tokenizer), "head_dim": 16, "layer_types": ["full_attention"] * 2, **SMALL}
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return transformers.T5GemmaEncoderModel(config)


def _t5_gemma2(tokenizer: Any) -> Any:
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    text = {**SMALL, "vocab_size": len(tokenizer), "head_dim": 16, "dropout_rate": 0.0, "num_hidden_layers": 1}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    vision |= {"image_size": 16, "patch_size": 4}
    config = transformers.T5Gemma2EncoderConfig(text_config=text, vision_config=vision)
    return T5Gemma2Encoder(config)


def _mistral3(kind: str) -> Callable[..., Any]:
    def make(tokenizer: Any) -> Any:
        text = {"model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": None, **SMALL}
        vision = {"model_type": "pixtral", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"intermediate_size": WIDTH, "image_size": 28, "patch_size": 14, "head_dim": 16}
        config = transformers.Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        )
        return getattr(transformers, kind)(config)

    return make


def _llava(tokenizer: Any) -> Any:
    vision = {"model_type": "clip_vision_model", **IMAGE_ENCODER, "image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **SMALL}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3(tokenizer: Any) -> Any:
    text = {"model_type": "gemma3_text", "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 512, **SMALL}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


TEXT_ENCODERS: dict[str, Callable[..., Any]] = {
    "CLIPTextModel": _clip("CLIPTextModel"),
    "CLIPTextModelWithProjection": _clip("CLIPTextModelWithProjection"),
    "T5EncoderModel": _t5("T5EncoderModel", "T5Config"),
    "UMT5EncoderModel": _t5("UMT5EncoderModel", "UMT5Config"),
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    "Qwen2VLForConditionalGeneration": _qwen_vl("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", embed_dim=WIDTH),
    "Qwen3VLForConditionalGeneration": _qwen_vl(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
        patch_size=14,
    ),
    "Qwen3VLModel": _qwen_vl(
        "Qwen3VLModel", "Qwen3VLConfig", num_position_embeddings=64, deepstack_visual_indexes=[0], patch_size=14
    ),
    "Qwen2_5_VLTextModel": _qwen_text,
    "Qwen3Model": _decoder_only("Qwen3Model", "Qwen3Config", head_dim=16),
    "Qwen3ForCausalLM": _decoder_only("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    "Gemma2PreTrainedModel": _decoder_only("Gemma2Model", "Gemma2Config", head_dim=16, sliding_window=512),
    "GemmaPreTrainedModel": _decoder_only("GemmaModel", "GemmaConfig", head_dim=16, attn_implementation="eager"),
    "GlmModel": _decoder_only("GlmModel", "GlmConfig", head_dim=16),
    "LlamaModel": _decoder_only("LlamaModel", "LlamaConfig"),
    "LlamaForCausalLM": _decoder_only("LlamaForCausalLM", "LlamaConfig"),
    "SmolLM3ForCausalLM": _decoder_only("SmolLM3ForCausalLM", "SmolLM3Config"),
    "LlavaForConditionalGeneration": _llava,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Mistral3ForConditionalGeneration": _mistral3("Mistral3ForConditionalGeneration"),
    "Mistral3Model": _mistral3("Mistral3Model"),
    "T5GemmaEncoder": _t5_gemma,
    "T5GemmaEncoderModel": _t5_gemma,
    "T5Gemma2Encoder": _t5_gemma2,
    "BertModel": _bert,
    "LDMBertModel": _ldm_bert,
    "MultilingualCLIP": _multilingual_clip,
    "RobertaSeriesModelWithTransformation": _roberta_series,
}

# --- image encoders --------------------------------------------------------------------------------------------------

IMAGE_ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _vision(kind: str, config_kind: str) -> Callable[..., Any]:
    return lambda **config: getattr(transformers, kind)(
        getattr(transformers, config_kind)(**{**IMAGE_ENCODER, **config})
    )


OTHERS: dict[str, Callable[..., Any]] = {
    "CosmosSafetyChecker": AllowsAll,
    "BaseGuidance": diffusers.ClassifierFreeGuidance,
    "ClassifierFreeGuidance": diffusers.ClassifierFreeGuidance,
    "AdaptiveProjectedMixGuidance": diffusers.AdaptiveProjectedMixGuidance,
    "CLIPVisionModelWithProjection": _vision("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "CLIPVisionModel": _vision("CLIPVisionModel", "CLIPVisionConfig"),
    "SiglipVisionModel": _vision("SiglipVisionModel", "SiglipVisionConfig"),
    "CLIPImageProcessorPil": lambda **config: transformers.CLIPImageProcessorPil(
        **{"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, **config}
    ),
    "SiglipImageProcessorPil": lambda **config: transformers.SiglipImageProcessorPil(
        **{"size": {"height": 16, "width": 16}, **config}
    ),
}


def clip_processor(tokenizer: Any) -> Any:
    return transformers.CLIPProcessor(image_processor=OTHERS["CLIPImageProcessorPil"](), tokenizer=tokenizer)


# --- schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "EulerDiscreteScheduler": {**NOISE_SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1},
    "DPMSolverMultistepScheduler": NOISE_SCHEDULE,
    "DDPMScheduler": {"clip_sample": False},
    "UnCLIPScheduler": {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0},
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"},
    "LCMScheduler": {**NOISE_SCHEDULE, "set_alpha_to_one": False},
}


def scheduler(kind: str, **config: Any) -> Any:
    """By its class name, which may be the one that stands for many (`KarrasDiffusionSchedulers`)."""
    kind = "DDIMScheduler" if kind == "KarrasDiffusionSchedulers" else kind
    made = getattr(diffusers, kind)
    if kind in SCHEDULERS:
        return made(**{**SCHEDULERS[kind], **config})
    taken = inspect.signature(made.__init__).parameters
    return make_scheduler(kind, **config) if "beta_schedule" in taken else made(**config)
