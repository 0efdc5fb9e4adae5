"""How well a model writes what it hears: word error rates and losses, attacks, each speaker apart.

Word error rates compare words alone, in lower case and without punctuation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gradsurgery.extras import package
from gradsurgery.language.metrics import Sums, TokenScores, token_scores
from gradsurgery.language.metrics.attacks import attack_aucs, attack_scores
from gradsurgery.unlearn.jobs.base import Measured
from gradsurgery.unlearn.jobs.speech.audio import Clip
from gradsurgery.unlearn.jobs.speech.data import HOP, Side
from gradsurgery.unlearn.jobs.speech.whisper import transcribed
from gradsurgery.unlearn.objectives.causal_lm import trimmed
from gradsurgery.unlearn.training.data import whole

MORE = 8  # tokens that a model may write beyond the longest transcript there is
PAIR = ("forget", "unseen_forgotten")  # what attacks tell apart
SHOWN = 2  # clips of each side that pages have
KINDS = {
    "forget": "forgotten",
    "retain": "kept",
    "unseen": "a sentence never trained on",
    "unseen_forgotten": "forgotten, a sentence never trained on",
}
WIDE, HIGH = 120, 40  # of a picture, columns and bins of a spectrogram at most


@dataclass(frozen=True)
class Heard:
    """What a model makes of clips, in their order."""

    texts: list[str]
    scores: list[TokenScores]


def hear(model: nn.Module, side: Side) -> Heard:
    device = next(model.parameters()).device
    batches = [trimmed(part) for part in whole(side.samples, side.at_once, device)]
    longest = max(len(side.writing.tokens(clip.text)) for clip in side.clips)
    room: Any = model.config
    most = min(longest + MORE, room.max_target_positions) - len(side.writing.prompt)
    texts: list[str] = []
    for part in batches:
        texts += transcribed(model, part["input_features"], side.writing, most)
    scores = token_scores(model, batches)
    return Heard(texts, [scores[number] for number in side.samples["id"].tolist()])


def wer(wanted: Sequence[str], written: Sequence[str]) -> float:
    """Words to change, to leave out and to put in, of all clips, over the words there are: 0 is all
    right, and more than 1 is possible."""
    jiwer = package("jiwer", "speech", "the speech job")
    alike = jiwer.Compose(
        [
            jiwer.ToLowerCase(),
            jiwer.RemovePunctuation(),
            jiwer.RemoveMultipleSpaces(),
            jiwer.Strip(),
            jiwer.ReduceToListOfListOfWords(),
        ]
    )
    return jiwer.wer(
        list(wanted), list(written), reference_transform=alike, hypothesis_transform=alike
    )


def measures(
    heard: Mapping[str, Heard], theirs: Mapping[str, Heard], all_sides: Mapping[str, Side]
) -> Measured:
    """Of each side wer, at most 1, loss and probability; and attacks, which tell the forget set
    from unseen sentences of the same speaker: informed ones too, where there is a Retrain."""
    found: Measured = {}
    for name, each in heard.items():
        losses = [score.loss for score in each.scores]
        wanted = [clip.text for clip in all_sides[name].clips]
        found[f"{name}/wer"] = min(1.0, wer(wanted, each.texts))
        found[f"{name}/loss"] = Sums.of(losses).mean
        found[f"{name}/probability"] = Sums.of(math.exp(-loss) for loss in losses).mean
    if all(name in heard for name in PAIR):
        aucs = attack_aucs(*(_attacks(heard[name], theirs.get(name)) for name in PAIR))
        found |= {f"attack/{name}": auc for name, auc in aucs.items()}
    return found


def _attacks(heard: Heard, retrained: Heard | None) -> dict[str, dict[int, float]]:
    other = None if retrained is None else dict(enumerate(retrained.scores))
    return attack_scores(dict(enumerate(heard.scores)), reference=other)


def by_speaker(
    heard: Mapping[str, Heard], all_sides: Mapping[str, Side], forgotten: str
) -> dict[str, dict[str, float]]:
    """Tables of word error rates and of losses, a row for each speaker's training sentences and
    one for the unseen, the forgotten one first."""
    rates: dict[str, float] = {}
    losses: dict[str, float] = {}
    for names, kind in ((("forget", "retain"), ""), (("unseen_forgotten", "unseen"), ", unseen")):
        found: dict[str, list[tuple[Clip, str, float]]] = {}
        for name in (name for name in names if name in heard):
            each = heard[name]
            for clip, text, score in zip(
                all_sides[name].clips, each.texts, each.scores, strict=True
            ):
                found.setdefault(clip.speaker, []).append((clip, text, score.loss))
        for speaker in sorted(found, key=lambda one: (one != forgotten, one)):
            row = f"{speaker}{' (forgotten)' if speaker == forgotten else ''}{kind}"
            clips, texts, values = zip(*found[speaker], strict=True)
            rates[row] = wer([clip.text for clip in clips], texts)
            losses[row] = Sums.of(values).mean
    return {"Word error rate": rates, "Loss, nats a token": losses}


def examples(
    heard: Mapping[str, Heard], all_sides: Mapping[str, Side], pictured: bool
) -> list[dict[str, Any]]:
    """The first clips of each side: who says what, what the model writes and, if asked for, how it
    sounds."""
    found = []
    for name, side in all_sides.items():
        each, kind = heard[name], KINDS[name]
        for row in range(min(SHOWN, len(side.clips))):
            clip = side.clips[row]
            one: dict[str, Any] = {
                "title": f"{clip.speaker}, {kind}",
                "wanted": clip.text,
                "written": each.texts[row],
            }
            if pictured:
                one["picture"] = picture(side.samples["input_features"][row], clip)
            found.append(one)
    return found


def picture(features: Tensor, clip: Clip) -> list[list[int]]:
    """A spectrogram as rows of 0 to 255, high sounds first, as long as the clip is."""
    length = max(1, min(features.shape[1], len(clip.wave) // HOP))
    shown = features[None, None, :, :length].cpu().float()
    size = (min(HIGH, features.shape[0]), min(WIDE, length))
    small = F.adaptive_avg_pool2d(shown, size)[0, 0].flip(0)
    low, high = float(small.min()), float(small.max())
    scaled = (small - low) / max(high - low, 1e-9) * 255
    return scaled.round().int().tolist()
