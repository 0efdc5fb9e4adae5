"""A trainer for open-unlearning's registry, and a launcher that puts it there."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from gradsurgery.errors import InputError
from gradsurgery.integrations.transformers import SurgeryMixin
from gradsurgery.language.batches import collate
from gradsurgery.ops._inputs import check
from gradsurgery.ranks import Group
from gradsurgery.ranks.group import world
from gradsurgery.text import show

CONFIGS = Path(__file__).resolve().parent / "configs"
"""The folder of configurations that the launcher adds to open-unlearning's own."""

ENTRIES = ("input_ids", "attention_mask", "labels")


def launch(arguments: Sequence[str]) -> None:
    """Run a script of open-unlearning with `Surgery` among its trainers.

    Args:
        arguments: the script, as `src/train.py`, and its own. Hydra is told where `CONFIGS` are.

    Raises:
        InputError: no such script, or one beside which there is no registry of trainers.
    """
    script = Path(arguments[0]) if arguments else None
    if script is None or not script.is_file():
        got = "none" if script is None else show(script, 80)
        raise InputError(f"give a script of open-unlearning first, as src/train.py; got {got}")
    sys.path.insert(0, str(script.resolve().parent))
    register()
    sys.argv = [str(script), *arguments[1:], f"hydra.searchpath=['file://{CONFIGS}']"]
    runpy.run_path(str(script), run_name="__main__")


def register() -> type:
    """Put `Surgery` into open-unlearning's registry, whose `src` must be importable; the class."""
    try:
        trainers = import_module("trainer")
        base = import_module("trainer.base").FinetuneTrainer
        known = trainers._register_trainer
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"open-unlearning's registry of trainers is not to be found in `trainer`: {error}"
        ) from error
    made = surgery_of(base)
    known(made)
    return made


def surgery_of(base: type) -> type:
    """`Surgery`, a subclass of open-unlearning's FinetuneTrainer."""

    class Surgery(SurgeryMixin, base):
        """Its constructor is given what open-unlearning's `load_trainer` gives: the samples of a
        ForgetRetainDataset are paired anew, by seed and epoch, so that ranks and resumed runs draw
        as they should; other answers are drawn once, at the beginning."""

        def __init__(
            self,
            *,
            train_dataset: Any,
            eval_dataset: Any = None,
            tokenizer: Any = None,
            processing_class: Any = None,
            data_collator: Any = None,  # takes the end token for padding, where these are one
            **options: Any,
        ) -> None:
            sets = [getattr(train_dataset, part, None) for part in ("forget", "retain")]
            if None in sets:
                got = type(train_dataset).__name__
                raise InputError(f"train_dataset must have forget and retain samples, got {got}")
            anchor = getattr(train_dataset, "anchor", "forget")
            check(
                anchor == "forget",
                f"anchor={show(anchor, 40)} is not served: an epoch has each forget sample once",
            )
            tokens = tokenizer if processing_class is None else processing_class
            pad = getattr(tokens, "pad_token_id", None)
            forget, retain = map(Samples, sets)
            ranks = Group(world())
            with ranks.agreed("forget samples") as said:  # other answers, as the first drew them
                if ranks.rank == 0:
                    said.mine = [forget[place] for place in range(len(forget))]
            super().__init__(
                forget_dataset=said.every[0],
                retain_dataset=retain,
                eval_dataset=None if eval_dataset is None else Samples(eval_dataset),
                processing_class=tokens,
                data_collator=partial(collate, pad=pad or 0),
                **{name: _plain(value) for name, value in options.items()},
            )

        @property
        def tokenizer(self) -> Any:
            """By the name that older versions of transformers have for it."""
            return self.processing_class

    return Surgery


class Samples(Dataset):
    """Samples of a data set of open-unlearning, with what a loss needs of them alone."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> dict[str, Any]:
        sample = self.samples[place]
        if "original" in sample:
            return {**_entries(sample["original"]), "alternate": _entries(sample["alternate"])}
        return _entries(sample)


def _entries(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sample[name] for name in ENTRIES if name in sample}


def _plain(value: Any) -> Any:
    """What a configuration has, in dicts."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value
