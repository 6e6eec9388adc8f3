"""What is tried again, for how long, and what becomes of a file when writing it fails."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lvtrain.errors import UserError
from lvtrain.files import atomic, patience


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0, 0.0))


def failing(*numbers: int) -> list[OSError]:
    return [OSError(number, "failed", "a/file") for number in numbers]


class Disk:
    """An action that fails with each of these errors in turn and works then."""

    def __init__(self, errors: list[OSError]) -> None:
        self.errors, self.tries = errors, 0

    def __call__(self) -> str:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return "read"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT, errno.EINTR, errno.EBUSY])
def test_an_error_that_may_pass_is_tried_again(number: int) -> None:
    disk = Disk(failing(number, number))
    assert patience.patiently(disk) == "read" and disk.tries == 3


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EROFS, errno.EISDIR, errno.EEXIST])
def test_an_error_that_stays_is_raised_at_once(number: int) -> None:
    disk = Disk(failing(number))
    with pytest.raises(OSError) as caught:
        patience.patiently(disk)
    assert caught.value.errno == number and disk.tries == 1


def test_the_last_error_is_raised_when_no_try_works() -> None:
    disk = Disk(failing(errno.EIO, errno.EIO, errno.ESTALE, errno.EIO, errno.EIO))
    with pytest.raises(OSError) as caught:
        patience.patiently(disk)
    assert caught.value.errno == errno.EIO and disk.tries == 4


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, UserError), (errno.EROFS, UserError), (errno.EIO, OSError), (errno.EACCES, OSError)],
)
def test_only_what_the_user_must_clear_is_the_users(number: int, kind: type[Exception]) -> None:
    error = patience.in_words(failing(number)[0], Path("elsewhere"), "do this")
    assert isinstance(error, kind) and "a/file" in str(error) and "do this" in str(error)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    atomic.write_json(path, {"a": 1}, writer="me")
    assert path.read_text() == '{"a": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError) as caught:
        atomic.write_text(path, "new")
    assert caught.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_writer_needs_the_standard_library_alone() -> None:
    code = "import sys; import lvtrain.files.atomic, lvtrain.training.outcome, lvtrain.launch.attempt; print('torch' in sys.modules, 'yaml' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
