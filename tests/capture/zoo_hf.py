"""Models of the transformers library and adapters of peft, tiny and from a configuration."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from tests.capture.zoo_entry import Entry, Shape, images, padding

VOCABULARY = 37
INSIDE_FLOAT32 = {"tolerance": 1e-6}  # norms or softmaxes that are always computed in float32
SIZES = {"hidden": (16,), "layers": (2, 1), "tokens": (6, 1, 2, 9)}


def _made(family, name, attention, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**options)
    config._attn_implementation = attention
    return getattr(transformers, f"{family}{name}")(config)


def _llama(attention, **options):
    return lambda s: _made(
        "Llama",
        "ForCausalLM",
        attention,
        vocab_size=VOCABULARY,
        hidden_size=s.hidden,
        intermediate_size=24,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
        **options,
    )


def _gpt2(attention):
    return lambda s: _made(
        "GPT2",
        "LMHeadModel",
        attention,
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=s.hidden,
        n_layer=s.layers,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )


def _bert(name, attention):
    return lambda s: _made(
        "Bert",
        name,
        attention,
        vocab_size=VOCABULARY,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )


def _vit(attention):
    return lambda s: _made(
        "ViT",
        "ForImageClassification",
        attention,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=s.side,
        patch_size=4,
        num_channels=s.channels,
        num_labels=3,
    )


def _whisper(attention):
    return lambda s: _made(
        "Whisper",
        "ForConditionalGeneration",
        attention,
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        encoder_layers=s.layers,
        decoder_layers=s.layers,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        d_model=s.hidden,
        max_source_positions=5,
        max_target_positions=16,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _t5(**options):
    return lambda s: _made(
        "T5",
        "ForConditionalGeneration",
        "eager",
        vocab_size=VOCABULARY,
        d_model=s.hidden,
        d_kv=4,
        d_ff=24,
        num_layers=s.layers,
        num_heads=4,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
        use_cache=False,
        decoder_start_token_id=0,
        **options,
    )


def _adapted(**options):
    def build(s):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], **options
        )
        with warnings.catch_warnings():  # what peft and transformers have to tell each other
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(_llama("sdpa")(s), config)

    return build


def _text(size, shape):
    """Tokens, and which of them are padding."""
    tokens = torch.randint(3, VOCABULARY, (size, shape.tokens + 1))
    return {"ids": tokens, "mask": ~padding(size, shape.tokens)}


def _per_token(logits, targets, mask):
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll.view(targets.shape) * mask).sum(1) / mask.sum(1)


def _next_token(model, batch):
    """Mean over the tokens of a sample that are no padding."""
    tokens, mask = batch["ids"], batch["mask"]
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask.long()).logits
    return _per_token(logits, tokens[:, 1:], mask)


def _unmasked(model, batch):
    tokens = batch["ids"]
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


def _sequence_class(model, batch):
    tokens, mask = batch["ids"], batch["mask"]
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask.long()).logits
    return F.cross_entropy(logits, tokens[:, -1] % 3, reduction="none")


def _image_class(model, batch):
    x, y = batch
    return F.cross_entropy(model(pixel_values=x).logits, y, reduction="none")


def _transcription(model, batch):
    tokens = batch["ids"]
    logits = model(input_features=batch["features"], decoder_input_ids=tokens[:, :-1]).logits
    return _per_token(logits, tokens[:, 1:], batch["mask"])


def _translation(model, batch):
    source, tokens, mask = batch["source"], batch["ids"], batch["mask"]
    logits = model(
        input_ids=source[:, :-1], attention_mask=mask.long(), decoder_input_ids=tokens[:, :-1]
    ).logits
    return _per_token(logits, tokens[:, 1:], mask)


def _labelled_images(size, shape):
    return (*images(size, shape), torch.randint(3, (size,)))


def _speech(size, shape):
    return {"features": torch.randn(size, 4, 10), **_text(size, shape)}


def _two_texts(size, shape):
    return {"source": _text(size, Shape(tokens=shape.tokens))["ids"], **_text(size, shape)}


def _language(build, loss=_next_token, **options):
    return Entry(build, _text, loss, SIZES, **options)


PICTURE = {"hidden": (16,), "layers": (2, 1), "side": (8, 4), "channels": (3, 1)}

HF = {
    "llama eager": _language(_llama("eager"), **INSIDE_FLOAT32),
    "llama sdpa": _language(
        _llama("sdpa", tie_word_embeddings=True, attention_bias=True), **INSIDE_FLOAT32
    ),
    "llama sdpa, no mask": _language(_llama("sdpa"), _unmasked, **INSIDE_FLOAT32),
    "gpt2 eager": _language(_gpt2("eager")),
    "gpt2 sdpa": _language(_gpt2("sdpa"), _unmasked),
    "bert masked lm eager": _language(_bert("ForMaskedLM", "eager")),
    "bert classifier sdpa": _language(_bert("ForSequenceClassification", "sdpa"), _sequence_class),
    "vit eager": Entry(_vit("eager"), _labelled_images, _image_class, PICTURE, **INSIDE_FLOAT32),
    "vit sdpa": Entry(_vit("sdpa"), _labelled_images, _image_class, PICTURE),
    "whisper eager": Entry(_whisper("eager"), _speech, _transcription, SIZES),
    "whisper sdpa": Entry(_whisper("sdpa"), _speech, _transcription, SIZES),
    "t5": Entry(_t5(), _two_texts, _translation, SIZES, **INSIDE_FLOAT32),
    "t5 gated": Entry(
        _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        _two_texts,
        _translation,
        SIZES,
        **INSIDE_FLOAT32,
    ),
    "lora": _language(_adapted(), **INSIDE_FLOAT32),
    "lora on all biases": _language(_adapted(bias="all", use_rslora=True), **INSIDE_FLOAT32),
    "dora": _language(_adapted(use_dora=True), **INSIDE_FLOAT32),
}
