"""How a run on several workers is said to have ended."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith.cluster.desk import News
from tunesmith.cluster.driver import _outcome
from tunesmith.errors import RunError

train = pytest.importorskip("ray.train", reason="the extra tunesmith[ray] is not installed")
FOLDER = Path("outputs/run")


@pytest.mark.parametrize(
    ("error", "folder", "said"),
    [
        (
            train.WorkerGroupError("a worker\ndied", {}),
            FOLDER,
            "workers: were lost more than 3 times (Training failed due to worker errors: a worker died); "
            "see outputs/run/logs; the run can go on from its last checkpoint: give --resume auto",
        ),
        # Before there is a folder there is nothing to go on from.
        (
            train.WorkerGroupError("a worker died", {}),
            None,
            "workers: were lost more than 3 times (Training failed due to worker errors: a worker died); "
            "mend that and start it again: nothing has been saved yet",
        ),
        # No worker was lost.
        (
            train.ControllerError(ValueError("no such bundle")),
            None,
            "workers: were given up by Ray Train (Training failed due to controller error: no such bundle); "
            "mend that and start it again: nothing has been saved yet",
        ),
    ],
)
def test_what_ray_train_gives_up_on_is_told_as_what_it_is(error, folder, said):
    with pytest.raises(RunError) as raised:
        _outcome(News(folder=folder), SimpleNamespace(error=error))
    assert str(raised.value) == said
