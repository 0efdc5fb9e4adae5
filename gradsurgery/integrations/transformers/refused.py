"""What a Trainer can do and a step with surgery inside of it cannot: refused, by name."""

from __future__ import annotations

import warnings
from typing import Any

import transformers

from gradsurgery.ops._inputs import check


def check_base(kind: type) -> None:
    """Raise `InputError` for a Trainer of TRL that does not train on texts with labels."""
    names = (
        base.__name__
        for base in kind.__mro__
        if base.__module__.partition(".")[0] == "trl" and not base.__name__.startswith("_")
    )
    name = next(names, "SFTTrainer")
    check(
        name == "SFTTrainer",
        f"{name} of TRL is not served: its batches are no texts with labels, but answers compared, "
        "scored or drawn; take SFTTrainer, and where another answer is to be preferred, "
        "forget_loss='dpo' or its like",
    )


def check_served(trainer: Any) -> None:
    """Raise `InputError` for what would not be exact, warn of what is not what it seems."""
    found = transformers.__version__
    old = tuple(map(int, found.split(".")[:2])) < (4, 51)
    check(not old, f"transformers must be 4.51 or newer, got {found}")
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    sampling = getattr(args, "train_sampling_strategy", "random")
    loss_type = getattr(args, "loss_type", None)
    wanted = {
        f"{args.n_gpu} GPUs in one process": (
            args.n_gpu > 1,
            "DataParallel splits batches over replicas; set CUDA_VISIBLE_DEVICES to one GPU",
        ),
        "deepspeed": (trainer.is_deepspeed_enabled, "it steps on gradients that it sums itself"),
        **_processes(trainer),
        f"optim={optim!r}": (
            "lomo" in optim or "layerwise" in optim,
            "it steps inside of a backward pass, before there is an update",
        ),
        f"loss_type={loss_type!r}": (
            loss_type not in (None, "nll", "chunked_nll"),  # one loss, computed in two ways
            "pass forget_loss and retain_loss",
        ),
        "compute_loss_func": (
            getattr(trainer, "compute_loss_func", None) is not None,
            "losses of samples are wanted: pass forget_loss and retain_loss",
        ),
        "label_smoothing_factor": (args.label_smoothing_factor != 0, "no loss here is smoothed"),
        "model_init": (
            trainer.model_init is not None,
            "what is known of the original is of one model: pass the model",
        ),
        "use_liger_kernel": (
            getattr(args, "use_liger_kernel", False),
            "its kernels have not been tried with a tape",
        ),
        "activation_offloading": (
            getattr(args, "activation_offloading", False),
            "what a tape keeps is not offloaded",
        ),
        "packing": (getattr(args, "packing", False), "a row would have several samples"),
        "padding_free": (getattr(args, "padding_free", False), "a row would have several samples"),
        "eval_packing": (
            getattr(args, "eval_packing", None),
            "retain samples are prepared as those of evaluation, and a row would have several",
        ),
        "shuffle_dataset": (
            getattr(args, "shuffle_dataset", False),
            "pairs of samples are drawn in an order of their own",
        ),
        "router_aux_loss_coef": (
            getattr(trainer, "aux_loss_enabled", False),
            "no loss of routers is added to those of samples: pass 0.0",
        ),
        "images": (
            getattr(trainer, "_is_vision_dataset", False),
            "only samples of tokens have been tried with a tape",
        ),
        "group_by_length": (
            getattr(args, "group_by_length", False),
            "pairs of samples are drawn in an order of their own",
        ),
        f"train_sampling_strategy={sampling!r}": (
            sampling != "random",
            "pairs of samples are drawn in an order of their own",
        ),
    }
    for name, (is_wanted, why) in wanted.items():
        check(not is_wanted, f"{name} is not served: {why}")
    _check_checkpointing(args)
    if args.neftune_noise_alpha:
        warnings.warn(
            "neftune_noise_alpha: the noise depends on how far a batch is padded, so a sample's "
            "loss does too",
            stacklevel=4,
        )
    if args.torch_compile:
        warnings.warn("torch_compile: steps with surgery run uncompiled", stacklevel=4)


def _processes(trainer: Any) -> dict[str, tuple[bool, str]]:
    """Of several processes, all that is neither a replica on each nor shards of FSDP2."""
    args, accelerator = trainer.args, trainer.accelerator
    several, kind = args.world_size > 1, accelerator.distributed_type
    kind = str(getattr(kind, "value", kind))
    config, dealt = args.accelerator_config, "pairs are dealt out over processes by the sampler"
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    sharded = plugin is not None and plugin.fsdp_version == 2
    parallel = getattr(accelerator, "parallelism_config", None)
    found = {
        "fsdp version 1": (
            plugin is not None and not sharded,
            "its parameters have no rows: take version 2, by fsdp_config={'version': 2}, or, as "
            "transformers 4 needs it, by --fsdp_version 2 of accelerate launch or FSDP_VERSION=2",
        ),
        "fsdp_config xla": (
            getattr(trainer, "is_fsdp_xla_enabled", False),
            "its parameters have no rows: take fsdp of torch",
        ),
        "torch_compile with fsdp": (
            sharded and args.torch_compile,
            "the model is compiled before it is sharded, and steps run uncompiled: leave it out",
        ),
        f"{args.world_size} processes of {kind}": (
            # accelerate's names of DistributedDataParallel on devices of each kind
            several and not sharded and not kind.startswith("MULTI_"),
            "each is to have a replica of the model, or shards of fsdp",
        ),
        "parallelism_config": (
            parallel is not None and not (sharded and parallel.non_data_parallel_size == 1),
            "each process is to have samples of its own, and a replica of the model or shards of "
            "fsdp: take dp_replicate_size and dp_shard_size alone",
        ),
    }
    for name in ("split_batches", "dispatch_batches"):
        found[f"accelerator_config {name}"] = several and bool(getattr(config, name, None)), dealt
    return found


def _check_checkpointing(args: Any) -> None:
    """Reentrant checkpoints have no rows; older versions of transformers make them by default."""
    for kind in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, kind, False):
            options = getattr(args, f"{kind}_kwargs") or {}
            check(
                not options.get("use_reentrant"),
                f"{kind}_kwargs={{'use_reentrant': True}} is not served: reentrant checkpoints "
                "hide what they compute; use 'use_reentrant': False",
            )
            setattr(args, f"{kind}_kwargs", {**options, "use_reentrant": False})
