"""Models of transformers in local directories: safetensors alone, no code but transformers' own."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.text import show
from gradsurgery.unlearn.training.seeds import seeded

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.directory import RunDirectory

FOLDER = "model"  # of the run directory, with what it ends with
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
READ = (".json", ".safetensors", ".jinja", ".model", ".txt")  # of a directory, what makes a model
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def folder(model: str, option: str) -> Path:
    """The directory of a model: the one named, or, of a name such as owner/model, that of
    Hugging Face's cache on this machine. Nothing is downloaded.

    Raises:
        InputError: there is none, or it holds no model that can be read, and why.
    """
    path = Path(model)
    if not path.exists():
        path = _cached(model, option)
    where = f"--{option}: {show(path)}"
    if path.suffix == ".gguf":
        raise InputError(f"{where} is a GGUF file: give a directory of safetensors")
    if not path.is_dir():
        raise InputError(f"{where} is not a directory")
    names = sorted(each.name for each in path.iterdir())
    if "adapter_config.json" in names:  # transformers would take the base that this names
        raise InputError(
            f"{where} is an adapter: merge it into its model (merge_and_unload of peft) and save "
            "that"
        )
    if "config.json" not in names:
        raise InputError(f"{where} has no config.json: it is not a model of transformers")
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{where} {_other_weights(names)}")
    return path


def _other_weights(names: list[str]) -> str:
    for name in names:
        if name.endswith(".gguf"):
            return f"has GGUF weights, {show(name, 80)}, and no safetensors"
        if name.endswith(PICKLES):
            return (
                f"has its weights in {show(name, 80)}, a pickle, which can run code when it is "
                "read: save it anew as safetensors, by save_pretrained where it is trusted"
            )
    return "has no weights: there is no file of safetensors"


def _cached(model: str, option: str) -> Path:
    package("transformers", "hf", "this job")  # which brings the other
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"--{option}: {show(model)} is no directory, and Hugging Face's cache on this machine "
            "has no model of that name; nothing is downloaded here"
        ) from None


def tokenizer(path: Path) -> Any:
    """The tokenizer of a model's directory."""
    transformers = package("transformers", "hf", "this job")
    if not any((path / name).exists() for name in TOKENIZERS):
        raise InputError(
            f"--model: {show(path)} has no tokenizer, none of {', '.join(TOKENIZERS)}: save it "
            "there with its save_pretrained"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of tokenizers, sentencepiece, ...: whatever they raise
        raise InputError(f"--model: the tokenizer of {show(path)}: {_first(error)}") from None


def load(
    path: Path, option: str, dtype: str, device: str, kind: Literal["text", "speech"] = "text"
) -> nn.Module:
    """A model with all its weights, which train.

    Args:
        kind: text, a causal language model; speech, one of Whisper's architecture.

    Raises:
        InputError: one of another kind, one that needs code of its own, weights that are missing.
    """
    transformers = package("transformers", "hf", "this job")
    where, local = f"--{option}: {show(path)}", {"local_files_only": True}
    try:
        known = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **local)
    except Exception as error:
        raise InputError(f"{where} {_unread(path, error)}") from None
    if kind == "text" and getattr(known, "is_encoder_decoder", False):
        raise InputError(f"{where} is an encoder with a decoder: give a causal language model")
    if kind == "speech" and known.model_type != "whisper":
        raise InputError(
            f"{where} is of {show(known.model_type, 40)}: give a model of Whisper's architecture"
        )
    auto = {"text": "AutoModelForCausalLM", "speech": "WhisperForConditionalGeneration"}[kind]
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    numbers = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    try:
        with _quiet():
            model, info = getattr(transformers, auto).from_pretrained(
                path,
                use_safetensors=True,
                output_loading_info=True,
                **({"trust_remote_code": False} if kind == "text" else {}),
                **numbers,
                **local,
            )
    except Exception as error:
        raise InputError(f"{where} {_unread(path, error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{where} is no whole {type(model).__name__}: it lacks {len(missing)} weights, such as "
            f"{show(missing[0], 80)}"
        )
    return model.to(device)


def dealt_out(model: nn.Module, device: str) -> nn.Module:
    """The model in `fully_shard` over all processes, each of its blocks and what else there is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    kinds = set(getattr(model, "_no_split_modules", None) or ())  # their names
    for module in list(model.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for each of the many times that a run reads or writes a model, and no warnings of what
    transformers and peft are to change between them."""
    logging = package("transformers", "hf", "this job").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # as peft sets it itself
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def publish(
    model: nn.Module, directory: RunDirectory, adapter: bool, tokens: Any | None = None
) -> None:
    """Put a model into the run directory as `save_pretrained` writes it, with its tokenizer.

    Args:
        adapter: whether that is what the model was given, and all that is written.
    """
    made: Any = model
    # embeddings are never trained, and to ask whether they are would ask the network
    options = {"save_embedding_layers": False} if adapter else {}
    with TemporaryDirectory(dir=directory.path, prefix=".saved-") as saved:
        with _quiet():
            made.save_pretrained(saved, **options)
        if tokens is not None:
            tokens.save_pretrained(saved)
        directory.make_folder(FOLDER)
        for file in sorted(Path(saved).iterdir()):
            if file.name != "README.md":  # a form to fill in; there is model_card.md
                directory.write(f"{FOLDER}/{file.name}", file.read_bytes())


def _unread(path: Path, error: Exception) -> str:
    try:
        own = "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        own = False
    if own:
        return "needs code of its own, and none is run here"
    return f"cannot be read: {_first(error)}"


def _first(error: Exception) -> str:
    return show(next((line for line in str(error).splitlines() if line), type(error).__name__))


@dataclass(frozen=True)
class Adapter:
    """Which adapter is put on a model."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    task: str | None = "CAUSAL_LM"
    """What peft calls the model's task; None: none of those that it knows."""

    def on(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with an adapter that changes nothing yet; it alone trains, and it alone is in
        the state of the whole."""
        peft = package("peft", "hf", "this job")
        targets = self.targets[0] if self.targets == ("all-linear",) else list(self.targets)
        options = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=targets, task_type=self.task
        )
        device = next(model.parameters()).device
        try:
            with seeded(seed, device), _quiet():
                made = peft.get_peft_model(model, options)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--lora-targets: {_first(error)}") from None
        _keep_trained_only(made)
        return made


def _keep_trained_only(model: nn.Module) -> None:
    """Leave what does not train out of a model's state, where it would be written again and again,
    and do not miss it there."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def leave(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.removeprefix(prefix) not in names]:
            del state[name]

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in names]

    model.register_state_dict_post_hook(leave)
    model.register_load_state_dict_post_hook(forgive)


def digest(path: Path) -> str:
    """SHA-256 of the files that make a model and its tokenizer, with their names."""
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in READ and file.is_file():
            found.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                while part := stream.read(2**20):
                    found.update(part)
    return found.hexdigest()
