"""The parts that several model types share: text encoders, image encoder and VAE, each with its
real layout at width 32 or less.
"""

from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tests.checkpoints.vocabulary import bert_tokenizer, clip_tokenizer, t5_tokenizer

WIDTH = 32  # of every text encoder but sdxl's second one and sd3's T5
HEADS = 4
CLIP_POSITIONS = 77
VAE_LEVELS = (8, 16, 16, 16)


def clip_text(
    *,
    hidden_act: str = "quick_gelu",
    projection: bool = False,
    width: int = WIDTH,
    positions: int = CLIP_POSITIONS,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder; `projection` adds the pooled head of second encoders, which also use the
    exact gelu.
    """
    num_tokens = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=num_tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        max_position_embeddings=positions,
        hidden_act=hidden_act,
        projection_dim=width,
        bos_token_id=num_tokens - 2,
        eos_token_id=num_tokens - 1,  # the pooled state is taken at this id
        pad_token_id=num_tokens - 1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_text(width: int = WIDTH) -> T5EncoderModel:
    """A gated T5 1.1 encoder."""
    config = T5Config(
        vocab_size=max(t5_tokenizer(1).get_vocab().values()) + 1,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_decoder_layers=0,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def bert_text() -> BertModel:
    config = BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=512,
    )
    return BertModel(config, add_pooling_layer=False)


def clip_vision(*, image_size: int = 32, patch_size: int = 8) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=image_size,
        patch_size=patch_size,
    )
    return CLIPVisionModelWithProjection(config)


def siglip_vision() -> tuple[SiglipVisionModel, SiglipImageProcessor]:
    """The image encoder of sd3's IP-Adapter, with its processor."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
    )
    return SiglipVisionModel(config), SiglipImageProcessor(size={"height": 32, "width": 32})


def image_processor(size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def vae(
    *, latent_channels: int = 4, channels: tuple[int, ...] = VAE_LEVELS, **config: object
) -> AutoencoderKL:
    """An image VAE that divides each side by 2 ** (number of channels - 1). The 16-channel ones
    (sd3, flux) have no quant convolutions.
    """
    has_quant_conv = latent_channels == 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=64,  # larger images are tiled when tiling is on
        use_quant_conv=has_quant_conv,
        use_post_quant_conv=has_quant_conv,
        **config,
    )


def video_vae() -> AutoencoderKLTemporalDecoder:
    """The VAE of Stable Video Diffusion. Its norms have 32 groups whatever the config says, so no
    level is narrower.
    """
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )
