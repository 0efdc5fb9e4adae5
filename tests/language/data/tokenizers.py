"""Small tokenizers: one of transformers, trained here, and one that gives no offsets."""

import pytest

TEXTS = ["What is the capital of Peru? It is Lima. Question: Answer: of none"] * 9


def trained(template=None, begins=True):
    """A fast tokenizer of bytes and the words of `TEXTS`; it may begin every text with a token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if begins:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


class Characters:
    """A token for each character, and one for "ee"; no class of transformers."""

    eos_token_id = ord("$")

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(character) for character in text.replace("ee", "\x01")]
        return {"input_ids": [ord("^"), *ids] if add_special_tokens else ids}

    def decode(self, ids):
        return "".join(chr(token) for token in ids).replace("\x01", "ee")
