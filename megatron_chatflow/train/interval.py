"""The time of the iterations since the last log, for which a log speaks as a whole.

In: each step's wall time and its wait for data. Out: their means. Validations and saves lie between
steps and are not counted.
"""


class Interval:
    """Adds up steps until they are taken."""

    def __init__(self) -> None:
        """Begins with no step."""
        self.num_steps = 0
        self._seconds = self._data_seconds = 0.0

    def add(self, seconds: float, data_seconds: float) -> None:
        """Adds a step."""
        self.num_steps += 1
        self._seconds += seconds
        self._data_seconds += data_seconds

    def take(self) -> tuple[float, float]:
        """Mean wall time of a step, mean wait for its batch; begins anew."""
        seconds, data_seconds = self._seconds / self.num_steps, self._data_seconds / self.num_steps
        self.num_steps = 0
        self._seconds = self._data_seconds = 0.0
        return seconds, data_seconds
