"""Which records a training step takes: a function of the seed and the step's number, with no other state."""

from functools import lru_cache

import numpy as np


class BatchSampler:
    """Batches of record numbers, every record once an epoch.

    The epochs' permutations stand end to end in one endless stream, and step s takes the `batch_size` numbers
    from s · batch_size on. So a batch may span two epochs (no record is left over, none is short), and then
    may hold a record twice. Nothing is kept between steps: a run that resumes at a step draws what it would
    have drawn, and so does one with another number of ranks.
    """

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        *,
        seed: int,
        shuffles: bool = True,
        allows_repeats: bool = False,
    ) -> None:
        """Check and keep the numbers.

        Args:
            num_records: records there are, numbered from 0.
            batch_size: records a step takes, over all ranks.
            seed: from 0; with the epoch's number it decides the epoch's order.
            shuffles: whether each epoch has an order of its own; otherwise all have the file's.
            allows_repeats: accept fewer records than a batch, which then repeats them.

        Raises:
            ValueError: a number out of range, or fewer records than a batch.
        """
        if num_records < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"num_records is {num_records}, batch_size is {batch_size}, seed is {seed}; they must be at "
                "least 1, 1 and 0"
            )
        if num_records < batch_size and not allows_repeats:
            raise ValueError(
                f"there are {num_records} records, a batch takes {batch_size}: it would hold records more "
                f"than once; lower the batch to {num_records} or less, give more records, or allow repeats"
            )
        self.num_records = num_records
        self.batch_size = batch_size
        self.seed = seed
        self.shuffles = shuffles

    def batch(self, step: int) -> list[int]:
        """Return the record numbers of a step, `batch_size` of them, in the order of the stream.

        Raises:
            ValueError: a negative step.
        """
        place = self._place(step)
        numbers: list[int] = []
        while len(numbers) < self.batch_size:
            epoch, start = divmod(place + len(numbers), self.num_records)
            end = start + self.batch_size - len(numbers)
            if self.shuffles:
                numbers += _permutation(self.num_records, self.seed, epoch)[start:end].tolist()
            else:
                numbers += range(start, min(end, self.num_records))
        return numbers

    def epoch_of(self, step: int) -> int:
        """Return the number, from 0, of the epoch that the step's first record belongs to.

        Raises:
            ValueError: a negative step.
        """
        return self._place(step) // self.num_records

    def _place(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step is {step}; steps are numbered from 0")
        return step * self.batch_size


@lru_cache(maxsize=4)  # two epochs that a batch spans, of training and of evaluation data
def _permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_records)
    order.setflags(write=False)
    return order
