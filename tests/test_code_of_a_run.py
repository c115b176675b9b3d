"""A run is of the code that it began with, and says so where a process that times finds another."""

import dataclasses

import pytest
import torch
import yaml
from conftest import TOY, tiny_spec, written

from harness import freshness, measuring, workers
from harness.cells import load_run
from harness.code_digest import digest_of, own_digest
from harness.errors import UserError
from harness.spec import Backbone

KWARGS = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}


@pytest.fixture
def plugins(tmp_path, request):
    """A plug-in of a name that no other test has, and a copy of it that is never loaded."""
    name = request.function.__name__.removeprefix("test_")
    text = TOY.replace('name = "toy"', f'name = "{name}"')
    (tmp_path / "copy").mkdir()
    return name, written(tmp_path, name, text), written(tmp_path / "copy", name, text)


def edit(file):
    file.write_text(file.read_text().replace("-patches.new_ones", "patches.new_ones"))


def test_digests_are_taken_when_the_spec_has_been_read(plugins, tmp_path, tiny_data):
    """Data is read afterwards, which may take minutes in which somebody edits the file."""
    name, file, copy = plugins
    spec = tmp_path / "tiny.yaml"
    spec.write_text(yaml.safe_dump(tiny_spec(tiny_data, entries=[{"method": name}])))
    load_run(spec, plugins=[file])
    edit(file)
    assert freshness.code_digest(name) == digest_of(copy)
    assert freshness.plugin_part(name) == {"plugin_code": own_digest(copy)}
    assert digest_of(written(tmp_path, "read_now", file.read_text())) != digest_of(copy)


def test_digests_are_taken_before_a_survey(plugins, here, monkeypatch, tmp_path):
    """Each job has the digest that the code had when the command began, also where a file was edited since."""
    name, file, copy = plugins
    jobs = []

    def measure(job):
        jobs.append(job)
        return iter(())

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(workers, "start_server", lambda: edit(file))
    sets = [part for key, value in KWARGS.items() for part in ("--set", f"backbone.{key}={value}")]
    done = here(
        "latency", "--backbone", "vit_tiny_patch16_224", "--image-size", 16, *sets, "--methods", name, "--plugin", file,
        "--results", tmp_path / "results", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    subjects = {job.subject.method: job.subject for job in jobs}
    assert {name: subject.code for name, subject in subjects.items()} == {
        "dense": freshness.code_digest("dense"), name: digest_of(copy)
    }  # fmt: skip


def sparsified(subject):
    """What a process that times does first."""
    method, _ = subject.sparsify(subject.dense(), torch.zeros(1, 3, 16, 16))
    yield method.name


def test_a_process_that_times_refuses_other_code(plugins):
    name, file, copy = plugins
    backbone = Backbone(name="vit_tiny_patch16_224", kwargs=KWARGS)
    subject = measuring.Subject(backbone, 3, 16, 0, name, {}, plugins=(str(file),), code=digest_of(copy))
    assert list(workers.results_of(sparsified, subject)) == [name]
    edit(file)
    with pytest.raises(UserError, match=f"{name}'s code changed while this ran; start it again"):
        list(workers.results_of(sparsified, subject))
    assert list(workers.results_of(sparsified, dataclasses.replace(subject, code=None))) == [name]
