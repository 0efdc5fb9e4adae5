"""Runs of which some seeds, classes or sets have not all that others have."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs import tune as search
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.images.job import ImagesJob
from gradsurgery.unlearn.jobs.images.networks import network
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import PlainProgress
from tests.unlearn.jobs.images.made import arrays, finished, tiny


def in_parts(folder, validation=(0, 1, 2), test=(0, 1, 2)):
    """A file whose held-out sets have samples of some classes alone."""
    images, labels = arrays(180)
    path, parts = folder / "parts.npz", {}
    for at, (name, classes) in enumerate(
        {"train": (0, 1, 2), "val": validation, "test": test}.items()
    ):
        part = slice(60 * at, 60 * at + 60)
        some = np.isin(labels[part], classes)
        parts[f"x_{name}"], parts[f"y_{name}"] = images[part][some], labels[part][some]
    np.savez(path, **parts)
    return path


def test_the_mean_gap_is_over_what_all_seeds_have(tmp_path):
    """Class 2 is not in the test set, so seed 2 has no accuracy on it."""
    summary = finished(tmp_path / "run", tiny(in_parts(tmp_path, test=(0, 1)), "class", seeds=3))
    column = summary["columns"]["neggrad"]
    assert "test_forgotten" not in column
    known = [column[f"gap_{name}"]["values"] for name in ("forget", "retain", "test", "mia")]
    expected = np.mean(known, axis=0)
    assert column["gap_mean"]["values"] == pytest.approx(expected, abs=1e-12)


def test_a_search_takes_what_all_its_seeds_have(tmp_path, monkeypatch):
    """Validation lacks class 1, which seed 106 forgets, and has class 0, which 105 does."""
    drawn = {"steps": (1, 2)}
    monkeypatch.setattr(search.METHODS["neggrad"], "space", drawn)
    config = tiny(in_parts(tmp_path, validation=(0, 2)), "class", tune=1)
    with RunDirectory(tmp_path / "run") as directory:
        search.tune(Run(ImagesJob(), config, directory, PlainProgress()))
        (line,) = directory.tuning()
    assert "test_forgotten" not in line["measured"]
    assert 0 <= line["gap"] <= 1


def test_a_class_whose_name_is_no_text_can_be_forgotten(tmp_path):
    images, labels = arrays()
    for number, name in enumerate(("a", "b", "c\udcff")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for at, image in enumerate(images[labels == number]):
            Image.fromarray(image).save(folder / f"{at}.png")
    config = tiny(tmp_path / "data", "class", forget_class="c\udcff")
    summary = finished(tmp_path / "run", config)
    assert summary["forget_sets"]["0"]["class"] == r"c\udcff"
    assert r"c\udcff" in (tmp_path / "run/report.html").read_text()


def test_an_original_that_is_never_right_has_no_impact_score(tmp_path):
    """Its logits are all 0, so it always says class 0, of which test has no sample."""
    weights = network("cnn", 1, (8, 8), 3).state_dict()
    save_file(
        {name: value.zero_() for name, value in weights.items()}, tmp_path / "zero.safetensors"
    )
    data = in_parts(tmp_path, test=(1, 2))
    summary = finished(tmp_path / "run", tiny(data, checkpoint=str(tmp_path / "zero.safetensors")))
    assert summary["columns"]["original"]["test"]["mean"] == 0
    assert "uis" not in summary["columns"]["neggrad"]


def test_data_that_a_later_seed_cannot_use_are_refused_at_once(tmp_path):
    data = in_parts(tmp_path, validation=(2,))
    with pytest.raises(InputError, match="--data: validation has samples of 2 alone"):
        ImagesJob().check(tiny(data, "class", seeds=3))
    ImagesJob().check(tiny(data, "class", seeds=2))
    with pytest.raises(InputError, match="--data: validation has samples of 2 alone"):
        ImagesJob().check(tiny(data, "class", seeds=2, tune=8))  # 107 of the search
