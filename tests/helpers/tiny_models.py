"""Tiny random checkpoints of the real Gemma 4 architectures, and prompts with images for them."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    EmbeddingGemma2Config,
    EmbeddingGemma2Model,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from helpers import reference
from helpers.problems import grid

TOKENS = {
    "image_token_id": 100,
    "video_token_id": 101,
    "boi_token_id": 102,
    "eoi_token_id": 103,
    "audio_token_id": 104,
    "boa_token_id": 105,
    "eoa_token_index": 106,
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# E2B and E4B have embeddings per layer; 31B has none, keys for values, and a larger vision tower.
SMALL_TEXT = TEXT | {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
LARGE_TEXT = TEXT | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
LARGE_VISION = reference.SMALL_VISION_CONFIG | {"hidden_size": 72, "head_dim": 36}
UNIFIED_VISION = {
    "patch_size": 4,
    "mm_embed_dim": 40,
    "mm_posemb_size": 32,
    "output_proj_dims": 40,
}


def build(name, dtype=torch.float32):
    """One of MODELS, the same weights on every call."""
    torch.manual_seed(0)
    if name == "unified-12b":
        config = Gemma4UnifiedConfig(text_config=TEXT, vision_config=UNIFIED_VISION, **TOKENS)
        model = Gemma4UnifiedForConditionalGeneration(config)
        table = model.model.embed_vision.pos_embedding
    elif name == "diffusion":
        tokens = {key: TOKENS[key] for key in ("image_token_id", "boi_token_id", "eoi_token_id")}
        config = DiffusionGemmaConfig(
            text_config=TEXT | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
            vision_config=_vision(reference.SMALL_VISION_CONFIG),
            **tokens,
        )
        model = DiffusionGemmaForBlockDiffusion(config)
        table = next(p for n, p in model.named_parameters() if n.endswith("_embedding_table"))
    elif name == "embedding":
        config = EmbeddingGemma2Config(
            text_config=TEXT | {"hidden_size_per_layer_input": 8, "embedding_dim": 24},
            vision_config=_vision(reference.SMALL_VISION_CONFIG),
            **TOKENS,
        )
        model = EmbeddingGemma2Model(config)
        table = model.vision_tower.patch_embedder.position_embedding_table
    else:
        text, vision = {
            "e2b": (SMALL_TEXT, reference.SMALL_VISION_CONFIG),
            "31b": (LARGE_TEXT, LARGE_VISION),
        }[name]
        config = Gemma4Config(text_config=text, vision_config=_vision(vision), **TOKENS)
        model = Gemma4ForConditionalGeneration(config)
        table = model.model.vision_tower.patch_embedder.position_embedding_table
    torch.nn.init.normal_(table)  # transformers' own start, all equal, would hide a wrong row
    return model.to(dtype).eval()


def _vision(values):
    return {"model_type": "gemma4_vision", **values}


MODELS = ("e2b", "31b", "unified-12b", "diffusion", "embedding")


def photos(count=1):
    generator = np.random.default_rng(0)
    sizes = [(96, 144), (144, 96), (192, 144)][:count]
    return [
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes
    ]


def prompt(name, token="image_token_id"):
    """Arguments of a model's forward and `generate`: some text with a photo, or a video of two frames, in it."""
    if name == "unified-12b":
        # Made by hand, of 12-pixel patches: Gemma4UnifiedImageProcessor needs torchvision.
        ids = grid(1, 24, 6, 4)
        ids[0, -4:] = -1
        pixels = torch.linspace(0, 1, 24 * 3 * 12**2).sin().view(1, 24, -1)
        vision = {"pixel_values": pixels, "image_position_ids": ids}
        count = 20
    else:
        batch = Gemma4ImageProcessorPil(max_soft_tokens=70)(photos(), return_tensors="pt")
        count = int(batch.pop("num_soft_tokens_per_image")[0])
        vision = dict(batch)
    repeats = 1
    if token == "video_token_id":
        repeats = 2
        vision = {
            "pixel_values_videos": vision["pixel_values"].repeat(2, 1, 1),
            "video_position_ids": vision["image_position_ids"].repeat(2, 1, 1),
            "num_frames_per_video": torch.tensor([2]),
        }
    soft = ([102] + [TOKENS[token]] * count + [103]) * repeats
    input_ids = torch.tensor([[2, 5, 6, *soft, 7, 8, 9]])
    kinds = (input_ids == 100) + 2 * (input_ids == 101)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": kinds.long(),
        **vision,
    }
    # The processor works on the CPU.
    return {key: value.to(torch.get_default_device()) for key, value in batch.items()}


class Processor(Gemma4Processor):
    """Without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        if argument is not None:
            return super().check_argument_for_proper_class(name, argument)


def processor():
    """Gemma 4's, for images and text, with a vocabulary of the words w4 to w99."""
    special = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    media = {"image": 100, "boi": 102, "eoi": 103, "audio": 104, "boa": 105, "eoa": 106}
    vocabulary = {f"<{name}>": number for name, number in (special | media).items()}
    vocabulary |= {f"w{number}": number for number in range(4, 100)} | {"<|video|>": 101}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(max_soft_tokens=70),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{f"{name}_token": f"<{name}>" for name in special},
            extra_special_tokens={f"{name}_token": f"<{name}>" for name in media},
        ),
        video_processor=None,
        chat_template=(
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ ' <image> ' if part['type'] == 'image' else ' ' + part['text'] }}"
            "{% endfor %}{% endfor %}"
        ),
    )


def conversation(image):
    """A user's question with a photo, and the answer."""
    question = [{"type": "image", **image}, {"type": "text", "text": "w7 w8"}]
    answer = [{"type": "text", "text": "w9 w10"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
