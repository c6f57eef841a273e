"""How far a run has come and how long it will take, from its events."""

from collections import deque
from collections.abc import Callable

from tunesmith.tracking.events import EvalEvent, RunStarted, StepEvent
from tunesmith.tracking.formats import clock, count, fraction, metric_label, number, size

_WINDOW = 50  # steps the estimate looks back on


class Pace:
    """The latest numbers of a run, and the time left.

    Args:
        now: seconds on a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW + 1)  # (time, step)
        self.total = 0
        self.epochs = 0
        self.step: StepEvent | None = None
        self.last_eval: EvalEvent | None = None
        self.best_eval: EvalEvent | None = None

    def started(self, event: RunStarted) -> None:
        self.total, self.epochs = event.total_steps, event.epochs

    def stepped(self, event: StepEvent) -> None:
        self.step = event
        self._marks.append((self._now(), event.step))

    def evaluated(self, event: EvalEvent) -> bool:
        """Take in an evaluation; True when its loss is the lowest so far."""
        self.last_eval = event
        best = self.best_eval is None or event.eval_loss < self.best_eval.eval_loss
        if best:
            self.best_eval = event
        return best

    def seconds_left(self) -> float | None:
        """Seconds until the last step, evaluation and saving included; None before the first step.

        It is the mean wall time of the last steps times the steps to go, so an evaluation between
        them counts. After one step only that step's own time is known. It counts down while a step
        goes on, but by no more than that step: a long evaluation is not progress.
        """
        if self.step is None:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step > first_step:
            each = (last_time - first_time) / (last_step - first_step)
        else:
            each = self.step.train_time_per_step
        left = each * max(0, self.total - last_step)
        return max(0.0, left - min(each, self._now() - last_time))

    def eta(self) -> str:
        left = self.seconds_left()
        return "ETA -:--:--" if left is None else f"ETA {clock(left)}"

    def numbers(self) -> list[tuple[str, str]]:
        """Label and value of what people watch, without what is not known yet."""
        pairs = []
        if self.step is not None:
            pairs.append(("loss", number(self.step.train_loss_batch)))
        if self.last_eval is not None:
            pairs.append(("eval loss", number(self.last_eval.eval_loss)))
        if self.step is not None:
            pairs.append(("lr", f"{self.step.learning_rate:.2e}"))
            pairs.append(("tokens/s", count(self.step.trained_tokens_throughput)))
            pairs.append(("memory", size(self.step.peak_memory)))
        return pairs


def eval_text(event: EvalEvent, best: bool) -> str:
    """One line for an evaluation: ``eval at step 40: loss 1.2345, perplexity 3.4368 (best so far)``."""
    values = [f"loss {number(event.eval_loss)}", f"perplexity {number(event.perplexity)}"]
    values += [f"{metric_label(name)} {fraction(value)}" for name, value in event.metrics.items()]
    listed = ", ".join(values)
    return f"eval at step {event.step}: {listed}{' (best so far)' if best else ''}"
