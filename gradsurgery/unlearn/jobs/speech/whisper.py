"""Models of Whisper's architecture: a small one to train, what the encoder hears cut short, and
what a model writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.language.reference import still
from gradsurgery.ranks.shards import gathering
from gradsurgery.text import show
from gradsurgery.unlearn.jobs import pretrained
from gradsurgery.unlearn.jobs.speech.data import STRIDE, Writing
from gradsurgery.unlearn.jobs.vocabulary import END, PAD, START, Words
from gradsurgery.unlearn.training.seeds import seeded

BINS = 40  # of the small model's spectrograms
POSITIONS = "model.encoder.embed_positions.weight"


def small(words: int, columns: int, length: int, layers: int, width: int, seed: int) -> nn.Module:
    """A Whisper of so many words, layers and hidden units, of which 32 make a head; its weights are
    drawn by the seed."""
    transformers = package("transformers", "hf", "the speech job")
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", width // 32))
    }
    config = transformers.WhisperConfig(
        vocab_size=words,
        num_mel_bins=BINS,
        d_model=width,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        **sides,
        max_source_positions=columns // STRIDE,
        max_target_positions=length,
        init_std=0.05,  # at 0.02 so narrow a model begins slowly
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with seeded(seed, torch.device("cpu")):
        return transformers.WhisperForConditionalGeneration(config)


def spectrogram(path: Path) -> tuple[int, int]:
    """Bins and columns of what a model's directory is for.

    Raises:
        InputError: it is of another architecture.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "whisper":
            return int(config["num_mel_bins"]), STRIDE * int(config["max_source_positions"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"--model: {show(path)} is not a model of Whisper's architecture")


def extractor(bins: int, path: Path | None = None) -> Any:
    """What makes spectrograms, that of a model's directory or one of so many bins."""
    kind = package("transformers", "hf", "the speech job").WhisperFeatureExtractor
    if path is not None and (path / "preprocessor_config.json").exists():
        try:
            return kind.from_pretrained(path, local_files_only=True)
        except Exception as error:  # whatever a file of the user's makes it raise
            raise InputError(f"--model: {show(path)} has no feature extractor: {error}") from None
    return kind(feature_size=bins)


def writing(path: Path, language: str | None) -> Writing:
    """How a model's directory writes: in a language, where it knows several."""
    found = pretrained.tokenizer(path)
    if not hasattr(found, "set_prefix_tokens"):
        raise InputError(f"--model: the tokenizer of {show(path)} is not Whisper's")
    try:
        if language is not None:
            found.set_prefix_tokens(language=language, task="transcribe")
        prompt = tuple(found.prefix_tokens)
    except ValueError as error:
        raise InputError(f"--language: {show(error)}") from None
    return Writing(found, prompt, found.eos_token_id, space=" ")


def own_writing(words: Words) -> Writing:
    return Writing(words, (START,), END)


def cut(model: Any, columns: int) -> None:
    """Let the encoder hear so many columns of a spectrogram, and no silence behind them.

    What it makes of those is not what it made before, for attention looked at the silence as well.
    """
    encoder, positions = model.get_encoder(), columns // STRIDE
    table = encoder.embed_positions.weight
    encoder.embed_positions = nn.Embedding.from_pretrained(table[:positions].detach().clone())
    encoder.max_source_positions = positions
    model.config.max_source_positions = positions


def uncut(model: nn.Module, whole: nn.Module) -> nn.Module:
    """The weights of `model` in `whole`, which is the same model before its encoder was cut."""
    weights = {name: value for name, value in model.state_dict().items() if name != POSITIONS}
    found = whole.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) <= {POSITIONS} and not found.unexpected_keys, "of one model"
    return whole


def transcribed(model: Any, features: Tensor, written: Writing, most: int) -> list[str]:
    """What a model writes of spectrograms [B, bins, columns], the likeliest token at each step, at
    most so many."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = torch.tensor([written.prompt] * len(features), device=features.device)
    rows: list[Tensor] = []
    # transformers 5.24 renames it
    known = "cache" in inspect.signature(base.forward).parameters
    name, cache = "cache" if known else "past_key_values", None
    done = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    with still(model), gathering(model):
        heard = base.get_encoder()(features)
        for _ in range(most):
            found = model(
                encoder_outputs=heard,
                decoder_input_ids=tokens,
                use_cache=True,
                **{name: cache},
            )
            cache, tokens = found[name], found.logits[:, -1:].argmax(-1)
            tokens = tokens.masked_fill(done[:, None], written.end)
            rows.append(tokens)
            done |= tokens[:, 0] == written.end
            if bool(done.all()):
                break
    return [written.text(_before_end(row, written.end)) for row in torch.cat(rows, 1).tolist()]


def _before_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
