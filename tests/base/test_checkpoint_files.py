import os

import pytest
import torch

from ds_quant.base.checkpoint_files import check_files, read_checkpoint_file, universal_command
from ds_quant.config import ConfigError
from ds_quant.numerics.codes import code_map
from ds_quant.optim.state import QuantizedState


@pytest.fixture
def paths(tmp_path):
    found = [str(tmp_path / f"{name}.pt") for name in ("a", "b", "c")]
    for path in found:
        torch.save({"exp_avg": torch.arange(1000)}, path)
    return found


def test_whole_files_pass(paths):
    check_files(paths)
    check_files(iter(paths))
    check_files([])


def test_each_file_that_is_missing_or_cut_is_named(paths):
    missing, cut, good = paths
    os.remove(missing)
    size = os.path.getsize(cut)
    for length in (size - 1, size // 2, 0):
        os.truncate(cut, length)
        with pytest.raises(ConfigError) as caught:
            check_files([missing, cut, good])
        lines = str(caught.value).splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(
            f'{missing}: got "no such file"; allowed: the moments of this rank; fix: load another'
        )
        assert "ds_to_universal" in lines[0]
        assert lines[1].startswith(f'{cut}: got "a file of {length} bytes that is truncated')
        assert lines[1].endswith("fix: load another tag, or copy the checkpoint again")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        check_files([str(tmp_path)])


def test_tensors_are_not_read(paths, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was loaded"))
    check_files(paths)


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    path, trace = tmp_path / "states.pt", tmp_path / "it_ran"
    torch.save({"optimizer": Malicious(trace), "weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint_file(str(path))
    assert not trace.exists()
    # Python 3.13 calls it _io.open.
    assert f"{path}: got a pickle that names {open.__module__}.open; allowed: " in str(caught.value)
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is harmless by itself: the refusal above shows nothing"


def test_what_deepspeed_writes_is_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    moment = QuantizedState.quantize(torch.randn(64), code_map("power", 8, signed=True), 64)
    path = tmp_path / "states.pt"
    torch.save([LossScaler(2.0), ZeroStageEnum(2), fragment_address(1, 2), moment], path)
    scaler, stage, address, loaded = read_checkpoint_file(str(path), mmap=True)
    assert (scaler.cur_scale, stage, address.start) == (2.0, 2, 2)
    assert torch.equal(loaded.dequantize(), moment.dequantize())


def test_the_command_for_other_ranks_names_what_the_trainer_looks_for():
    command = universal_command("/runs/a b/checkpoint-2/global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "--inject_missing_state" in command
    assert "--input_folder '/runs/a b/checkpoint-2/global_step2'" in command
    assert command.endswith("> '/runs/a b/checkpoint-2/latest_universal'")
