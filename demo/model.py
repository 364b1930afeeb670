"""The parts of the demo model in SDXL layout: configurations, tokenizer, and a warm start."""

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.data import training_scene
from demo.latents import CHANNELS

TEXT_POSITIONS = 77
TEXT_WIDTH = 64
SIZE_EMBEDDING = 16  # per number of time_ids; there are six

UNET = {
    "sample_size": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": [48, 96, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "attention_head_dim": [4, 8, 8],  # diffusers' name for the number of heads
    "transformer_layers_per_block": [1, 1, 1],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_EMBEDDING,
    "projection_class_embeddings_input_dim": 6 * SIZE_EMBEDDING + TEXT_WIDTH,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 2,
    "sample_size": 256,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "steps_offset": 1,
}


class TextToLatents(nn.Module):
    """The UNet and both text encoders, trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_POSITIONS,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
            "projection_dim": TEXT_WIDTH,
        }
        self.unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(hidden_act="quick_gelu", **sizes))
        self.text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_act="gelu", **sizes)
        )
        for (
            name,
            parameter,
        ) in self.named_parameters():  # CLIP's 0.02 is a small signal at this width
            if "token_embedding" in name:
                nn.init.normal_(parameter, 0, 0.5)
            elif "position_embedding" in name:
                nn.init.normal_(parameter, 0, 0.2)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return prompt_embeds (B, 77, 128) and pooled embeds (B, 64) of token ids (B, 77), as
        in SDXL.
        """
        first = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor, pixels: int
    ) -> Tensor:
        """Return v for latents (B, 16, h, w) of `pixels` x `pixels` images. timestep: (B,)
        int64.
        """
        time_ids = torch.tensor(
            [[pixels, pixels, 0, 0, pixels, pixels]], dtype=latents.dtype
        ).expand(len(latents), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(latents, timestep, prompt_embeds, added_cond_kwargs=added).sample


def make_vae() -> AutoencoderKL:
    """Return an untrained AutoencoderKL with a fixed, tiny posterior variance (log-variance
    -12).
    """
    vae = AutoencoderKL(**VAE)
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:].zero_()
        vae.quant_conv.bias[CHANNELS:].fill_(-12.0)
    return vae


def make_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULER)


def train_tokenizer(captions: int = 4000, *, seed: int = 5) -> CLIPTokenizer:
    """Return a CLIP byte-pair tokenizer in which every word of the grammar is one token.

    Other words split into bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.Punctuation(), bytes_only]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    rng = random.Random(seed)
    tokenizer.train_from_iterator((training_scene(rng).caption for _ in range(captions)), trainer)
    merges = _merges(tokenizer.to_str())
    pieces = (
        alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    )
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return _clip_tokenizer({piece: index for index, piece in enumerate(pieces)}, merges)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return (B, 77) int64 ids, padded with the end token."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=TEXT_POSITIONS)
    return torch.tensor(encoded.input_ids)


def load_tokenizer(checkpoint: Path) -> CLIPTokenizer:
    """Return the tokenizer of an earlier checkpoint, always with 77 positions."""
    saved = (checkpoint / "tokenizer" / "tokenizer.json").read_text()
    return _clip_tokenizer(json.loads(saved)["model"]["vocab"], _merges(saved))


def _merges(saved: str) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json. Versions of tokenizers write pairs differently."""
    pairs = json.loads(saved)["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in pairs]


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=TEXT_POSITIONS, pad_token="<|endoftext|>"
    )


@torch.no_grad()
def start_from(net: TextToLatents, checkpoint: Path) -> None:
    """Copy an earlier checkpoint's weights into `net`; where a dimension shrank, keep what fits.

    A head start, not a conversion: attention heads are regrouped and the narrowed level has to
    relearn.
    """
    earlier = {
        "unet": UNet2DConditionModel.from_pretrained(
            checkpoint / "unet", dtype=torch.float32, local_files_only=True
        ),
        "text_encoder": CLIPTextModel.from_pretrained(
            checkpoint / "text_encoder", dtype=torch.float32, local_files_only=True
        ),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
            checkpoint / "text_encoder_2", dtype=torch.float32, local_files_only=True
        ),
    }
    for part, model in earlier.items():
        old = model.state_dict()
        for name, parameter in getattr(net, part).named_parameters():
            parameter.copy_(_fitted(old[name], parameter.shape))


def _fitted(old: Tensor, shape: torch.Size) -> Tensor:
    """`old` cut or extended to `shape`, dimension by dimension.

    A dimension made of two concatenated halves (skip connections, gated linear units) keeps the
    start of each half; a longer one (text positions) repeats the last row, which is where padding
    was learned.
    """
    for dim, size in enumerate(shape):
        have = old.shape[dim]
        if have < size:
            index = torch.arange(size).clamp(max=have - 1)
        elif have > size and have in _HALVES:
            first, kept = _HALVES[have]
            index = torch.cat([torch.arange(kept), torch.arange(first, first + size - kept)])
        else:
            index = torch.arange(size)
        old = old.index_select(dim, index)
    return old


# Width of the old dimension -> (start of its second half, how much of the first half is kept) for a
# level that shrank from 112 to 96 channels: 112+112 and 112+96 skip inputs, and the two halves of
# its gated linear unit.
_HALVES = {224: (112, 96), 208: (112, 96), 896: (448, 384)}
