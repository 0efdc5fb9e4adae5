"""What a job is: whose data, which model, what is measured, and what people are told of it.

`pipeline` runs one, `tune` searches its options, `report` shows it; none of them knows which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs.stages import NEEDED, TRAINED, stage_name
from gradsurgery.unlearn.jobs.yaml import read_yaml
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from gradsurgery.unlearn.objectives.base import Batch, Objective, check_has, joined
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.trainer import Probe, TrainerConfig, require

if TYPE_CHECKING:
    from gradsurgery.unlearn.jobs.directory import RunDirectory, Stage

    Method = str
else:
    Method = Literal[("all", *METHODS, "retrain")]
HeldOut = Literal["validation", "test"]
Measured = dict[str, float]  # metrics of one model by their keys
Summary = dict[str, Any]  # what summary.json holds

# a section of options for every method there is
MethodOptions = make_dataclass(
    "MethodOptions",
    [(name, kind.Config, field(default_factory=kind.Config)) for name, kind in METHODS.items()],
)


@dataclass(frozen=True)
class Variant:
    """A method as one stage runs it: with a share of the retain set, and some options changed."""

    method: str
    fraction: float = 1.0
    label: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    run: int = 1

    @property
    def name(self) -> str:
        return stage_name(self.method, self.fraction, self.label, self.run)


@dataclass
class JobConfig(MethodOptions):
    """Options of every job."""

    task: Any = ""  # each job's own choices
    """What to forget."""
    method: tuple[Method, ...] = ("orthograd", "ltu", "graddiff", "finetune")
    """One or more methods, or all; the original and the retrained model are always made."""
    seeds: int = 2
    """How many seeds; each draws its own split, forget set, weights and order of the data."""
    first_seed: int = 0
    runs: int = 1
    """Unlearning runs of each method for every seed, from the same original in other orders of the
    data. A seed's numbers are their means; its pictures and its model are those of the first."""
    retain_fraction: tuple[float, ...] = (1.0,)
    """Share of the retain set that the methods are given, in (0, 1], the same of every class;
    several: each method runs with each. Original and Retrain always have all of it, and retain
    accuracy is over all of it."""
    tune: int = 0
    """First draw each method's options at random so many times and keep what does best on
    validation data, on seeds of its own."""
    shadows: int = 0
    """Shadow models of U-LiRA, an attack on every sample, and of KLoM: so many originals, retrained
    and, of each method, unlearned models more for every seed. 0: neither; a few do."""
    second_retrain: bool = False
    """Train Retrain once more for every seed, from other weights and in another order of the data.
    The gap between the two is what chance alone makes: gaps are told in units of it too."""
    threads: int = 1
    """CPU threads of torch; a small model gains little from more, and on a busy machine they cost a
    lot. Another number can change the last bits of every result."""
    probe_every: int = 5
    """Steps between measurements of the model during unlearning; of a method that may stop early
    its `stop_every`."""
    checkpoint_every: int = 20
    """Most steps a kill can cost."""
    training: RetrainConfig = field(default_factory=RetrainConfig)
    """How the original and the retrained model are trained."""

    @property
    def methods(self) -> list[str]:
        """The methods to run besides Original and Retrain, in the order of the report."""
        return [name for name in METHODS if name in self.method or "all" in self.method]

    @property
    def fractions(self) -> list[float]:
        """Shares of the retain set to run them with, the largest first."""
        return sorted(set(self.retain_fraction), reverse=True)

    @property
    def variants(self) -> list[Variant]:
        return [Variant(name, share) for share in self.fractions for name in self.methods]

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def check(self) -> None:
        """Raise `InputError` naming the first option that makes no sense."""
        require(self.seeds >= 1, "seeds", "at least 1", brief(self.seeds))
        require(self.seeds <= 2**31, "seeds", "at most 2^31", brief(self.seeds))
        require(0 <= self.first_seed < 2**31, "first-seed", "in [0, 2^31)", self.first_seed)
        require(1 <= self.runs <= 1000, "runs", "from 1 to 1000", brief(self.runs))
        require(len(self.retain_fraction) > 0, "retain-fraction", "at least one share", "none")
        for fraction in self.retain_fraction:
            require(0 < fraction <= 1, "retain-fraction", "in (0, 1]", fraction)
        some = len(self.variants) > 0 or "retrain" in self.method
        require(some, "method", "at least one method", "none")
        require(self.tune >= 0, "tune", "at least 0", self.tune)
        require(self.tune <= 10**6, "tune", "at most a million", brief(self.tune))
        require(self.shadows in (0, *range(2, 1001)), "shadows", "0, or 2 to 1000", self.shadows)
        require(1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)
        require(self.probe_every >= 1, "probe-every", "at least 1", self.probe_every)
        few = self.probe_every <= 2**31
        require(few, "probe-every", "at most 2^31", brief(self.probe_every))
        require(self.checkpoint_every >= 1, "checkpoint-every", "at least 1", self.checkpoint_every)
        for name in ("training", *METHODS):
            getattr(self, name).check(name.replace("_", "-"))
        require(self.training.steps >= 1, "training.steps", "at least 1", self.training.steps)
        require(self.training.stop == "never", "training.stop", "never", self.training.stop)


C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Split:
    """One seed's data, each set a batch of all its samples.

    `forget` and `retain` are disjoint and make up the training set; `forget` is as the original
    model was trained on it.
    """

    forget: Batch
    retain: Batch
    validation: Batch
    """Held out for choices; this and `test` are None where a job was given no such samples."""
    test: Batch
    ids: Sequence[int]
    """The forget set's samples, by their numbers in the data set."""
    about: dict[str, Any]
    """What summary.json says of the forget set besides its size: its class, for instance."""

    @property
    def train(self) -> Batch:
        """All that the original is trained on, forget before retain."""
        return joined(self.forget, self.retain)


S = TypeVar("S", bound=Split)


@dataclass(frozen=True)
class Metric:
    """A number that every stage has, as tables and pages show it."""

    key: str
    """Its name in summary.json."""
    title: str
    group: str
    """Heading of the numbers it stands with."""
    short: str = ""
    """Heading in the main table; none: it is not there."""
    digits: int = 3
    """After the point."""
    compared: bool = False
    """Whether its distance to Retrain enters the mean gap. Such a metric is in [0, 1]."""


DISTANCE = "Distance to Retrain"
GAP = Metric("gap_mean", "mean gap to Retrain", DISTANCE, short="gap")
COSTS = (
    Metric("steps", "steps", "Cost", digits=0),
    Metric("seconds", "seconds", "Cost", digits=1),
    Metric("seconds_ratio", "seconds over Retrain's", "Cost"),
    Metric("retain_samples", "retain samples used", "Cost", digits=0),
    Metric("memory", "peak memory, MB", "Cost", digits=0),
)


class Texts(NamedTuple):
    """What people are told of a finished run, as plain text. Sentences end with a point."""

    title: str
    """Heading of its page: "Unlearning mislabeled digits"."""
    forgotten: str
    """What had to be forgotten, after "To forget: "."""
    real: str
    """What of the data is real, what was made up, and how it was split."""
    doubts: str
    """What the numbers cannot say, besides what they never can; may be empty."""
    price: str
    """What the seconds say, or do not."""
    model: str
    """The model: "a convolutional network of 124,426 parameters for ..."."""
    card_title: str
    """Heading of the model card."""
    numbers: str
    """What the numbers of the tables are, after those that every job has."""
    loading: str
    """Python that loads what the run ends with as `model`."""


def with_weights(made: str) -> str:
    """Python that makes `model`, and then gives it the weights of model.safetensors."""
    return (
        f"from safetensors.torch import load_file\n{made}\n"
        'model.load_state_dict(load_file("model.safetensors"))'
    )


class Job(ABC, Generic[C, S]):
    """A kind of unlearning run: `gradsurgery unlearn NAME`.

    A folder of `gradsurgery.unlearn.jobs` with one in its `job.py` is a job: the command line,
    reports and comparisons find it there.
    """

    name: ClassVar[str]
    """What a user types: the folder's name."""
    about: ClassVar[str]
    """A line of the command line's help."""
    Config: ClassVar[type[JobConfig]]
    tasks: ClassVar[tuple[str, ...]]
    early: ClassVar[tuple[str, ...]] = ("task",)
    """Options on which the defaults of others depend, by their names in `defaults`."""
    alike: ClassVar[dict[str, str]] = {}
    """Tasks that methods' spaces and `tuned` know by another one's name."""
    metrics: ClassVar[tuple[Metric, ...]]
    makes: ClassVar[tuple[str, ...]] = NEEDED
    """Of "original" and "retrain", those that every run makes, and so knows the cost of."""
    described: ClassVar[tuple[str, ...]] = ()
    """Names of its `facts`, without which `texts` cannot be written."""

    # -- options

    @cached_property
    def tuned(self) -> dict[str, dict[str, Any]]:
        """Options chosen for each task on validation data, from tuned.yaml beside the job, if there
        is one."""
        import inspect

        path = Path(inspect.getfile(type(self))).parent / "tuned.yaml"
        return read_yaml(path, "tuned.yaml") if path.exists() else {}

    def defaults(self, task: str | None = None) -> Any:
        """The options a task begins with, those of its own chosen on validation data."""
        config = self.Config()
        task = config.task if task is None else task
        if task not in self.tasks:
            raise InputError(f"--task must be one of {', '.join(self.tasks)}, got {show(task, 80)}")
        known = self.tuned.get(task, self.tuned.get(self.kind(task), {}))
        return update(config, {"task": task, **known})

    def kind(self, task: str) -> str:
        """The task that `task` is treated like, where options are drawn and forgetting is scored:
        itself, unless `alike` names another."""
        return self.alike.get(task, task)

    def resolved(self, config: C) -> C:
        """The options as a run keeps them, where some of them depend on the data."""
        return config

    def check(self, config: C) -> None:
        """Raise `InputError` naming the first option that makes no sense, with these data."""
        config.check()
        for name in config.methods:
            check_has(self.objective, METHODS[name].asks, METHODS[name].title)

    # -- data and model

    @abstractmethod
    def split(self, config: C, seed: int) -> S:
        """One seed's data. The test set holds none of what any seed chooses options on."""

    @abstractmethod
    def model(self, config: C, seed: int = 0) -> nn.Module:
        """A model of the run. Its weights are the given ones, or drawn by `seed`, or are of no
        account where training draws its own."""

    @abstractmethod
    def share(self, retain: Batch, fraction: float, seed: int) -> Batch:
        """A share in (0, 1) of the retain set, drawn by `seed`; a smaller one lies in a larger."""

    def trained(self, config: C) -> tuple[str, ...]:
        """The models that are there before any method runs: "original" and, unless there is none
        to compare with, "retrain", and a second one where it is asked for."""
        return TRAINED if config.second_retrain else NEEDED

    def standing(self, config: C, name: str, seed: int) -> nn.Module | None:
        """One of those models where it stands in the user's files, so that none is trained and the
        run keeps no copy; None where the run makes it."""
        return None

    def given(self, config: C, model: nn.Module) -> bool:
        """Give `model` the original's weights where they are given, so that none is trained;
        whether they are."""
        return False

    def overlap(self, config: C) -> Literal["error", "allow"]:
        """What is done about copies of a sample to forget, as in `Trainer`."""
        return "error"

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What methods and metrics may ask of the task."""

    # -- what is measured

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        split: S,
        held_out: HeldOut = "test",
        retrain: nn.Module | None = None,
    ) -> Measured:
        """Metrics of one model; those that are distances, to `retrain` if it is given."""

    @abstractmethod
    def scores(
        self, task: str, measured: Measured, original: Measured, retrain: Measured | None
    ) -> Measured:
        """Metrics made of a model's own, its seed's original's and its retrained model's (None for
        that model itself), besides the gaps to the last."""

    @abstractmethod
    def relearned(self, model: nn.Module, split: S, original: nn.Module) -> int | None:
        """Steps of training on the forget set until `model` is about as good there as `original`;
        the most that are taken, where they do not suffice. None: not measured."""

    @abstractmethod
    def losses(self, model: nn.Module, split: S) -> dict[str, list[float]]:
        """Losses of the samples under "forget" and "test", nats, for pictures; [] of no sample."""

    @abstractmethod
    def confidences(self, model: nn.Module, split: S) -> dict[str, Tensor]:
        """What U-LiRA and KLoM look at: a number a sample, [N] float64, close to Gaussian over
        models, of the forget set under "forget", and of other sets where they are watched."""

    @abstractmethod
    def probe(self, split: S) -> Probe:
        """Measures a model during its run, and looks at no test sample."""

    def details(self, model: nn.Module, split: S, first: bool) -> dict[str, Any]:
        """What pages show of a model besides numbers that all jobs have; {}: nothing.

        tables: by heading a number a row. examples: some samples, each with title, what is wanted
        and what the model has written, and from the `first` model of a seed perhaps a picture, rows
        of 0 to 255 from the top down. note: a sentence below them.
        """
        return {}

    @property
    def compared(self) -> tuple[str, ...]:
        """Of these the mean gap to Retrain is the mean."""
        return tuple(metric.key for metric in self.metrics if metric.compared)

    def probe_every(self, config: C, options: TrainerConfig) -> int:
        """Steps between probes of an unlearning run: one that may stop early is probed when it
        looks whether to."""
        return config.probe_every if options.stop == "never" else options.stop_every

    # -- what a run ends with

    def publish(self, config: C, directory: RunDirectory, stage: Stage) -> None:
        """Write the model of a stage into its run's directory, as `loading` of `texts` reads it."""
        directory.write("model.safetensors", directory.model_bytes(stage))

    # -- what people are told

    def facts(self, config: C) -> dict[str, str | int]:
        """What a run keeps of data and model in data.json, and summary.json under "data": all that
        `described` names. A run is continued only where it is the same."""
        return {}

    @abstractmethod
    def texts(self, summary: Summary) -> Texts:
        """What to tell people of a finished run."""
