"""A small random Llama and a tokenizer, made on the spot: a real model for a real engine, no download.

The weights are random but fixed by a seed. With the usual initializer range such a model repeats one token
for ever; 0.15 gives text that depends on every token of the prompt, so that a wrong byte in the KV cache
shows in the output.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. KV bytes per token at 32 bit: 8 x layers x kv_heads x head_dim."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int = 8192
    seed: int = 0


TEST = Shape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256)
DEMO = Shape(layers=8, hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1536)


def make_model(folder: Path, shape: Shape, text: str) -> Path:
    """Write model and tokenizer to the folder, unless they are there; returns the folder.

    text: what the tokenizer is trained on.
    """
    if (folder / "complete").exists():
        return folder
    import torch  # noqa: PLC0415 - heavy, and not needed the second time
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    print(make_model(Path(sys.argv[1]), DEMO, Path(sys.argv[2]).read_text()))
