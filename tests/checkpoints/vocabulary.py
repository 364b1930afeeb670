"""Tokenizers of the three kinds the model types use, made from a short word list instead of files
from a hub.
"""

import math
import re
import string

from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

# fmt: off
WORDS = [
    "a", "an", "the", "of", "in", "on", "and", "with", "at", "cat", "dog", "car", "tree", "house",
    "red", "green", "blue", "photo",
    "picture", "painting", "portrait", "landscape", "woman", "man", "child", "city", "night", "day",
    "sky", "sea",
    "mountain", "river", "light", "dark", "small", "big", "high", "low", "quality", "detailed",
    "blurry", "best", "worst",
    "sunset", "sunrise", "forest", "flower", "bird", "horse", "robot", "castle", "street", "snow",
    "rain", "summer",
    "winter", "digital", "art", "style", "cinematic",
]
# fmt: on
PUNCTUATION = ".,!?-'"
CHAT = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPACE = "\u0120"  # how byte-level BPE writes it
WORD_START = "\u2581"  # how sentencepiece writes the blank before a word


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level BPE in CLIP's vocabulary order: bytes, bytes at a word's end, merges, start, end.

    The two special tokens come last, as CLIP's text model expects; 77 positions. `pad_token` is "!"
    in second encoders (id 0).
    """
    merges = list(dict.fromkeys(pair for word in WORDS for pair in _merges(word)))
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *(left + right for left, right in merges),
    ]
    vocabulary = {
        piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _merges(word: str) -> list[tuple[str, str]]:
    """The BPE merges that put `word` together from left to right."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:end]), letters[end]) for end in range(1, len(letters))]


def chat_tokenizer(text: str = "") -> Qwen2Tokenizer:
    """Byte-level BPE of a language model, with a template for conversations whose parts are texts
    or lists of texts.

    text: its words become single tokens too; for a pipeline that puts a long text of its own before
    the prompt.
    """
    words = [
        prefix + word
        for word in [*WORDS, *sorted(set(re.findall("[A-Za-z]+", text)))]
        for prefix in ("", SPACE)
    ]
    merges = list(
        dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    )
    pieces = dict.fromkeys(
        [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    )
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        chat_template=CHAT,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def t5_tokenizer(max_length: int) -> T5Tokenizer:
    """Unigram pieces with log probabilities: words are preferred, letters spell what is not in the
    list. Ids 0, 1, 2 as in T5.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(WORD_START + word, -math.log(len(WORDS))) for word in WORDS if len(word) > 1]
    letters = [(letter, -5.0) for letter in string.ascii_lowercase + string.digits + PUNCTUATION]
    return T5Tokenizer(
        vocab=[*special, *words, (WORD_START, -3.0), *letters],
        extra_ids=0,
        model_max_length=max_length,
    )


def bert_tokenizer() -> BertTokenizer:
    """Wordpiece with single letters as the fallback; 77 positions, as HunyuanDiT uses it."""
    letters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [
        *special,
        *letters,
        *("##" + letter for letter in letters),
        *PUNCTUATION,
        *(word for word in WORDS if len(word) > 1),
    ]
    return BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=77
    )
