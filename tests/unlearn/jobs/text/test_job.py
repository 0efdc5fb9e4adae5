"""The text job on a tiny Llama in a directory: whole runs, what they end with, what is refused."""

import json
import re

import pytest
import torch

import gradsurgery as gs
from gradsurgery.cli import main
from gradsurgery.unlearn.jobs.text.job import TextConfig, TextJob
from gradsurgery.unlearn.training.config import update
from tests.unlearn.jobs.text.made import arguments, given, model, rows, write

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("rouge_score")

__all__ = ["given"]
# of peft, by what transformers is to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PAIR = "surgery+npo with orthograd"
TEXT = re.compile('<style>.*?</style>|src="data:[^"]*"|<[^>]*>', re.DOTALL)


def read(path):
    return json.loads(path.read_text())


def words(page):
    """What people read of a page."""
    return TEXT.sub(" ", page.read_text())


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """A run with an adapter, of files to forget and to retain and nothing else."""
    path = tmp_path_factory.mktemp("runs") / "alone"
    main(arguments(given, "--out", path, "--lora", 4))
    return path


@pytest.fixture(scope="module")
def compared(given, tmp_path_factory):
    """A run of all weights, with samples held out and a retrained model."""
    path = tmp_path_factory.mktemp("runs") / "compared"
    more = ["--holdout", given / "holdout.jsonl", "--retrain-model", given / "retrained"]
    more += ["--method", "graddiff", "--graddiff.steps=2", "--graddiff.lr=1e-2"]
    main(arguments(given, "--out", path, "--lora", 0, *more))
    return path


def loaded(run):
    """The model that the code of a run's card loads."""
    (code,) = re.findall("```python\n(.*?)\n```", (run / "model_card.md").read_text(), re.DOTALL)
    code = code.replace("'model'", repr(str(run / "model")))
    names = {}
    exec(code, names)
    return names["model"]


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


TOKENS = torch.arange(2, 42).view(2, 20)


def test_an_adapter_is_all_that_a_run_keeps_and_it_loads(alone, given):
    assert [path.name for path in alone.glob("models/*")] == [f"seed0-{PAIR}.safetensors"]
    assert not (alone / "model.safetensors").exists()
    made = loaded(alone)
    assert isinstance(made, peft.PeftModel)
    config = update(TextConfig(), {"model": str(given / "model"), "lora": 4})
    stage = TextJob().model(config)
    with gs.unlearn.jobs.directory.RunDirectory(alone) as directory:
        directory.load_model(stage, (0, PAIR))
    base = transformers.AutoModelForCausalLM.from_pretrained(given / "model")
    assert torch.equal(logits(made, TOKENS), logits(stage, TOKENS))
    assert not torch.equal(logits(made, TOKENS), logits(base, TOKENS))
    assert set(stage.state_dict()) < set(dict(stage.named_parameters()))


def test_whole_weights_load_with_their_tokenizer(compared, given):
    made = loaded(compared)
    assert type(made) is transformers.LlamaForCausalLM
    assert transformers.AutoTokenizer.from_pretrained(compared / "model").eos_token == "<|end|>"
    config = update(TextConfig(), {"model": str(given / "model"), "lora": 0})
    stage = TextJob().model(config)
    with gs.unlearn.jobs.directory.RunDirectory(compared) as directory:
        directory.load_model(stage, (0, PAIR))
    assert torch.equal(logits(made, TOKENS), logits(stage, TOKENS))


def test_without_a_retrained_model_nothing_is_compared(alone):
    columns = read(alone / "summary.json")["columns"]
    assert list(columns) == ["original", PAIR]
    assert not [key for key in columns[PAIR] if key.startswith(("gap", "attack", "priv"))]
    assert {"forget/probability", "retain/rouge_l_recall", "relearn"} <= set(columns[PAIR])
    for shown in (words(alone / "report.html"), (alone / "model_card.md").read_text()):
        assert not re.search(r"\bnan\b|None|Retrain|\bgap\b", shown)
    assert "No retrained model was given, so nothing here says" in words(alone / "report.html")
    assert "no attack was tried" in (alone / "model_card.md").read_text()


def test_with_one_gaps_are_to_it_and_its_costs_are_not_made_up(compared, given):
    columns = read(compared / "summary.json")["columns"]
    assert list(columns) == ["original", "retrain", PAIR, "graddiff"]
    assert "seconds" not in columns["retrain"] and "seconds_ratio" not in columns[PAIR]
    gap = columns[PAIR]["gap_forget/probability"]["mean"]
    forget = [columns[name]["forget/probability"]["mean"] for name in (PAIR, "retrain")]
    assert gap == pytest.approx(abs(forget[0] - forget[1]))
    assert {"attack/min_k", "attack/reference", "priv_leak"} <= set(columns[PAIR])
    shown = words(compared / "report.html")
    assert "closest to Retrain" in shown and "times retraining" not in shown
    assert "Dotted" not in shown and not re.search(r"\bnan\b|None", shown)
    # the retrained model is measured as it is
    other = transformers.AutoModelForCausalLM.from_pretrained(given / "retrained")
    split = TextJob().split(config(given, lora=0), 0)
    forget_set = {k: v for k, v in split.forget.items() if k != "alternate"}
    losses = gs.language.lm_losses(other, forget_set)
    assert losses.double().neg().exp().mean().item() == pytest.approx(forget[1], rel=1e-5)


def test_a_retrained_model_learns_again_as_the_others_do(given):
    made = config(given, lora=4, retrain_model=str(given / "retrained"))
    found = TextJob().standing(made, "retrain", 0)
    assert set(found.state_dict()) == set(TextJob().model(made).state_dict())
    other = transformers.AutoModelForCausalLM.from_pretrained(given / "retrained")
    assert torch.equal(logits(found, TOKENS), logits(other, TOKENS))


@pytest.mark.parametrize("lora", [4, 0])
def test_a_run_goes_on_to_the_same_bits(given, tmp_path, lora, monkeypatch):
    more = ["--lora", lora, "--checkpoint-every=1"]
    main(arguments(given, "--out", tmp_path / "whole", *more, steps=4))

    from gradsurgery.unlearn.training.trainer import Trainer

    step = Trainer.update

    def killed(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "update", killed)
    with pytest.raises(SystemExit):
        main(arguments(given, "--out", tmp_path / "cut", *more, steps=4))
    monkeypatch.undo()
    main(arguments(given, "--out", tmp_path / "cut", "--resume", "auto", *more, steps=4))
    for name in (f"models/seed0-{PAIR}.safetensors", "model/config.json"):
        cut, whole = (tmp_path / run / name for run in ("cut", "whole"))
        assert cut.exists() == whole.exists() == (lora == 0 or name.startswith("models"))
        assert not whole.exists() or cut.read_bytes() == whole.read_bytes()
    both = [read(tmp_path / run / f"stages/seed0-{PAIR}.json") for run in ("whole", "cut")]
    assert both[0]["metrics"] == both[1]["metrics"]


def test_other_data_or_weights_are_another_run(given, tmp_path, capsys):
    path = tmp_path / "run"
    forget = write(tmp_path / "forget.jsonl", rows(0, 5))
    more = ["--out", path, "--forget", forget]
    main(arguments(given, *more))
    forget.write_text(forget.read_text().replace("It is 4.", "It is 5."))
    with pytest.raises(SystemExit):
        main(arguments(given, *more, "--resume", "auto"))
    assert "data.forget_sha256 was" in capsys.readouterr().err


def test_runs_with_other_pairs_are_put_side_by_side(alone, given, tmp_path):
    main(arguments(given, "--out", tmp_path / "other", "--lora", 4, "--loss", "simnpo"))
    page = tmp_path / "page.html"
    main(["compare", str(alone), str(tmp_path / "other"), "--out", str(page)])
    shown = words(page)
    assert "simnpo with orthograd" in shown and "npo with orthograd" in shown
    assert not re.search(r"\bnan\b|None|Retrain|\bgap\b", shown)
    main(["report", str(alone)])


def test_texts_are_cut_into_pieces_and_not_continued(given, tmp_path):
    for name, start in (("forget", 0), ("retain", 300)):
        text = " ".join(f"The square of {k} is {k * k}." for k in range(start, start + 60))
        (tmp_path / f"{name}.txt").write_text(text)
    files = ["--forget", tmp_path / "forget.txt", "--retain", tmp_path / "retain.txt"]
    main(arguments(given, *files, "--max-length=32", "--out", tmp_path / "run", "--loss", "undial"))
    found = read(tmp_path / "run/summary.json")
    assert "pieces of text to forget" in found["data"]["sets"]
    (column,) = (found["columns"][name] for name in found["columns"] if name != "original")
    assert "forget/probability" in column and "forget/rouge_l_recall" not in column


def config(given, **changes):
    usual = {"model": str(given / "model"), "user_tag": ["Question: ", "\\n"], "threads": 1}
    usual |= {name: given / f"{name}.jsonl" for name in ("forget", "retain")}
    return update(TextJob().defaults(lora=changes.get("lora")), {**usual, **changes})


def test_steps_and_rates_suit_what_is_trained(given):
    assert TextJob().defaults().surgery.lr == 1e-4
    assert TextJob().defaults(lora="0").surgery.lr == 1e-5
    made = TextJob().resolved(config(given, epochs=3, surgery={"forget_batch": 2}))
    assert made.surgery.steps == 3 * (5 // 2) and made.graddiff.steps == 3


def test_held_out_samples_are_halved_and_sets_numbered_apart(given):
    split = TextJob().split(config(given, holdout=given / "holdout.jsonl"), 0)
    sides = (split.forget, split.retain, split.validation, split.test)
    ids = [side["id"].tolist() for side in sides]
    assert list(map(len, ids)) == [5, 9, 3, 3]
    assert sorted(set().union(*ids)) == list(range(20)) and ids[0] == split.ids
    refused = split.forget["alternate"]["labels"]
    assert len(refused) == 5 and bool((refused >= 0).any(1).all())
    text = split.tokenizer.decode(split.samples["forget"][3]["input_ids"])
    assert text == "<|begin|>Question: What is 3?\nAnswer: It is 9.<|end|>"


def test_chats_are_written_by_the_template_on_one_date(given, tmp_path):
    turns = "{% for m in messages %} {{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    made = model(tmp_path / "model", template="{{ date_string }}" + turns)
    roles = {"question": "user", "answer": "assistant"}
    chats = [
        {"messages": [{"role": roles[key], "content": text} for key, text in row.items()]}
        for row in rows(0, 3)
    ]
    forget = write(tmp_path / "forget.jsonl", chats)
    split = TextJob().split(config(given, model=str(made), forget=forget, user_tag=[]), 0)
    text = split.tokenizer.decode(split.samples["forget"][1]["input_ids"])
    assert text == "26 Jul 2024 user: What is 1?<|end|> assistant: It is 1.<|end|>"


def test_refusals_are_there_for_losses_that_want_them(given):
    TextJob().check(config(given, loss=["idk_dpo", "idk_nll"]))


def test_options_are_searched_by_the_gap_to_a_retrained_model(given, tmp_path):
    more = ["--retrain-model", given / "retrained", "--method", "graddiff", "--tune=1"]
    main(arguments(given, "--out", tmp_path / "run", *more, "--loss", "npo"))
    (line,) = (tmp_path / "run/tuning.jsonl").read_text().splitlines()
    assert json.loads(line)["gap"] >= 0 and list(tmp_path.glob("run/tuning/*")) == []


def without(name):
    """A copy of the model's directory that lacks files."""

    def make(given, folder):
        model(folder)
        for file in folder.glob(name):
            file.unlink()
        return {"model": str(folder)}

    return make


def pickled(given, folder):
    made = without("*.safetensors")(given, folder)
    torch.save({}, folder / "pytorch_model.bin")
    return made


def adapter(given, folder):
    model(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other"}))
    return {"model": str(folder)}


def gguf(given, folder):
    made = without("*.safetensors")(given, folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    return made


def wants_code(given, folder):
    model(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    return {"model": str(folder)}


def encoder_decoder(given, folder):
    model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return {"model": str(folder)}


def too_few_words(given, folder):
    return {"model": str(model(folder, words=20))}


def half(given, folder):
    from safetensors.torch import load_file, save_file

    model(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {"model": str(folder)}


def texts(given, folder):
    folder.mkdir()
    file = write(folder / "texts.jsonl", [{"text": "Lima is a city."}, {"text": "So is Oslo."}])
    return {"forget": file, "loss": ["idk_nll"]}


def small(given, folder):
    return {"model": str(model(folder, max_position_embeddings=20))}


def shared(given, folder):
    folder.mkdir()
    return {"retain": write(folder / "both.jsonl", rows(4, 3))}


def empty(given, folder):
    folder.mkdir()
    return {"retain": write(folder / "none.jsonl", [])}


WRONG = {
    "no model": ({"model": ""}, "--model must be given"),
    "no directory": ({"model": "/nowhere/at/all"}, "--model: /nowhere/at/all is no directory, and"),
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("*.safetensors"), "has no weights"),
    "a pickle": (pickled, "pytorch_model.bin, a pickle.*as safetensors"),
    "an adapter": (adapter, "is an adapter: merge it"),
    "GGUF": (gguf, "GGUF weights"),
    "no tokenizer": (without("tokenizer*"), "has no tokenizer"),
    "code": (wants_code, "needs code of its own, and none is run"),
    "T5": (encoder_decoder, "is an encoder with a decoder"),
    "few words": (too_few_words, "--model: it has 20 tokens, and the tokenizer .* makes number"),
    "weights missing": (half, "lacks 1 weights, such as model.norm.weight"),
    "shared": (shared, "--retain: sample 1, It is 16., is also sample 5 of --forget"),
    "empty": (empty, "--retain: .* holds no row"),
    "no file": ({"retain": "/nowhere.jsonl"}, "--retain: /nowhere.jsonl is not there"),
    "no template": ({"user_tag": []}, "--forget: .* no chat template: say with --user-tag"),
    "stop": ({"surgery": {"stop": "validation"}}, "--surgery.stop: .* give --holdout"),
    "targets": ({"lora_targets": ["nothing"]}, "--lora-targets: .*nothing"),
    "shadows": ({"shadows": 2}, "--shadows must be 0"),
    "tune": ({"tune": 2}, "--tune must be 0 without --retrain-model"),
    "second Retrain": ({"second_retrain": True}, "--second-retrain must be left as it is"),
    "training": ({"training": {"steps": 7}}, "--training must be left as it is"),
    "teacher": ({"method": ["bad_teacher"], "lora": 4}, "--method: BadTeacher draws .* --lora 0"),
    "norms": ({"method": ["bad_teacher"], "lora": 0}, "--method bad_teacher: .*reset_parameters"),
    "loss": ({"loss": ["nqo"]}, "there is no forget loss 'nqo'"),
    "positions": (small, "--max-length: --model takes 20 tokens, and .* would be needed"),
    "no refusals": (texts, "--loss: .*no alternate"),
    "too long": ({"max_length": 9}, "--forget: example 0: nothing is left of its answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_named_before_anything_is_trained(given, tmp_path, name):
    changes, message = WRONG[name]
    changes = changes(given, tmp_path / "made") if callable(changes) else changes
    with pytest.raises(gs.InputError, match=message):
        TextJob().check(TextJob().resolved(config(given, **changes)))


def test_a_model_that_was_compared_must_know_the_tokens_too(given, tmp_path):
    other = model(tmp_path / "small", words=20)
    with pytest.raises(gs.InputError, match="--retrain-model: it has 20 tokens"):
        TextJob().check(config(given, retrain_model=str(other)))


def test_without_peft_it_says_what_to_install(given, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(gs.InputError, match=r"needs peft: pip install 'gradsurgery\[hf\]'"):
        TextJob().model(config(given, lora=4))


def test_a_name_is_looked_up_in_the_cache(given, tmp_path, monkeypatch):
    from gradsurgery.unlearn.jobs.pretrained import folder

    cached = tmp_path / "models--me--tiny"
    model(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder("me/tiny", "model") == cached / "snapshots" / "abc"
