"""The folder of a run's looks: whole files, no step twice, nothing of another run lost."""

import json

import pytest

from ds_quant.base import whole_folder
from ds_quant.config import ConfigError
from ds_quant.diagnostics import folder
from ds_quant.diagnostics.guarded import Guarded
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.norms import StepNorms
from ds_quant.diagnostics.outliers import OutlierRecorder


def look(step, value=1.0):
    return [Measurement("outliers", step, {"outlier_channels": value}, [{"layer": "a", "mean": value}], {})]


def fill(path, *steps):
    folder.begin(path, 0, resumed=False)
    for step in steps:
        folder.add_look(path, step, look(step))


def csv_steps(path):
    return [int(line.split(",")[0]) for line in (path / folder.SCALARS).read_text().splitlines()[1:]]


def test_a_look_is_a_file_and_lines_of_the_csv(tmp_path):
    fill(tmp_path, 5, 10)
    assert list(folder.looks(tmp_path)) == [5, 10]
    assert folder.read_file(folder.looks(tmp_path)[10]) == look(10)
    lines = (tmp_path / folder.SCALARS).read_text().splitlines()
    assert lines == ["step,kind,name,value", "5,outliers,outlier_channels,1.0", "10,outliers,outlier_channels,1.0"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (9, [5]), (10, [5, 10]), (99, [5, 10, 15])])
def test_a_resumed_run_takes_its_steps_again(tmp_path, step, kept):
    fill(tmp_path, 5, 10, 15)
    line = folder.begin(tmp_path, step, resumed=True)
    assert list(folder.looks(tmp_path)) == kept == csv_steps(tmp_path)
    assert (line is None) == (len(kept) == 3)


def test_a_look_whose_csv_lines_were_lost_gets_them_back(tmp_path):
    fill(tmp_path, 5, 10)
    (tmp_path / folder.SCALARS).write_text("step,kind,name,value\n5,outli")
    folder.begin(tmp_path, 10, resumed=True)
    assert csv_steps(tmp_path) == [5, 10]


def test_looks_of_an_earlier_run_are_moved_aside(tmp_path):
    fill(tmp_path, 5)
    for number in (1, 2):
        line = folder.begin(tmp_path, 0, resumed=False)
        assert f"moved to earlier-{number}" in line
        assert list(folder.looks(tmp_path)) == []
        assert list(folder.looks(tmp_path / f"earlier-{number}")) == [5]
        folder.add_look(tmp_path, 5, look(5))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    whole_folder.write_whole(path, "old")
    monkeypatch.setattr(whole_folder.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        whole_folder.write_whole(path, "new" * 10000)
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "got"),
    [("[1", "Expecting"), ("[1, 2]", "other JSON"), ('{"a": 1}', "other JSON"), ('[{"kind": 1}]', "KeyError")],
)
def test_a_broken_file_is_named(tmp_path, text, got):
    path = tmp_path / "step-00000005.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=got):
        folder.read_file(path)


def test_spikes_are_told_by_steps_of_looks_before():
    norms = StepNorms()
    for step in range(1, 11):
        norms.add(step, 1.0)
    assert norms.take().scalars == {"largest_norm": 1.0, "spikes": 0.0}
    for step in range(11, 15):
        norms.add(step, 9.0 if step == 12 else 1.0)
    saved = json.loads(json.dumps(norms.state()))
    for found in (norms.take(), StepNorms(saved).take()):
        assert [row["step"] for row in found.rows] == [11, 12, 13, 14]
        assert found.scalars == {"largest_norm": 9.0, "spikes": 1.0}
        assert found.settings["spikes_at"] == [12]
    assert norms.take() is None
    norms.add(15, None)  # DeepSpeed computes none in fp32 at stage 0
    assert norms.take() is None


def test_a_recorder_that_fails_is_done_with_its_look_only():
    guarded = Guarded(OutlierRecorder())
    guarded.observe_input("unprepared", None, None)
    assert isinstance(guarded.error, Exception)
    assert guarded.run(lambda: 1) is None
    guarded.begin_anew()
    assert guarded.error is None
    assert guarded.run(lambda: 1) == 1
