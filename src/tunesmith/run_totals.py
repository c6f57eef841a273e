"""What adds up while a run goes on."""

from dataclasses import dataclass

from tunesmith.tracking.events import EpochEvent, EvalEvent, Score, StepEvent


@dataclass
class Totals:
    """What changes over the steps of a run; a checkpoint keeps it."""

    steps: int = 0
    epoch: int = 1
    train_seconds: float = 0.0
    real_tokens: int = 0
    trained_tokens: int = 0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    epoch_seconds: float = 0.0
    epoch_eval_seconds: float = 0.0
    seconds_to_first_step: float | None = None
    evaluation: EvalEvent | None = None  # the last one
    before: Score | None = None
    after: Score | None = None
    peak_memory: int = 0  # bytes; of several workers, of the one that used most
    earlier_seconds: float = 0.0  # wall time of the processes before this one
    resumed_at: tuple[int, ...] = ()  # steps from which later processes went on
    forced: tuple[str, ...] = ()  # differences that --force-resume passed over

    def add(self, event: StepEvent) -> None:
        """Count one optimizer step."""
        self.steps, self.epoch = event.step, event.epoch
        self.train_seconds += event.train_time_per_step
        self.epoch_seconds += event.train_time_per_step
        self.real_tokens += event.real_tokens
        self.trained_tokens += event.trained_tokens
        self.peak_memory = max(self.peak_memory, event.peak_memory)
        self.epoch_loss += event.train_loss_batch * event.trained_tokens
        self.epoch_tokens += event.trained_tokens

    def end_epoch(self) -> EpochEvent:
        """The epoch's figures; counting starts anew."""
        mean = self.epoch_loss / self.epoch_tokens
        event = EpochEvent(self.epoch, self.steps, mean, self.epoch_seconds, self.epoch_eval_seconds)
        self.epoch_loss, self.epoch_tokens = 0.0, 0
        self.epoch_seconds, self.epoch_eval_seconds = 0.0, 0.0
        return event
