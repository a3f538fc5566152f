"""Models that are built in a second."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PICO_LAYERS = 6
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pico_tokenizer(folder: Path) -> int:
    """Train a small byte-level BPE on our own text, save it to ``folder``, return its vocabulary size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (REPOSITORY / "sample_prompts" / "evaluation" / "prose.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([text[:30_000], " A B C D" * 100], trainer)  # MMLU's answers are tokens
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def make_pico(folder: Path, family: str, **changes: object) -> Path:
    """Save a pico checkpoint of ``family`` (llama or qwen2) with random weights to ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab = pico_tokenizer(folder)
    settings: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": PICO_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(20240616)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": True, **settings}))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": False, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wider than transformers' 0.02, so that layers do something; norms and biases off their defaults.
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 / parameter.shape[1] ** 0.5 if "embed" not in name else 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.float32).save_pretrained(folder)
    return folder
