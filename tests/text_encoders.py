"""Tiny CLIP and T5 text encoders, with random weights and a few words, as ``save_pretrained`` leaves them."""

from __future__ import annotations

from pathlib import Path

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "above"]


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer that knows :data:`WORDS`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )
    fast.save_pretrained(folder)


def save_clip(folder: Path, seed: int = 0) -> None:
    """Save a text tower with projection, 16 wide, and its tokenizer, in sub-folders."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=12,
        max_position_embeddings=10,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")


def save_t5(folder: Path, seed: int = 1) -> None:
    """Save an encoder, 24 wide, and its tokenizer in one folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=1
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder)
