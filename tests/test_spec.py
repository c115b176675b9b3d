"""Specs: sweeps, overrides, and errors that say what, where and what instead."""

from pathlib import Path

import pytest
import yaml
from conftest import tiny_spec

from harness.cells import expand, load_run
from harness.errors import UserError
from harness.spec import Entry, find_spec, is_survey
from harness.survey import load_survey


@pytest.fixture
def write(tmp_path, tiny_data):
    def _write(text=None, **changes) -> Path:
        path = tmp_path / "bench.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(tiny_spec(tiny_data, **changes)))
        return path

    return _write


def test_baselines_come_first_and_by_themselves(write):
    cells = load_run(write(seeds=[3, 4])).cells()
    assert [(cell.label, cell.seed) for cell in cells] == [
        (label, seed) for seed in (3, 4) for label in ("dense", "dense+", "dynamicvit keep_rate=0.6")
    ]


def test_a_list_is_a_sweep_unless_the_setting_takes_it():
    entry = Entry(method="dynamicvit", settings={"keep_rate": [0.9, 0.7], "pruning_loc": [1, 2]})
    assert [(m.settings.keep_rate, m.settings.pruning_loc) for _, m in expand(entry)] == [(0.9, (1, 2)), (0.7, (1, 2))]
    entry = Entry(method="dynamicvit", settings={"pruning_loc": [[1, 2], [3]]}, label="D {pruning_loc}")
    assert [label for label, _ in expand(entry)] == ["D [1, 2]", "D [3]"]


def test_overrides_reach_specs_and_settings(write):
    run = load_run(write(), ["budget.epochs=2", "dynamicvit.keep_rate=[0.9,0.7]", "recipe.lr=1e-2"])
    assert run.spec.budget.epochs == 2
    assert run.spec.recipe.lr == 0.01
    assert [m.settings.keep_rate for _, m in expand(run.entries[0])] == [0.9, 0.7]


def test_methods_select_entries_and_add_defaults(write):
    assert [e.method for e in load_run(write(), only=["random"]).entries] == ["random"]
    assert load_run(write(), only=["dense"]).entries == ()
    assert load_run(write(), only=["dynamicvit"]).entries[0].settings == {"keep_rate": 0.6}


def test_a_plug_in_joins_the_run(write, toy_file):
    assert [e.method for e in load_run(write(), plugins=[str(toy_file)]).entries] == ["dynamicvit", "toy"]


def test_plug_ins_of_a_spec_are_relative_to_it(write, toy_file, tmp_path):
    (tmp_path / "mine.py").write_text(toy_file.read_text().replace('"toy"', '"mine"'))
    run = load_run(write(plugins=["mine.py"], entries=[{"method": "mine", "settings": {"keep_rate": [0.5, 0.25]}}]))
    assert [cell.label for cell in run.cells()][2:] == ["mine keep_rate=0.5", "mine keep_rate=0.25"]


WRONG_FILES = {
    "title: x\n": "data is missing",
    "data: {card: x}\nbudget: {epoch: 3}\n": "bench.yaml:2: budget: unknown key 'epoch'",
    "data: {card: x}\nentries:\n  - method: dynamicvit\n    setings: {}\n": "bench.yaml:4: entries.0: unknown key 'setings'",
    "data: {card: x}\nentries:\n  - method: dinamicvit\n": "did you mean 'dynamicvit'",
    "data: {card: x}\nbudget: {epochs: -3}\n": "bench.yaml:2: budget.epochs: input should be greater than 0 (got -3)",
    "data: {card: x}\nbudget: {epochs: many}\n": "bench.yaml:2: budget.epochs",
    "data: {card: x}\ndata: {card: y}\n": "bench.yaml:2: the key 'data' appears twice",
    "data: [card\n": "bench.yaml:2: not valid YAML",
    "- a\n": "must be a mapping",
    "": "must be a mapping",
    "data: {card: x}\n? [a, b]\n: 1\n": "not valid",
    "data: &a {card: *a}\n": "not valid",
    "data: {card: x}\nadapt: {lrr: 1}\n": "adapt: unknown key 'lrr'",
    "data: {card: x}\nrecipe: {crop: pad}\n": "need crop: resized",
    "data: {card: x}\nplugins: [nope.py]\n": "no such file",
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.items())
def test_wrong_files_are_told_in_one_line(write, text, message):
    with pytest.raises(UserError) as told:
        load_run(write(text))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


WRONG_OVERRIDES = {
    "budget.epoch=3": "did you mean 'epochs'",
    "bugdet.epochs=3": "did you mean 'budget'",
    "budget": "must be KEY=VALUE",
    "title.x=3": "title has no keys inside",
    "random.keep_rate=0.5": "this run has no entry of random",
    "dynamicvit=3": "must be METHOD.SETTING=VALUE",
    "budget.epochs=[": "not valid YAML",
    "budget.epochs=0": "greater than 0",
    "recipe.lr=.inf": "finite number",
    "entries=[]": "use --methods",
    "seeds=[0,0]": "a seed is repeated",
    "adapt.crop=resized": "must both crop resized",
    "plugins=[x.py]": "use --plugin",
    "backbone.kwargs.num_classes=3": "it comes from the data",
}


@pytest.mark.parametrize(("override", "message"), WRONG_OVERRIDES.items())
def test_wrong_overrides_are_told_in_one_line(write, override, message):
    with pytest.raises(UserError) as told:
        load_run(write(), [override])
    assert message in str(told.value)
    assert "\n" not in str(told.value)


WRONG_SETTINGS = {
    "dynamicvit.keep_rat=0.5": ("unknown setting 'keep_rat'", "did you mean 'keep_rate'"),
    "dynamicvit.keep_rate=1.5": ("dynamicvit.keep_rate", "less than or equal to 1"),
    "dynamicvit.keep_rate=[]": ("dynamicvit.keep_rate", "empty list"),
    "dynamicvit.keep_rate=[0.5,2]": ("dynamicvit.keep_rate", "less than or equal to 1"),
}


@pytest.mark.parametrize(("override", "messages"), WRONG_SETTINGS.items())
def test_wrong_settings_are_told_in_one_line(write, override, messages):
    with pytest.raises(UserError) as told:
        load_run(write(), [override]).cells()
    assert all(message in str(told.value) for message in messages)


def test_two_rows_cannot_share_a_label(write):
    entry = {"method": "dynamicvit", "label": "same"}
    run = load_run(write(entries=[entry, entry | {"settings": {"keep_rate": 0.5}}]))
    with pytest.raises(UserError, match="two rows are called 'same'"):
        run.cells()


def test_a_label_names_only_its_own_settings(write):
    run = load_run(write(entries=[{"method": "dynamicvit", "label": "x {density}"}]))
    with pytest.raises(UserError, match="is no setting"):
        run.cells()


def test_the_adaptation_recipe_is_the_recipe_with_changes(write):
    spec = load_run(write(adapt={"lr": 0.5})).spec
    assert spec.adapt_recipe.lr == 0.5
    assert spec.adapt_recipe.batch_size == spec.recipe.batch_size


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "benchmarks").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_specs_that_come_with_the_project_are_valid(path):
    assert load_survey(path) if is_survey(yaml.safe_load(path.read_text())) else load_run(path).cells()
    assert find_spec(path.stem) == path


def test_an_unknown_spec_name_shows_the_known_ones():
    with pytest.raises(UserError, match="did you mean 'quick'"):
        find_spec("quik")
