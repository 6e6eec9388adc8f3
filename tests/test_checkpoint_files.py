"""The checkpoint's files against the safetensors library and hashlib; which checkpoints are refused, renamed or skipped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lvtrain.checkpoint import files as files
from lvtrain.checkpoint.checkpoints import Checkpoints, open_weights
from lvtrain.checkpoint.lease import hold
from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.distributed.world import World
from lvtrain.errors import UserError

ALONE = World(0, 1, 0, torch.device("cpu"))


@contextlib.contextmanager
def open_checkpoints(folder: Path, **changes: Any) -> Iterator[Checkpoints]:
    arguments: dict[str, Any] = {"run_id": "run", "fingerprint": "faces"} | changes
    with hold(folder, ALONE) as lease, Checkpoints(folder, ALONE, **arguments, lease=lease) as checkpoints:
        yield checkpoints


def state_of(step: int, classes: int = 11) -> State:
    generator = torch.Generator().manual_seed(step)
    return {
        "backbone.param.w": Replicated(torch.randn(5, 3, generator=generator)),
        "backbone.buffer.count": Replicated(torch.tensor(step)),
        "classifier.weight": Rows(torch.randn(classes, 4, generator=generator), 0, classes),
    }


def saved(folder: Path, *steps: int) -> Path:
    """A run folder with checkpoints of these steps."""
    with open_checkpoints(folder, keep_last=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, step * 16, "one", state_of(step), {"step": step})
        checkpoints.wait()
    return folder


def newest_step(folder: Path, **changes: Any) -> int | None:
    with open_checkpoints(folder, **changes) as checkpoints:
        found = checkpoints.newest()
        if found is None:
            return None
        reader = checkpoints.load(found)
        for name, value in state_of(found.step).items():
            whole = reader.rows(name, 0, 11) if isinstance(value, Rows) else reader.replicated(name)
            assert torch.equal(whole, value.tensor)
        reader.finish()
        assert found.meta == {"step": found.step} and found.samples_seen == 16 * found.step
        return found.step


def test_tensor_files_are_safetensors_and_hashed_as_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 3),
        "b.bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(2, 2, 2).half(),
        "double": torch.randn(3, dtype=torch.float64),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "transposed": torch.randn(4, 6).t(),
        "large": torch.randn(5_000_000),  # more than one chunk
    }
    written = files.write_tensors(tmp_path / "x.safetensors", tensors, {"step": "1"})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert written.sha256 == hashlib.sha256(data).hexdigest() and written.size == len(data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with pytest.raises(FileExistsError):
        files.write_tensors(tmp_path / "x.safetensors", tensors, {})


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None


def test_newest_is_taken(tmp_path: Path) -> None:
    assert newest_step(saved(tmp_path, 2, 10, 9)) == 10


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 3] ^= 0x10
        path.write_bytes(data)
    elif how == "flip_last":
        data[-1] ^= 0x01
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "flip_last", "truncate", "delete"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank_00000.safetensors"])
def test_damage_is_found_put_aside_and_the_one_before_is_taken(tmp_path: Path, name: str, how: str) -> None:
    saved(tmp_path, 1, 2)
    _damage(tmp_path / "checkpoints" / "step_000000002" / name, how)
    assert newest_step(tmp_path) == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("damaged_*")] == ["damaged_step_000000002"]


def test_flipped_bits_of_the_manifest_are_found(tmp_path: Path) -> None:
    """A flipped bit is either found, or white space that says nothing."""
    folder = saved(tmp_path, 3) / "checkpoints" / "step_000000003"
    manifest = folder / "manifest.json"
    good, content = manifest.read_bytes(), files.read_manifest(folder)
    for position in range(0, len(good), 3):
        manifest.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with contextlib.suppress(files.Damage):
            assert files.read_manifest(folder) == content


def test_a_shard_of_another_step_is_found(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    name = "rank_00000.safetensors"
    shutil.copy(tmp_path / "checkpoints/step_000000001" / name, tmp_path / "checkpoints/step_000000002" / name)
    assert newest_step(tmp_path) == 1


# what a tool that renews the manifest's hash may have done to its content
TAMPERED: dict[str, Any] = {
    "another folder's file": lambda content: _rename(content, "rank_00000.safetensors", "../x.safetensors"),
    "a hidden file": lambda content: content["files"].update({".x": {"size": 1, "sha256": ""}}),
    "a file that is not listed": lambda content: content["tensors"]["backbone.param.w"].update(file="state.jsn"),
    "no state": lambda content: content["files"].pop("state.json"),
    "rows twice": lambda content: content["tensors"]["classifier.weight"].update(pieces=[_piece(0, 7), _piece(4, 11)]),
    "rows missing": lambda content: content["tensors"]["classifier.weight"].update(
        pieces=[_piece(0, 4), _piece(7, 11)]
    ),
    "rows of nothing": lambda content: content["tensors"]["classifier.weight"].update(shape=[]),
    "fewer rows": lambda content: content["tensors"]["classifier.weight"].update(pieces=[_piece(0, 4)]),
    "a negative size": lambda content: content["tensors"]["backbone.param.w"].update(shape=[-1, 3]),
    "an unknown type": lambda content: content["tensors"]["backbone.param.w"].update(dtype="F33"),
    "size as text": lambda content: content["files"]["state.json"].update(size="9"),
    "a list of files": lambda content: content.update(files=["state.json"]),
    "no tensors": lambda content: content.pop("tensors"),
    "step true": lambda content: content.update(samples_seen=True),
    "run as a number": lambda content: content.update(run_id=5),
}


def _piece(start: int, stop: int) -> dict[str, Any]:
    return {"file": "rank_00000.safetensors", "start": start, "stop": stop}


def _rename(content: dict[str, Any], name: str, other: str) -> None:
    content["files"][other] = content["files"].pop(name)


@pytest.mark.parametrize("what", TAMPERED)
def test_a_manifest_whose_hash_was_renewed_is_not_believed(tmp_path: Path, what: str) -> None:
    folder = saved(tmp_path, 1, 2) / "checkpoints" / "step_000000002"
    shutil.copy(folder / "rank_00000.safetensors", folder.parent / "x.safetensors")
    content = files.read_manifest(folder)
    TAMPERED[what](content)
    (folder / "manifest.json").write_text(files.manifest_text(content))
    with pytest.raises(files.Damage):
        files.read_manifest(folder)
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("content", ["[" * 100_000, '{"sha256": 1e999, "content": {}}', "null", "[]", '{"content": 5}'])
def test_a_manifest_of_any_json_is_damage(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path, 1, 2) / "checkpoints" / "step_000000002"
    (folder / "manifest.json").write_text(content)
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("other", ["another step", "another run", "another rank", "another shape", "no tensor"])
def test_a_shard_says_whose_it_is(tmp_path: Path, other: str) -> None:
    """The shard is exchanged, and the manifest's hashes are renewed."""
    folder = saved(tmp_path, 1, 2) / "checkpoints" / "step_000000002"
    shard, content = folder / "rank_00000.safetensors", files.read_manifest(folder)
    tensors, own = load_file(shard), {"run_id": "run", "step": "2", "rank": "0"}
    if other == "another shape":
        tensors["backbone.param.w"] = tensors["backbone.param.w"].T.contiguous()
    elif other == "no tensor":
        tensors["x"] = tensors.pop("backbone.param.w")
    else:
        own |= {"another step": {"step": "1"}, "another run": {"run_id": "x"}, "another rank": {"rank": "1"}}[other]
    shard.unlink()
    record = files.write_tensors(shard, tensors, own)
    content["files"][shard.name] = {"size": record.size, "sha256": record.sha256}
    (folder / "manifest.json").write_text(files.manifest_text(content))
    if other in ("another shape", "no tensor"):
        with pytest.raises(UserError, match=r"backbone\.param\.w"):
            newest_step(tmp_path)
    else:
        assert newest_step(tmp_path) == 1


def test_a_renamed_folder_is_not_believed(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step_000000002").rename(tmp_path / "checkpoints/step_000000007")
    assert newest_step(tmp_path) == 1


def test_none_valid_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        _damage(tmp_path / f"checkpoints/step_00000000{step}/rank_00000.safetensors", "flip")
    for _ in range(2):  # the second start finds only what the first renamed
        with pytest.raises(UserError, match="damaged_step_000000001"):
            newest_step(tmp_path)


def test_another_run_or_dataset_is_refused_and_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(UserError, match=r"init_from\.path="):
        newest_step(tmp_path, run_id="other")
    with pytest.raises(UserError, match="another dataset"):
        newest_step(tmp_path, fingerprint="other")
    assert newest_step(tmp_path) == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1) / "checkpoints" / "step_000000001"
    content = files.read_manifest(folder) | {"version": files.VERSION + 1}
    (folder / "manifest.json").write_text(files.manifest_text(content))
    with pytest.raises(UserError, match="newer lvtrain"):
        newest_step(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    with open_checkpoints(saved(tmp_path, 1)) as checkpoints:
        found = checkpoints.newest()
        assert found is not None
        reader = checkpoints.load(found)
        with pytest.raises(UserError, match=r"backbone\.param\.v"):
            reader.replicated("backbone.param.v")
        with pytest.raises(UserError, match=r"classifier\.weight"):
            reader.replicated("classifier.weight")
        with pytest.raises(UserError, match=r"backbone\.param\.w"):
            reader.rows("backbone.param.w", 0, 1)
        with pytest.raises(UserError, match="6 to 12"):
            reader.rows("classifier.weight", 6, 12)
        reader.replicated("backbone.param.w")
        reader.rows("classifier.weight", 0, 10)
        with pytest.raises(UserError, match=r"backbone\.buffer\.count"):
            reader.finish()
        reader.replicated("backbone.buffer.count")
        with pytest.raises(UserError, match=r"11 .* 10"):
            reader.finish()
        reader.rows("classifier.weight", 10, 11)
        reader.finish()


def test_saving_over_a_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(FileExistsError):
        checkpoints.save(1, 16, "one", state_of(1), {})


def test_retention_keeps_the_last_the_marked_and_every_so_many(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path, keep_last=2, keep_every_samples=100) as checkpoints:
        for step in range(1, 13):
            checkpoints.save(step, step * 25, "one", state_of(step), {}, keep=step == 3)
        checkpoints.wait()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step_{step:09d}" for step in (3, 4, 8, 11, 12)]
    with pytest.raises(ValueError, match="keep_last"), open_checkpoints(tmp_path, keep_last=1):
        pass


def test_a_snapshot_is_what_was_saved_although_training_goes_on(tmp_path: Path) -> None:
    weight, given = torch.ones(200_000, 4), torch.ones(3)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, 1, "one", {"w": Rows(weight, 0, 200_000), "g": Replicated(given, given=True)}, {})
        weight.fill_(2.0)
        checkpoints.save(2, 2, "one", {"w": Rows(weight, 0, 200_000), "g": Replicated(given, given=True)}, {})
        weight.fill_(3.0)
        checkpoints.wait()
        assert [commit.step for commit in checkpoints.finished()] == [1, 2]
    for step in (1, 2):
        opened = open_weights(tmp_path / f"checkpoints/step_{step:09d}")
        assert torch.equal(opened.reader.rows("w", 0, 200_000), torch.full((200_000, 4), float(step)))


def test_open_weights_reads_runs_and_checkpoints_without_changing_them(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    opened = open_weights(tmp_path)
    assert opened.step == 2 and opened.recipe == {"name": "x"} and opened.backbone.keys() == {"w", "count"}
    assert torch.equal(opened.reader.rows("classifier.weight", 3, 5), state_of(2)["classifier.weight"].tensor[3:5])
    _damage(tmp_path / "checkpoints/step_000000002/rank_00000.safetensors", "flip")
    assert open_weights(tmp_path).step == 1
    with pytest.raises(UserError, match="step_000000002"):
        open_weights(tmp_path / "checkpoints/step_000000002")
    assert not list((tmp_path / "checkpoints").glob("damaged_*"))
    with pytest.raises(UserError, match="nothing"):
        open_weights(tmp_path / "nothing")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    with open_checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"\d MB"):
            checkpoints.save(2, 32, "one", state_of(2), {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_manifest_names_everything(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1) / "checkpoints" / "step_000000001"
    content = json.loads((folder / "manifest.json").read_text())["content"]
    assert set(content["files"]) == {"state.json", "rank_00000.safetensors"}
    assert content["tensors"]["classifier.weight"]["shape"] == [11, 4]
