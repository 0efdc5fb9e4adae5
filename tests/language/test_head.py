"""The head runs where labels are, to the same numbers, and everywhere where it cannot."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture import hooks
from gradsurgery.language import NLL, UNDIAL, Frozen, lm_losses, retain_loss
from gradsurgery.language.head import output_head, whole
from tests.language import tiny

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": {},
    "gemma2": {"head_dim": 8},  # bounds its logits after the head
    "cohere": {},  # scales them
    "granite": {"logits_scaling": 3.0},
    "gpt2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3": {"head_dim": 8},
    "phi": {},
    "falcon": {"new_decoder_architecture": True},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "mamba": {"state_size": 4},
    "bert": {"is_decoder": True},  # its head is more than one module
}

OLD = transformers.__version__ < "5"
# before 4.53 attention masks are written to in place, as torch.func cannot do
STORED = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 53)
# in float64; older ones have no other
HOW = {} if OLD else {"mixtral": {"experts_implementation": "eager"}}


def model_of(kind="llama", attention=None, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **options})
    how = {**HOW.get(kind, {}), **({"attn_implementation": attention} if attention else {})}
    model = transformers.AutoModelForCausalLM.from_config(config, **how)
    return model.double().eval()


def batch_of(side="right"):
    samples = [([5, 9, 2, 7, 8, 1], [7, 11, 3]), ([4, 4], [10]), ([1, 12, 6, 3, 9], [2, 5])]
    made = tiny.batch(samples, side=side, extra=1, ids=False)
    return {**made, "position_ids": (made["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def everywhere(model, batch):
    """The same losses of logits at all positions."""
    inputs = {name: entry for name, entry in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, -batch["labels"].shape[1] :]
    each = logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    found = each.gather(2, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(found * (labels >= 0)).sum(1) / (labels >= 0).sum(1)


def seen_by_head(model):
    """How many positions the head is given, at each call."""
    lengths = []
    output_head(model).register_forward_hook(
        lambda module, given, output: lengths.append(output.shape[1])
    )
    return lengths


@pytest.fixture
def masks_in_float64():
    """Older models write the least value of their dtype into a mask of torch's default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if OLD else before)
    yield
    torch.set_default_dtype(before)


LEFT = ["llama", "cohere", "gpt2", "opt", "mixtral", "mamba"]  # others have NaN where padded


@pytest.mark.parametrize(
    "kind,side", [(kind, "right") for kind in KINDS] + [(kind, "left") for kind in LEFT]
)
def test_any_model_has_the_losses_of_all_its_logits(kind, side, masks_in_float64):
    model = model_of(kind)
    batch = batch_of(side)
    if kind in ("bloom", "mamba", "mpt"):
        del batch["position_ids"]
    expected = everywhere(model, batch)
    lengths = seen_by_head(model)
    assert (lm_losses(model, batch) - expected).abs().max() <= 1e-12
    assert lengths == [3]  # of ten positions those that predict the longest answer


def adapted(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model_of(), config).double().eval()


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "saved head": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


# peft gives newer models their cache by an older name
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_have_the_losses_of_all_logits(name):
    model = adapted(ADAPTERS[name]())
    batch = batch_of()
    del batch["position_ids"]
    expected = everywhere(model, batch)
    assert (lm_losses(model, batch) - expected).abs().max() <= 1e-12
    lengths = seen_by_head(model)
    lm_losses(model, batch)
    assert lengths == [3]


@pytest.mark.parametrize("rows", ["captured", "stored"])
def test_a_step_is_that_of_all_logits(rows):
    # torch.func can take eager attention apart
    models = [model_of(attention="eager"), model_of(attention="eager")]
    for model, loss in zip(models, (NLL(), everywhere), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), rows=rows)
        if rows == "stored" and not STORED:
            with pytest.raises(gs.InputError, match=r"stored rows: .*take captured rows"):
                surgeon.step(forget=batch_of(), retain=batch_of(), loss=loss)
            continue
        for _ in range(2):
            surgeon.step(forget=batch_of(), retain=batch_of(), loss=loss)
    for mine, expected in zip(*(m.parameters() for m in models), strict=True):
        assert (mine - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["nll", "rmu"])
def test_hooks_count_as_ours(name):
    """A step would look for what a foreign one changes, at many times its price."""
    model = model_of()
    options = {"layer": "model.layers.0", "reference": Frozen(copy.deepcopy(model))}
    loss = retain_loss(name, **(options if name == "rmu" else {}))
    before = hooks.others()
    loss(model, batch_of())
    assert hooks.others() == before


def test_the_original_runs_its_head_there_too():
    model = model_of()
    original = copy.deepcopy(model)
    lengths = seen_by_head(original)
    UNDIAL(reference=Frozen(original))(model, batch_of())
    retain_loss("kl", reference=Frozen(original))(model, batch_of())
    assert lengths == [3, 3]


class Pieces(nn.Module):
    """Its head runs on two halves of the positions."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(60, 8), nn.Linear(8, 60)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.logits(input_ids))

    def logits(self, ids):
        h = self.words(ids)
        return torch.cat([self.head(h[:, :5]), self.head(h[:, 5:])], 1)


class Shared(Pieces):
    """Its head runs twice, on what the first run made too."""

    def logits(self, ids):
        h = self.words(ids)
        return self.head(h) + self.head(h + 1)


class Looks(Pieces):
    """Puts together again what its head made."""

    def logits(self, ids):
        made = self.head(self.words(ids))
        return torch.cat([made, made.new_zeros(len(made), ids.shape[1] - made.shape[1], 60)], 1)


class ByName(Pieces):
    def logits(self, ids):
        return self.head(input=self.words(ids))


@pytest.mark.parametrize("kind", [Pieces, Shared, Looks, ByName])
def test_what_cannot_be_narrowed_runs_everywhere(kind):
    kind.__module__ = "transformers.models.made_up"  # or its head would not be looked for
    torch.manual_seed(0)
    model = kind().double()
    batch = batch_of()
    expected = everywhere(model, batch)
    assert (lm_losses(model, batch) - expected).abs().max() <= 1e-12
    assert (model in whole) == (kind in (Shared, Looks))
    assert (lm_losses(model, batch) - expected).abs().max() <= 1e-12


class Centered(nn.Module):
    """Logits depend on all positions."""

    def __init__(self):
        super().__init__()
        self.inner = model_of()

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **given):
        logits = self.inner(**given).logits
        return transformers.modeling_outputs.CausalLMOutput(logits=logits - logits.mean(1, True))


def test_models_of_others_run_as_they_are():
    model = Centered()
    expected = everywhere(model, batch_of())
    lengths = seen_by_head(model.inner)
    assert (lm_losses(model, batch_of()) - expected).abs().max() <= 1e-12
    assert lengths == [10]


def test_logits_that_a_model_was_told_to_keep_are_not_taken_for_others():
    for kept in (3, 4):  # three are what the longest answer needs
        with pytest.raises(gs.InputError, match="logits must be"):
            lm_losses(model_of(), {**batch_of(), "logits_to_keep": kept})


def test_a_failing_model_keeps_no_hook():
    model = model_of()
    head = output_head(model)
    batch = batch_of()
    with pytest.raises(IndexError):
        lm_losses(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    assert not head._forward_pre_hooks


def test_means_over_tokens_are_of_a_whole_step():
    model = model_of()
    batch = batch_of()
    found = lm_losses(model, batch, mean="token")
    assert isinstance(found, gs.WeightedLosses)
    assert found.weights.tolist() == [3, 1, 2]
    assert (found.losses - everywhere(model, batch)).abs().max() <= 1e-12
    with pytest.raises(gs.InputError, match="mean must be"):
        lm_losses(model, batch, mean="sum")
