"""Checkpoints: what is saved comes back, a damaged file gives way to the one before it, a failed save leaves the last one."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoder import Encoder, lora
from files.console import InputError
from files.writing import WriteError
from training.checkpoint import (
    TrainingState,
    gather_random_states,
    load_checkpoint,
    save_checkpoint,
)
from training.checkpoint_files import content_hash, read_checkpoint
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT, after_a_failed_write, has_checkpoint

CPU = torch.device("cpu")


class Training:
    """An adapter whose parameters have taken one optimizer step."""

    def __init__(self, model: str, seed: int = 0):
        torch.manual_seed(seed)
        self.encoder = Encoder.load(model, prompt="cluster", pooling="query")
        self.encoder.add_adapter(2)
        self.trained = self.encoder.trainable() | {"temperature": torch.nn.Parameter(torch.tensor(-3.0))}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2)
        self.step()

    def step(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def save(self, folder: Path, state: TrainingState, best: dict | None = None) -> None:
        save_checkpoint(folder, self.encoder, self.trained, self.optimizer, state, best or {}, gather_random_states(CPU))

    def snapshot(self) -> dict:
        moments = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.trained.items()}
        return copy.deepcopy({"weights": {n: p.detach() for n, p in self.trained.items()}, "moments": moments})


@pytest.fixture
def training(llama) -> Training:
    return Training(llama)


def state_after(step: int) -> TrainingState:
    return TrainingState(chunk_size=4, gradient_checkpointing=2, step=step, run_id="test")


def test_what_is_saved_comes_back(training, llama, tmp_path):
    state = TrainingState(8, 1, 7, 3.5, None, 1, 2, 3, 0.5, 0.4, 6, 1, "abcd")
    best = {name: torch.randn_like(parameter) for name, parameter in training.trained.items()}
    training.save(tmp_path, state, best)
    saved, next_number = training.snapshot(), torch.rand(1)
    other = Training(llama, seed=1)
    loaded_state, loaded_best = load_checkpoint(tmp_path, other.encoder, other.trained, other.optimizer)
    assert loaded_state == state
    torch.testing.assert_close(loaded_best, best, rtol=0, atol=0)
    torch.testing.assert_close(other.snapshot(), saved, rtol=0, atol=0)
    assert torch.equal(torch.rand(1), next_number)


def test_loading_mends_an_adapter_that_was_not_saved_with_the_checkpoint(training, llama, tmp_path):
    training.save(tmp_path, state_after(1))
    whole = Encoder.load(str(tmp_path)).fingerprint
    for path in tmp_path.iterdir():
        if path.name != CHECKPOINT:
            path.unlink()
    other = Training(llama, seed=1)
    load_checkpoint(tmp_path, other.encoder, other.trained, other.optimizer)
    assert Encoder.load(str(tmp_path)).fingerprint == whole


@pytest.mark.parametrize("damage", ["a bit of a tensor", "a bit of the state", "half a file"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(training, tmp_path, capsys, damage):
    training.save(tmp_path, state_after(2))
    training.step()
    training.save(tmp_path, state_after(4))
    assert read_checkpoint(tmp_path, TrainingState)[0] == state_after(4)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    if damage == "a bit of a tensor":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "a bit of the state":
        assert content.count(b'\\"step\\": 4') == 1
        path.write_bytes(content.replace(b'\\"step\\": 4', b'\\"step\\": 5'))
    else:
        path.write_bytes(content[: len(content) // 2])
    assert read_checkpoint(tmp_path, TrainingState)[0].step == 2
    assert "checkpoint.safetensors is damaged and deleted: going on from checkpoint.previous.safetensors, step 2" in capsys.readouterr().err
    training.save(tmp_path, state_after(6))  # the damaged file did not take the place of the good one
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    assert read_checkpoint(tmp_path, TrainingState)[0].step == 2
    (tmp_path / PREVIOUS_CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(InputError, match="no older checkpoint is whole"):
        read_checkpoint(tmp_path, TrainingState)


def test_a_checkpoint_of_another_version_is_refused(training, tmp_path):
    training.save(tmp_path, state_after(1))
    tensors = load_file(tmp_path / CHECKPOINT)
    state = json.dumps(asdict(state_after(1)) | {"a field of tomorrow": 1})
    save_file(tensors, tmp_path / CHECKPOINT, metadata={"state": state, "sha256": content_hash(tensors, state_after(1))})
    with pytest.raises(InputError, match="of another version"):
        read_checkpoint(tmp_path, TrainingState)


def test_a_full_disk_leaves_the_last_checkpoint(training, tmp_path, monkeypatch):
    def disk_is_full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_file = lora.save_file
    for is_full in (True, False, True):
        monkeypatch.setattr(lora, "save_file", disk_is_full if is_full else save_file)
        if not is_full:
            assert after_a_failed_write(tmp_path) == "there was no checkpoint yet, start it again"
            training.save(tmp_path, state_after(2))
            continue
        with pytest.raises(WriteError, match=r"checkpoint\.safetensors cannot be written: No space left on device$"):
            training.save(tmp_path, state_after(4))
    assert read_checkpoint(tmp_path, TrainingState)[0].step == 2 and "go on with --resume" in after_a_failed_write(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_weights_that_are_not_finite_are_not_saved(training, tmp_path):
    assert not has_checkpoint(tmp_path)
    training.save(tmp_path, state_after(2))
    (tmp_path / "a new file").touch()  # another user can read all of them, if the umask lets him
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    next(iter(training.trained.values())).data[0] = torch.nan
    with pytest.raises(InputError, match=r"step 4: .* not finite any more, the last checkpoint stays"):
        training.save(tmp_path, state_after(4))
    assert has_checkpoint(tmp_path) and read_checkpoint(tmp_path, TrainingState)[0].step == 2
