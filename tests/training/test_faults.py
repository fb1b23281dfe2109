"""Messages for ranks with different files, a rank that hangs, and a rank that dies."""

import dataclasses
import os
import time

import pytest

from recurrent_depth.training.faults import check_ranks_agree, code_version, flattened, flight_recorder
from recurrent_depth.training.health import TrainingAborted
from recurrent_depth.training.launch import train
from recurrent_depth.training.parallel import start_processes
from support import changed_loss, outcome, run_ranks, small_run


def disagree(out) -> None:
    config = small_run(out, seed=int(os.environ["RANK"]))
    ranks = start_processes(config.runtime)
    code = code_version()
    check_ranks_agree(ranks, {"code": code, "data": {"fingerprint": "same"}})
    other = code | ({"model/layers.py": "edited"} if ranks.rank == 1 else {})
    things = {
        "code": {"code": other}, "data": {"data": {"fingerprint": str(ranks.rank)}},
        "configuration": {"configuration": flattened(dataclasses.asdict(config))},
    }  # fmt: skip
    for name, what in things.items():
        try:
            check_ranks_agree(ranks, what)
        except TrainingAborted as error:
            (out / f"{name}-{ranks.rank}.txt").write_text(str(error))
    outcome(out, train, config)


@pytest.mark.distributed
def test_ranks_with_different_files_refuse_to_start_and_name_them(tmp_path):
    assert 0 not in run_ranks(disagree, 2, tmp_path)
    for rank in (0, 1):
        assert "rank 1, code, model/layers.py: edited" in (tmp_path / f"code-{rank}.txt").read_text()
        assert "rank 1, data, fingerprint: 1 (rank 0: 0)" in (tmp_path / f"data-{rank}.txt").read_text()
        assert "rank 1, configuration, seed: 1 (rank 0: 0)" in (tmp_path / f"configuration-{rank}.txt").read_text()
    assert "configuration, seed" in (tmp_path / "outcome-0.txt").read_text()
    assert not (tmp_path / "checkpoints").exists()


def train_beside_a_bad_rank(config, dies: bool) -> None:
    """Train; rank 1 sleeps or dies in the middle of a training step."""

    def vanish(trainer, loss):
        if trainer.step == 2 and os.environ["RANK"] == "1":
            if dies:
                os._exit(0)  # status 0, which does not stop rank 0
            time.sleep(30)
        return loss

    with changed_loss(vanish):
        outcome(config.out, train, config)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("dies", "words"), [(False, "hangs or is far behind"), (True, "has died or was killed")])
def test_missing_rank_is_explained(tmp_path, dies, words):
    config = small_run(tmp_path / "run")
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, timeout_minutes=0.05))
    assert run_ranks(train_beside_a_bad_rank, 2, config, dies)[0] != 0
    message = (tmp_path / "run" / "outcome-0.txt").read_text()
    assert message.startswith("TrainingAborted: rank 0")
    assert words in message
    assert "--resume true" in message


@pytest.mark.parametrize("chosen", [{}, {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_FR_DUMP_TEMP_FILE": "elsewhere"}])
def test_flight_recorder_is_on_unless_the_user_set_it(tmp_path, monkeypatch, chosen):
    folder = tmp_path / "recorder"
    expected = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": str(folder / "rank_")} | chosen
    monkeypatch.setattr(os, "environ", dict(chosen))
    flight_recorder(folder)
    assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert not folder.exists()
