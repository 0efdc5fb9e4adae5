"""Training in a Trainer whose model fully_shard split over ranks is that of one process."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.language import Frozen, GradAscent, LogProbs
from tests.language.tiny import made
from tests.ranks.processes import run

transformers = pytest.importorskip("transformers")

# what follows needs transformers, and comes after the look for it
import accelerate  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402

from tests.integrations.test_transformers_ranks import (  # noqa: E402
    RANKS,
    SEEN,
    SIZES,
    alike,
    launched,
    parts_of,
)
from tests.integrations.trainers import (  # noqa: E402
    CASES,
    CLIP,
    FORGET,
    TASKS,
    all_forget,
    llama,
    losses_of,
    plain,
    samples,
    steps_of,
    trainer_of,
)

# peft asks newer models by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
OLDER = transformers.__version__ < "5"
whole_checkpoints = pytest.mark.skipif(OLDER, reason="older ones save shards")
EPOCHS = 2
LOWER = gs.OrthoGrad(objective="lower")
WHICH = [(name, "one by one") for name in ("npo", "average", "answers", "tasks raised")]
WHICH.append(("tokens", "last batch shorter"))
FULL, SHARDS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def on_gpus(rank, ranks=RANKS):
    """As a launcher says it to a process that has a GPU, for accelerate shards on these alone.

    The device is a CPU, and ranks speak by gloo; all else is accelerate's own.
    """
    launched(rank)
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "FSDP_VERSION": "2"}
    kind = "gloo", DistributedType.MULTI_GPU
    accelerate.PartialState._prepare_backend = lambda *_, **__: kind


def ours(folder, model, *, config=None, checkpoint=None, **options):
    """A trainer that has trained; `config`: that of fsdp."""
    layer = "LlamaDecoderLayer" if hasattr(model, "config") else "Layer"
    args = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "fsdp": "full_shard auto_wrap" if OLDER else True,
        "fsdp_config": {"transformer_layer_cls_to_wrap": [layer], **(config or {})},
        **options.pop("args", {}),
    }
    options = {"rule": copy.deepcopy(LOWER), **options}
    trainer = trainer_of(model, folder, args=args, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert isinstance(trainer.model, FSDPModule)
    return trainer


def found_of(trainer):
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    state = {name: _whole(value) for name, value in trainer.model.state_dict().items()}
    return {"state": state, "logs": logs, "rule": trainer._steps.parts.rule.state_dict()}


def _whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


def case(folder, name, size):
    rule, forget, retain, options = CASES[name]
    each, parts = SIZES[size]
    trainer = ours(
        folder,
        made(),
        rule=copy.deepcopy(rule),
        forget_loss=forget,
        retain_loss=retain,
        forget_dataset=samples(7, 1, alternate=name == "answers"),
        args={"per_device_train_batch_size": each, "gradient_accumulation_steps": parts},
        **options,
    )
    return found_of(trainer)


def frozen():
    model = made()
    model.words.weight.requires_grad_(False)
    model.layers[0].query.requires_grad_(False)
    return model


def resumed(folder, model, kind=FULL):
    """A whole run, and one that goes on from the middle of it."""
    options = {"rule": gs.GRU(momentum=0.8), "forget_loss": "wga"}
    options["config"] = {"state_dict_type": kind}
    options["args"] = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    whole = found_of(ours(folder / "whole", model(), **options))
    torch.manual_seed(99)
    checkpoint = str(folder / "whole/checkpoint-2")
    again = ours(folder / "again", model(), checkpoint=checkpoint, **options)
    return whole, found_of(again)


def dropping():
    return llama(attention_dropout=0.2)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    return peft.get_peft_model(llama(), config)


def adapter(folder):
    """An adapter, with a loss that needs the model below it."""
    # at first the divergence has no gradient but rounding, which this rule does not divide by
    rule = gs.LTUHarmonize(mode="retain", objective="lower")
    args = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    args["save_strategy"] = "epoch"
    return found_of(ours(folder, adapted(), rule=rule, retain_loss="kl", args=args))


def evaluated(folder):
    """What it measures of samples, and the whole model that was measured."""
    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "per_device_eval_batch_size": 2}
    model = llama(tie_word_embeddings=True)
    trainer = ours(folder, model, eval_dataset=samples(4, 9), args=args)
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {**found_of(trainer), "measured": [entry["eval_loss"] for entry in logs]}


def in_a_loop(rank):
    """accelerate's model and optimizer in a loop of one's own."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Layer"],
    )
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    for step in parts_of(rank):
        with accelerator.accumulate(model):
            surgeon.add(**step, loss=GradAscent())
            if accelerator.sync_gradients:
                surgeon.backward()
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return {"state": {name: _whole(p) for name, p in model.state_dict().items()}}


def sharded_when_loaded(rank, folder):
    """A model that transformers shards as it reads it, and accelerate leaves as it is."""
    launched(rank)
    os.environ |= {"ACCELERATE_USE_FSDP": "false"}
    if rank == 0:
        llama().save_pretrained(folder / "llama")
    dist.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder / "llama",
        distributed_config=transformers.distributed.DistributedConfig(fsdp_size=RANKS),
        dtype=torch.float32,
    )
    args = {"gradient_accumulation_steps": 2, "max_grad_norm": CLIP, "ddp_backend": "gloo"}
    trainer = trainer_of(model, folder, rule=copy.deepcopy(LOWER), args=args)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return found_of(trainer)


def said(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        dist.barrier()
    return None


def refused(rank, folder):
    class Broken(GradAscent):
        def __call__(self, model, batch):
            if rank == 1:
                raise ZeroDivisionError("a loss that fails")
            return super().__call__(model, batch)

    original = fully_shard(llama())
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    cases = {
        "loss": lambda: ours(folder, made(), rule="orthograd", forget_loss=Broken()),
        "reference": lambda: ours(folder, made(), retain_loss="kl", reference=Frozen(original)),
        "compiled": lambda: ours(folder, llama(), args=compiled),
    }
    found = {name: said(call) for name, call in cases.items()}
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:
        del os.environ[name]
    return found


def work(rank, folder):
    on_gpus(rank)
    found = {which: case(folder / "plain", *which) for which in WHICH}
    few = {"retain_per_forget": 0.5, "rule": gs.OrthoGrad(), "forget_loss": "grad_ascent"}
    found["few"] = found_of(ours(folder / "few", made(), **few))
    found["frozen"] = found_of(ours(folder / "frozen", frozen()))
    recomputed = {"activation_checkpointing": True}
    model = llama(use_cache=False)
    found["recomputed"] = found_of(ours(folder / "recomputed", model, config=recomputed))
    found[FULL] = resumed(folder / FULL, dropping)
    found[SHARDS] = resumed(folder / SHARDS, dropping, SHARDS)
    found["adapted"] = resumed(folder / "adapted", adapted)
    found["adapter"] = adapter(folder / "adapter")
    found["evaluated"] = evaluated(folder / "evaluated")
    found["refused"] = refused(rank, folder / "refused")
    found["loop"] = in_a_loop(rank)
    if not OLDER:
        found["loaded"] = sharded_when_loaded(rank, folder)
    return found


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """What each rank found, and the folder of what they saved."""
    folder = tmp_path_factory.mktemp("sharded")
    return run(work, RANKS, folder, folder, seconds=200), folder


def steps(size="one by one", data=FORGET, each=1, ranks=RANKS):
    one, parts = SIZES[size]
    return list(steps_of(EPOCHS, one * parts * ranks, data, each=each, ranks=ranks))


@pytest.mark.parametrize(("name", "size"), WHICH)
def test_a_sharded_trainer_is_one_process(every, name, size):
    rule, _, _, options = CASES[name]
    data = samples(7, 1, alternate=name == "answers")
    model = made()
    losses = losses_of(name, model, data)
    given = steps(size, data, options.get("retain_per_forget", 1))
    infos, norms = plain(model, TASKS.get(name, rule), given, *losses)
    alike(every[0], (name, size), model)
    for found in every[0]:
        logs = found[name, size]["logs"]
        assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-9)
        for entry, info in zip(logs, infos, strict=True):
            seen = {**info.to_dict(), "cosine_mean": float(info.cosines.mean())}
            for key in SEEN:
                assert entry[key] == pytest.approx(seen[key], rel=1e-9), key


def test_a_rank_without_retain_samples(every):
    model = made()
    plain(model, gs.OrthoGrad(), steps(each=0.5), GradAscent(), language.NLL())
    alike(every[0], "few", model)


def test_what_is_frozen_stays(every):
    model = frozen()
    known = LogProbs.of(model, [all_forget()])
    plain(model, LOWER, steps(), language.NPO(reference=known), language.NLL())
    alike(every[0], "frozen", model)
    assert torch.equal(every[0][0]["frozen"]["state"]["words.weight"], made().words.weight)


def by_one(model):
    """Where one process takes a model in float32."""
    known = LogProbs.of(model, [all_forget()])
    plain(model, LOWER, steps(), language.NPO(reference=known), language.NLL())
    return model.state_dict()


@pytest.mark.parametrize("name", ["recomputed", *([] if OLDER else ["loaded"])])
def test_of_transformers(every, name):
    expected = by_one(llama())
    for found in every[0]:
        torch.testing.assert_close(found[name]["state"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FULL, SHARDS, "adapted"])
def test_a_resumed_run_is_the_same_bit_for_bit(every, kind):
    for found in every[0]:
        whole, again = found[kind]
        for part in ("state", "rule"):
            assert whole[part].keys() == again[part].keys()
            for name, value in whole[part].items():
                assert torch.equal(again[part][name], value), name


@whole_checkpoints
def test_a_checkpoint_is_whole_and_ordinary(every):
    (found, _), folder = every
    read = transformers.LlamaForCausalLM.from_pretrained
    saved = {
        "evaluated": folder / "evaluated/checkpoint-4",
        FULL: folder / FULL / "whole/checkpoint-4",
        "loaded": folder / "saved",
    }
    for name, path in saved.items():
        wanted = found[name][0] if name == FULL else found[name]
        for key, value in read(path).state_dict().items():
            assert torch.equal(value, wanted["state"][key]), (name, key)


def test_an_adapter_alone_moves_and_is_saved(every):
    peft = pytest.importorskip("peft")
    found = every[0][0]["adapter"]["state"]
    model = adapted()
    options = {"reference": Frozen(llama())}
    losses = language.NPO(**options), language.retain_loss("kl", **options)
    rule = gs.LTUHarmonize(mode="retain", objective="lower")
    trained = [p for p in model.parameters() if p.requires_grad]
    surgeon = gs.Surgeon(model, torch.optim.SGD(trained, lr=0.1), rule)
    for step in steps():
        surgeon.add(forget=step["forget"], loss=losses[0])
        surgeon.add(retain=step["retain"], loss=losses[1])
        surgeon.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        surgeon.optimizer.step()
        surgeon.optimizer.zero_grad()
    start = adapted().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(found[name], start[name]) == ("lora" not in name), name
    if OLDER:
        return
    saved = every[1] / "adapter/checkpoint-4"
    for name, value in peft.PeftModel.from_pretrained(llama(), saved).state_dict().items():
        assert torch.equal(value, found[name]), name


def test_evaluation_is_of_the_whole_model(every):
    model = llama(tie_word_embeddings=True)
    for found in every[0]:
        model.load_state_dict(found["evaluated"]["state"])
        with torch.no_grad():
            expected = float(model(**language.batches.collate(samples(4, 9))).loss)
        assert found["evaluated"]["measured"][-1] == pytest.approx(expected, rel=1e-5)


def test_a_loop_of_ones_own_under_accelerate(every):
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
    for number, step in enumerate(parts_of(), 1):
        surgeon.add(**step, loss=GradAscent())
        if number % 2 == 0:
            surgeon.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    alike(every[0], "loop", model)


REFUSED = {
    "loss": (
        ("RankError", "rank 1: ZeroDivisionError: a loss that fails"),
        ("ZeroDivisionError", "a loss that fails"),
    ),
    "reference": (("InputError", "reference: Frozen holds a model in fully_shard"),) * 2,
    "compiled": (("InputError", "torch_compile with fsdp is not served"),) * 2,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_named(every, name):
    for rank, found in enumerate(every[0]):
        kind, message = found["refused"][name]
        assert kind == REFUSED[name][rank][0]
        assert message.startswith(REFUSED[name][rank][1])


def replicated(rank, folder):
    """Replicas of shards, on four ranks."""
    on_gpus(rank, 4)
    sizes = accelerate.ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    return {"plain": found_of(ours(folder / "plain", made(), args={"parallelism_config": sizes}))}


def test_replicas_of_shards(tmp_path):
    model = made()
    known = LogProbs.of(model, [all_forget()])
    given = list(steps_of(EPOCHS, 8, ranks=4))
    plain(model, LOWER, given, language.NPO(reference=known), language.NLL())
    alike(run(replicated, 4, tmp_path, tmp_path), "plain", model)
