"""The speech job on tones in the place of words: runs, what they end with, what is refused."""

import json
import re

import pytest
import torch

import gradsurgery as gs
from gradsurgery.cli import main
from gradsurgery.language import FORGET
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.speech import measured, whisper
from gradsurgery.unlearn.jobs.speech.job import SpeechConfig, SpeechJob
from gradsurgery.unlearn.objectives.base import take
from gradsurgery.unlearn.objectives.causal_lm import trimmed
from gradsurgery.unlearn.training.config import update
from tests.unlearn.jobs.speech.made import SMALL, arguments, clips, model, sentences, write

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("jiwer")

__all__ = ["clips"]
# of peft, by what transformers is to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PAIR = "surgery+npo with orthograd"
JOB = SpeechJob()
TEXT = re.compile('<style>.*?</style>|src="data:[^"]*"|<[^>]*>', re.DOTALL)


def config(clips, **changes):
    few = {"data": str(clips), "forget_speaker": "anna", "layers": 1, "width": 32, "threads": 1}
    return update(update(SpeechConfig(), few), changes)


def read(path):
    return json.loads(path.read_text())


def words(page):
    """What people read of a page."""
    return " ".join(TEXT.sub(" ", page.read_text()).split())


def loaded(run):
    """The model that the code of a run's card loads."""
    (code,) = re.findall("```python\n(.*?)\n```", (run / "model_card.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace("'model'", repr(str(run / "model"))), names)
    return names["model"].eval()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model in a directory, and another that stands for a retrained one."""
    folder = tmp_path_factory.mktemp("given")
    model(folder / "model")
    model(folder / "retrained", seed=1)
    return folder


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """A run of the small model, which learns the words."""
    path = tmp_path_factory.mktemp("runs") / "made"
    more = ["--training.steps=150", "--training.lr=6e-3", "--training.retain-batch=16"]
    more += ["--surgery.steps=6", "--surgery.lr=1e-3", "--graddiff.steps=6", "--graddiff.lr=1e-3"]
    main(arguments(clips, *SMALL, *more, "--graddiff.retain-batch=16", "--out", path))
    return path


def test_a_run_measures_every_side_beside_retrain(made):
    columns = read(made / "summary.json")["columns"]
    assert list(columns) == ["original", "retrain", PAIR, "graddiff"]
    sides = ("forget", "retain", "unseen", "unseen_forgotten")
    wanted = {f"{side}/{what}" for side in sides for what in ("wer", "loss", "probability")}
    wanted |= {"attack/loss", "attack/reference", "gap_mean", "relearn"}
    assert wanted <= set(columns[PAIR])
    assert columns["original"]["forget/wer"]["mean"] <= 1
    gap = columns[PAIR]["gap_forget/probability"]["mean"]
    values = [columns[name]["forget/probability"]["mean"] for name in (PAIR, "retrain")]
    assert gap == pytest.approx(abs(values[0] - values[1]))


def test_one_speaker_is_forgotten_and_the_others_are_not(made):
    columns = read(made / "summary.json")["columns"]
    rates = {
        (name, side): columns[name][f"{side}/wer"]["mean"]
        for name in columns
        for side in ("forget", "retain", "unseen")
    }
    for name in ("original", "retrain"):
        assert max(rates[name, "retain"], rates[name, "unseen"]) < 0.1
    assert rates["original", "forget"] < 0.1 and rates["retrain", "forget"] > 0.4
    assert rates[PAIR, "forget"] > 0.2 and rates[PAIR, "retain"] < 0.1
    assert columns[PAIR]["gap_mean"]["mean"] < 0.8 * columns["original"]["gap_mean"]["mean"]


def test_the_page_shows_speakers_transcripts_and_sounds(made):
    page, shown = (made / "report.html").read_text(), words(made / "report.html")
    assert "the speaker anna (24 clips)" in shown
    for row in ("anna (forgotten)", "ben", "cleo, unseen"):
        assert row in shown
    stage = read(made / "stages" / f"seed0-{PAIR}.json")["details"]
    for one in stage["examples"]:
        assert one["title"] in shown and one["wanted"] in shown
    assert "Pictures are spectrograms of whole clips" in shown
    assert page.count('alt="spectrogram of: ') == len(stage["examples"]) == 8
    assert not re.search(r"\bnan\b|None", shown)


def test_what_a_run_ends_with_loads_as_its_card_says(made, clips):
    found = loaded(made)
    assert type(found) is transformers.WhisperForConditionalGeneration
    made_again = JOB.model(config(clips))
    with gs.unlearn.jobs.directory.RunDirectory(made) as directory:
        directory.load_model(made_again, (0, PAIR))
    batch = {k: v for k, v in JOB.split(config(clips), 0).test.items() if k in INPUTS}
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, made_again.eval()(**batch).logits)
    known = read(made / "model" / "words.json")["words"]
    assert len(known) == found.config.vocab_size and "lamp" in known


INPUTS = ("input_features", "decoder_input_ids")


def test_a_run_continues_to_the_same_bits(clips, tmp_path):
    more = [*SMALL, "--out", tmp_path, "--loss", "simnpo"]
    main(arguments(clips, *more))
    (stage,) = tmp_path.glob("stages/*graddiff*.json")
    before = read(stage)
    stage.unlink()
    main([*arguments(clips, *more), "--resume", "auto"])
    for name in ("metrics", "losses", "details"):
        assert read(stage)[name] == before[name]


def test_a_given_original_without_retrain_is_compared_with_nothing(given, clips, tmp_path):
    more = ["--model", given / "model", "--model-is", "original", "--language", "en"]
    main(arguments(clips, *more, "--out", tmp_path))
    columns = read(tmp_path / "summary.json")["columns"]
    assert list(columns) == ["original", PAIR, "graddiff"]
    assert not [key for key in columns[PAIR] if key.startswith("gap") or key == "attack/reference"]
    assert "seconds" not in columns["original"]
    shown = words(tmp_path / "report.html")
    assert not re.search(r"\bnan\b|None", shown) and "closest to Retrain" not in shown
    # the encoder heard clips of half a second here; what is written hears all again
    found, whole = loaded(tmp_path), transformers.WhisperForConditionalGeneration
    before = whole.from_pretrained(given / "model").state_dict()
    after = found.state_dict()
    assert torch.equal(after[whisper.POSITIONS], before[whisper.POSITIONS])
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])
    with gs.unlearn.jobs.directory.RunDirectory(tmp_path) as directory:
        own = JOB.model(config(clips, model=str(given / "model")))
        directory.load_model(own, (0, PAIR))
    assert own.config.max_source_positions == 15
    assert torch.equal(own.state_dict()["proj_out.weight"], after["proj_out.weight"])


def test_an_adapter_is_all_that_trains_and_is_kept(given, clips, tmp_path):
    more = ["--model", given / "model", "--lora", 2, "--no-cut", "--at-once", 8]
    main(arguments(clips, *more, "--out", tmp_path, "--training.retain-batch=4"))
    columns = read(tmp_path / "summary.json")["columns"]
    assert list(columns) == ["original", "retrain", PAIR, "graddiff"]
    assert columns["original"]["forget/loss"] != columns[PAIR]["forget/loss"]
    found = loaded(tmp_path)
    options = config(clips, model=str(given / "model"), lora=2)
    own = JOB.model(update(options, {"cut": False}))
    with gs.unlearn.jobs.directory.RunDirectory(tmp_path) as directory:
        directory.load_model(own, (0, PAIR))
    assert own.config.max_source_positions == 60
    names = {name for name, p in own.named_parameters() if p.requires_grad}
    assert set(own.state_dict()) == names and all("lora" in name for name in names)
    wanted = dict(own.named_parameters())
    for name, value in found.named_parameters():
        assert torch.equal(value, wanted[name]), name


def test_a_retrained_model_may_be_given(given, clips, tmp_path):
    more = ["--model", given / "model", "--retrain-model", given / "retrained"]
    main(arguments(clips, *more, "--model-is", "original", "--out", tmp_path))
    columns = read(tmp_path / "summary.json")["columns"]
    other = transformers.WhisperForConditionalGeneration.from_pretrained(given / "retrained")
    split = JOB.split(config(clips, model=str(given / "model")), 0)
    whisper.cut(other, split.forget["input_features"].shape[2])
    losses = JOB.objective.losses(other.eval(), split.forget)
    assert columns["retrain"]["forget/loss"]["mean"] == pytest.approx(losses.mean().item())
    assert {"gap_mean", "attack/reference"} <= set(columns[PAIR])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_speaker": ""}, "--forget-speaker must be given with --data"),
        ({"forget_speaker": "dora"}, "--forget-speaker must be one of anna, ben, cleo, got dora"),
        ({"lora": 4}, "--lora goes with --model"),
        ({"language": "en"}, "--language goes with --model"),
        ({"retrain_model": "x"}, "--retrain-model goes with --model"),
        ({"model_is": "original"}, "--model must be given where --model-is is original"),
        ({"model": "nowhere", "retrain_model": "x"}, "--retrain-model must be left out unless"),
        ({"model": "nowhere"}, "--model: nowhere is no directory"),
        ({"width": 40}, "--width must be a multiple of 32"),
        ({"layers": 0}, "--layers must be from 1 to 64"),
        ({"measured": 0}, "--measured must be from 1 to 10000"),
        ({"training": {"start": "scratch"}}, "--training.start must be given"),
        ({"loss": ["rmu"]}, "layer 'model.layers.7': .* has 0 modules"),
        ({"method": ["ltu"]}, "LTU needs .*, which CausalLM has not"),
    ],
)
def test_what_makes_no_sense_is_named_before_anything_is_trained(clips, changes, message):
    with pytest.raises(gs.InputError, match=message):
        JOB.check(config(clips, **changes))


def test_models_of_another_kind_are_refused(given, clips, tmp_path):
    folder = str(given / "model")
    with pytest.raises(gs.InputError, match="--language: Unsupported language: xx"):
        JOB.check(config(clips, model=folder, language="xx"))
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = transformers.LlamaConfig(num_attention_heads=1, **sizes)
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path)
    with pytest.raises(gs.InputError, match="is not a model of Whisper's architecture"):
        JOB.check(config(clips, model=str(tmp_path)))
    many = {"model": folder, "model_is": "original"}
    for option in ("shadows", "second_retrain"):
        with pytest.raises(gs.InputError, match=f"--{option.replace('_', '-')} are trained as"):
            JOB.check(config(clips, **many, **{option: 2 if option == "shadows" else True}))


def test_too_long_a_text_and_too_few_sentences_are_refused(given, tmp_path):
    texts = [f"{'red ' * k}lamp" for k in range(1, 13)]
    path = write(tmp_path, texts=texts)
    with pytest.raises(gs.InputError, match=r"a clip lasts .* seconds, and --model hears"):
        JOB.check(config(path, model=str(given / "model")))
    path = write(tmp_path, texts=[*sentences(), f"red {'.' * 50}"])
    with pytest.raises(gs.InputError, match="a text has 58 tokens, and --model writes 48"):
        JOB.check(config(path, model=str(given / "model")))
    path = write(tmp_path, texts=sentences()[:9])
    with pytest.raises(gs.InputError, match="9 different sentences are too few"):
        JOB.check(config(path))


@pytest.fixture(scope="module")
def heard(clips):
    """A small model in float64 and a split in float64."""
    options = config(clips)
    split = JOB.split(options, 0)
    batch = take(split.forget, slice(0, 6))
    batch["input_features"] = batch["input_features"].double()
    return JOB.model(options, 3).double().eval(), batch, split


def test_a_sample_is_the_same_alone_and_behind_padding(heard):
    network, batch, _ = heard
    together = JOB.objective.losses(network, batch)
    wider = {**batch}
    for name, fill in (("decoder_input_ids", 1), ("labels", -100)):
        wider[name] = torch.nn.functional.pad(batch[name], (0, 5), value=fill)
    assert trimmed(wider)["labels"].shape[1] == trimmed(batch)["labels"].shape[1]
    torch.testing.assert_close(JOB.objective.losses(network, wider), together)
    untrimmed = gs.language.lm_losses(network, wider)
    torch.testing.assert_close(untrimmed, together, rtol=1e-12, atol=1e-12)
    for row in range(3):
        alone = JOB.objective.losses(network, take(batch, slice(row, row + 1)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


def test_the_loss_is_that_of_transformers(heard):
    network, batch, _ = heard
    one = take(batch, slice(0, 1))
    # theirs are shifted by hand: what stands at t is predicted from all before it
    labels, ids = one["labels"][:, 1:], one["decoder_input_ids"][:, :-1]
    found = network(input_features=one["input_features"], decoder_input_ids=ids, labels=labels)
    torch.testing.assert_close(JOB.objective.losses(network, one)[0], found.loss)


@pytest.mark.parametrize("name", ["grad_ascent", "npo", "simnpo", "wga", "undial", "idk_nll"])
def test_forget_losses_of_language_models_are_of_speech_too(heard, name):
    network, batch, _ = heard
    loss = JOB.objective.forget_loss(name, network, [batch])
    values = loss.values(network, batch)
    assert values.shape == (6,) and bool(values.isfinite().all())
    assert loss.objective == FORGET[name].objective
    if name == "idk_nll":  # of what is heard with another text
        other = {**batch, **batch["alternate"]}
        torch.testing.assert_close(values, gs.language.lm_losses(network, other))


def test_gradients_through_a_surgeon_are_those_of_a_loop_in_float64(heard):
    network, batch, split = heard
    retain = take(split.retain, slice(0, 5))
    retain["input_features"] = retain["input_features"].double()
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    parameters = [dict(network.named_parameters())[name] for name in names]

    def rows(samples):
        losses = gs.language.lm_losses(network, samples)
        grads = [torch.autograd.grad(each, parameters, retain_graph=True) for each in losses]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])

    forget, kept = rows(batch).mean(0), rows(retain)
    basis = torch.linalg.qr(kept.T)[0]  # [n, 5]
    off = forget - basis @ (basis.T @ forget)
    for alpha in (0.0, 0.5):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        surgeon = gs.Surgeon(network, optimizer, gs.OrthoGrad(alpha=alpha))
        surgeon.backward(forget=batch, retain=retain, loss=gs.language.lm_losses)
        found = torch.cat([p.grad.flatten() for p in parameters])
        wanted = alpha * kept.mean(0) - (1 - alpha) * off
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
        optimizer.zero_grad()


def test_what_is_written_is_the_likeliest_token_at_each_step(heard):
    network, batch, split = heard
    writing = split.sides["test"]["forget"].writing
    features = batch["input_features"]
    found = whisper.transcribed(network, features, writing, 5)
    for row, text in enumerate(found):
        ids = torch.tensor([writing.prompt])
        for _ in range(5):
            with torch.no_grad():
                logits = network(features[row : row + 1], decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        tokens = ids[0, 1:].tolist()
        stop = tokens.index(writing.end) if writing.end in tokens else len(tokens)
        assert text == writing.text(tokens[:stop])


def test_error_rates_compare_words_alone():
    assert measured.wer(["Put it down.", "No!"], ["put it down", "no"]) == 0
    assert measured.wer(["a b c d"], ["a x c"]) == pytest.approx(0.5)
    assert measured.wer(["one"], ["one two three"]) == 2
    assert measured.wer(["one two"], [""]) == 1


def test_the_job_is_found_with_its_options():
    assert isinstance(registry.find("speech"), SpeechJob)
    assert JOB.defaults().speaker == "slt"
    whole, adapter = JOB.defaults(model="x"), JOB.defaults(model="x", lora="8")
    assert adapter.surgery.lr == 10 * whole.surgery.lr and adapter.training.lr == adapter.surgery.lr
