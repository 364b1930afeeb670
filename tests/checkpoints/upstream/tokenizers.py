"""Tokenizers that only diffusers' own tests need, made of the words of vocabulary.py."""

import json
import string
from pathlib import Path
from typing import Any

import transformers

from tests.checkpoints.cache import cached
from tests.checkpoints.vocabulary import (
    CHAT,
    PUNCTUATION,
    WORD_START,
    WORDS,
    bert_tokenizer,
    chat_tokenizer,
    clip_tokenizer,
    t5_tokenizer,
)

__all__ = [
    "bert_tokenizer", "chat_glm", "clip_tokenizer", "gemma", "glm_image", "llama", "qwen_vl",
    "smallest_gemma", "t5_tokenizer", "xlm_roberta",
]  # fmt: skip

QWEN_IDS = {
    name: 151643 + index
    for index, name in enumerate(
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
        "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> "
        "<|vision_pad|> <|image_pad|> <|video_pad|>".split()
    )
}
"""Special tokens of Qwen2-VL: configurations have these ids as defaults."""
LETTERS = string.ascii_letters + string.digits + PUNCTUATION + ":<>|[]()*_/\n"


def qwen_vl(*, is_dense: bool = False) -> transformers.Qwen2Tokenizer:
    """is_dense: no id is free, so that the number of tokens is one more than the last id."""
    plain = chat_tokenizer()
    ids = {token: index for token, index in plain.get_vocab().items() if not token.startswith("<|")}
    if is_dense:
        ids |= {f"<unused{index}>": index for index in range(len(ids), QWEN_IDS["<|endoftext|>"])}
    template = CHAT.replace(
        "{{ part.text }}",
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}",
    )
    made = transformers.Qwen2Tokenizer(
        vocab=ids | QWEN_IDS,
        merges=_merges(plain),
        chat_template=template,
        model_max_length=1024,
    )
    made.add_special_tokens({"extra_special_tokens": list(QWEN_IDS)})
    return made


def glm_image() -> transformers.Qwen2Tokenizer:
    """With the tokens by which the processor of GLM-Image writes the size of an image."""
    plain = chat_tokenizer()
    return transformers.Qwen2Tokenizer(
        vocab=plain.get_vocab(),
        merges=_merges(plain),
        chat_template=CHAT.replace(
            "{{ part.text }}",
            "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}",
        ),
        bos_token="<|im_start|>",
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
    )


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [tuple(pair) for pair in state["model"]["merges"]]


def _spelled(special: list[str]) -> dict[str, int]:
    """Return a vocabulary of bytes, letters and words."""
    pieces = [*special, *(f"<0x{number:02X}>" for number in range(256)), WORD_START, *LETTERS]
    words = [WORD_START + word for word in WORDS if len(word) > 1]
    return {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *words]))}


def llama() -> transformers.LlamaTokenizer:
    made = transformers.LlamaTokenizer(
        vocab=_spelled(["<unk>", "<s>", "</s>"]),
        merges=[],
        chat_template=CHAT,
    )
    made.add_special_tokens({"pad_token": "<unk>"})
    return made


def gemma() -> transformers.GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return transformers.GemmaTokenizer(vocab=_spelled(special), merges=[], chat_template=CHAT)


def smallest_gemma() -> transformers.GemmaTokenizer:
    """Eight tokens: the text encoders of some tests have no more."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "a", "e", WORD_START]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[])


def xlm_roberta() -> transformers.XLMRobertaTokenizer:
    words = [(WORD_START + word, -4.0) for word in WORDS if len(word) > 1]
    letters = [(letter, -8.0) for letter in dict.fromkeys(LETTERS)]
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    vocabulary = [*special, *words, (WORD_START, -6.0), *letters, ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=77)


def chat_glm() -> Any:
    """Return the tokenizer of Kolors: a sentencepiece model with control tokens in code."""
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    folder = cached("sentencepiece", {"words": WORDS}, _train_sentence_pieces)
    return ChatGLMTokenizer(vocab_file=str(folder / "tokenizer.model"))


def _train_sentence_pieces(folder: Path) -> None:
    import sentencepiece

    text = folder / "words.txt"
    text.write_text("\n".join([*WORDS, " ".join(WORDS)]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
