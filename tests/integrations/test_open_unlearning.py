"""A trainer in open-unlearning's registry, which a stand-in of its sources has here."""

import os
import re
import shlex
import subprocess
import sys
from collections import UserDict
from pathlib import Path

import pytest
import torch

import gradsurgery as gs
from tests.language.tiny import WORDS

pytest.importorskip("transformers")

from safetensors import torch as safetensors_torch

from gradsurgery.integrations import open_unlearning
from tests.integrations.trainers import (
    FORGET,
    RETAIN,
    arguments,
    assert_same,
    fresh,  # noqa: F401 - a fixture, asked for by its name
    llama,
    samples,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("fresh")
ROOT = Path(__file__).parents[2]

BASE = """
from transformers import Trainer

class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if self.evaluators:
            found = self.evaluators["tofu"](self.model, self.tokenizer, self.template_args)
            self.log(found)
            return found
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
"""
REGISTRY = """
from trainer.base import FinetuneTrainer

TRAINER_REGISTRY = {}

def _register_trainer(trainer_class):
    TRAINER_REGISTRY[trainer_class.__name__] = trainer_class

_register_trainer(FinetuneTrainer)
"""
SCRIPT = """
import sys
from trainer import TRAINER_REGISTRY

if __name__ == "__main__":
    FOUND = TRAINER_REGISTRY, sys.argv
    sys.modules["trainer"].found = FOUND
"""
# what its own have beside these: models and data by name, other trainers, evaluation, logs
CONFIGURED = {
    "src/trainer/__init__.py": f"""{REGISTRY}
def load_trainer(config, **given):
    from transformers import TrainingArguments

    args = dict(config.args)
    args.pop("warmup_epochs")
    handler = TRAINER_REGISTRY[config.handler]
    return handler(args=TrainingArguments(**args), **given, **config.method_args)
""",
    "src/data.py": """
import torch
from torch.utils.data import Dataset

from tests.integrations.trainers import FORGET, RETAIN

class ForgetRetainDataset(Dataset):
    def __init__(self, forget, retain, anchor):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget)

def get_data(config):
    sets = [
        [{key: torch.tensor(ids) for key, ids in sample.items()} for sample in samples]
        for samples in (FORGET, RETAIN)
    ]
    return ForgetRetainDataset(*sets, config.anchor)
""",
    "src/train.py": """
import hydra
from data import get_data
from tests.integrations.trainers import llama
from trainer import load_trainer

@hydra.main(version_base=None, config_path="../configs", config_name="train.yaml")
def main(config):
    trainer = load_trainer(
        config.trainer,
        model=llama().double(),
        train_dataset=get_data(config.data),
        eval_dataset=None,
        tokenizer=None,
        data_collator=None,
        evaluators=None,
        template_args=None,
    )
    trainer.train()
    trainer.save_model(trainer.args.output_dir)

if __name__ == "__main__":
    main()
""",
    "configs/unlearn.yaml": """
defaults:
  - trainer: GradAscent
  - data: unlearn
  - experiment: null
  - _self_

trainer:
  args:
    remove_unused_columns: False

mode: unlearn
task_name: ???
""",
    "configs/data/unlearn.yaml": "anchor: forget",
    "configs/trainer/finetune.yaml": """
handler: FinetuneTrainer
args:
  output_dir: saves/${mode}/${task_name}
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 3
  learning_rate: 1e-5
  weight_decay: 0.0
  num_train_epochs: 10
  save_strategy: 'no'
  report_to: none
  use_cpu: True
  seed: 0
""",
    "configs/trainer/GradAscent.yaml": """
defaults:
  - finetune

handler: GradAscent
method_args:
  gamma: 1.0
""",
    "configs/experiment/unlearn/tofu/default.yaml": """
# @package _global_

defaults:
  - override /trainer: GradAscent
  - override /data: unlearn

trainer:
  args:
    warmup_epochs: 1.0
    learning_rate: 1e-2
    num_train_epochs: 2
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """As `src` of open-unlearning is laid out; its modules are imported by their bare names."""
    folder = tmp_path / "src" / "trainer"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text(BASE)
    (folder / "__init__.py").write_text(REGISTRY)
    (tmp_path / "src" / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield tmp_path / "src" / "train.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "trainer"]:
        del sys.modules[name]


class ForgetRetain(torch.utils.data.Dataset):
    """As `load_trainer` hands both sets over: the retain sample is drawn by torch's own numbers."""

    def __init__(self, forget, retain, anchor="forget"):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, place):
        raise AssertionError("retain samples are not drawn by the number of calls")


class Tokenizer:
    pad_token_id = WORDS - 1


def tensors(data):
    return [
        {**{name: torch.tensor(ids) for name, ids in sample.items()}, "index": k}
        for k, sample in enumerate(data)
    ]


def loaded(checkout, model, folder, data, method_args, **options):
    """What `load_trainer` makes of a configuration."""
    sys.path.insert(0, str(checkout.parent))
    open_unlearning.register()
    handler = sys.modules["trainer"].TRAINER_REGISTRY["Surgery"]
    return handler(
        model=model,
        train_dataset=data,
        eval_dataset=None,
        tokenizer=Tokenizer(),
        data_collator=lambda rows: pytest.fail("its attention mask leaves end tokens out"),
        args=arguments(folder, remove_unused_columns=False, **options),
        evaluators=options.get("evaluators"),
        template_args=None,
        **method_args,
    )


def test_its_trainer_is_ours(checkout, tmp_path):
    models = [llama(), llama()]
    data = ForgetRetain(tensors(FORGET), tensors(RETAIN))
    # nested as a configuration has it, in mappings that are no dicts
    method = UserDict(rule=UserDict(name="gru", momentum=0.8), forget_loss="npo", mean="token")
    args = {"gradient_accumulation_steps": 3}
    trainer = loaded(checkout, models[0], tmp_path, data, method, **args)
    seen = []
    trainer.evaluators = {"tofu": lambda model, tokenizer, _: seen.append(tokenizer) or {"a": 1.0}}
    trainer.train()
    assert trainer.evaluate() == {"a": 1.0, "epoch": 2.0}
    assert isinstance(seen[0], Tokenizer)
    trainer_of(
        models[1],
        tmp_path,
        rule=gs.GRU(momentum=0.8, objective="lower"),
        forget_loss="npo",
        mean="token",
        args=args,
    ).train()
    assert_same(*models, rtol=0, atol=0)


def test_other_answers_are_drawn_once(checkout, tmp_path):
    class Refusing(torch.utils.data.Dataset):
        """A refusal drawn anew whenever a sample is asked for."""

        def __len__(self):
            return len(FORGET)

        def __getitem__(self, place):
            refusal = samples(1, int(torch.randint(1000, ())))
            return {"original": tensors(FORGET)[place], "alternate": tensors(refusal)[0]}

    data = ForgetRetain(Refusing(), tensors(RETAIN))
    method = {"rule": "orthograd", "forget_loss": {"name": "idk_dpo", "beta": 0.2}}
    trainer = loaded(checkout, llama(), tmp_path, data, method)
    trainer.train()  # the original's answers would not be found of others
    assert trainer.state.global_step == 14


def test_what_is_no_set_of_pairs_is_named(checkout, tmp_path):
    for data, match in (
        (FORGET, "train_dataset must have forget and retain samples, got list"),
        (ForgetRetain(FORGET, RETAIN, "retain"), "anchor=retain is not served"),
    ):
        with pytest.raises(gs.InputError, match=match):
            loaded(checkout, llama(), tmp_path, data, {"rule": "gru"})


def test_a_script_is_run_with_our_trainer_and_our_configurations(checkout):
    open_unlearning.launch([str(checkout), "--config-name=unlearn.yaml", "trainer=Surgery"])
    registry, argv = sys.modules["trainer"].found
    assert set(registry) == {"FinetuneTrainer", "Surgery"}
    assert argv[1:3] == ["--config-name=unlearn.yaml", "trainer=Surgery"]
    folder = Path(argv[3].removeprefix("hydra.searchpath=['file://").removesuffix("']"))
    assert (folder / "trainer" / "Surgery.yaml").is_file()


def test_our_configurations_are_of_our_options(checkout, tmp_path):
    yaml = pytest.importorskip("yaml")
    data = ForgetRetain(tensors(FORGET), tensors(RETAIN))
    files = sorted((open_unlearning.CONFIGS / "trainer").glob("*.yaml"))
    known = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    assert {"Surgery", "GRU"} == set(known)
    for config in known.values():
        above = known.get(config["defaults"][0], {"method_args": {}})
        method = {**above["method_args"], **config["method_args"]}
        assert "Surgery" in (config.get("handler"), above.get("handler"))
        loaded(checkout, llama(), tmp_path, data, method)


@pytest.mark.parametrize(
    ("arguments_given", "match"),
    [
        ([], "give a script of open-unlearning first, as src/train.py; got none"),
        (["src/trained.py"], "src/train.py; got src/trained.py"),
        ([__file__], "registry of trainers is not to be found in `trainer`: No module named"),
    ],
)
def test_what_is_not_open_unlearning_is_named(arguments_given, match, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(gs.InputError, match=match):
        open_unlearning.launch(arguments_given)


def command_of(page):
    """The words of the command that a page has for open-unlearning; of a diff, those of after."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = (text[1] for text in re.finditer(r"^```(?:sh|diff)\n(.*?)^```", text, re.M | re.S))
    (code,) = (code for code in found if "integrations.open_unlearning" in code)
    lines = [re.sub(r"^[+ ]", "", line) for line in code.splitlines() if line[0] != "-"]
    return shlex.split("\n".join(lines).replace("\\\n", " "))


@pytest.mark.parametrize(
    ("page", "rule", "task"),
    [("trainers.md", "munba", "munba"), ("moving.md", "orthograd", "mine")],
)
def test_the_command_of_a_page_trains(page, rule, task, checkout, tmp_path):
    """As printed, in the folder of a stand-in: to the weights of a trainer with those options."""
    pytest.importorskip("hydra")
    for name, text in CONFIGURED.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    python, *words = command_of(page)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "saves" / "unlearn" / task
    found = safetensors_torch.load_file(folder / "model.safetensors")
    model = llama().double()
    trainer_of(
        model,
        tmp_path,
        rule=rule,
        forget_loss={"name": "npo", "beta": 0.1},
        mean="token",
        args={"gradient_accumulation_steps": 3, "seed": 0},
    ).train()
    assert not torch.equal(model.lm_head.weight, llama().double().lm_head.weight)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
