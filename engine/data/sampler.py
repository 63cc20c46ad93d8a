"""The records of each training step, as a function of seed and step, without other state."""

from functools import lru_cache

import numpy as np


class BatchSampler:
    """Batches of record numbers, each record once per epoch.

    The permutations of all epochs form one endless stream, and step s takes the `batch_size` numbers from
    s · batch_size on. A batch may span two epochs (no record is dropped, no batch is short), and may then
    hold a record twice. No state is kept between steps: a resumed run, and one with another number of ranks,
    draws the same batches.
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
        """Check the arguments.

        Args:
            num_records: number of records, which are numbered from 0.
            batch_size: records per step, over all ranks.
            seed: at least 0; seed and epoch number determine the order of an epoch.
            shuffles: whether each epoch is shuffled; otherwise all have the file's order.
            allows_repeats: accept fewer records than a batch, which then repeats records.

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
                f"than once; lower the batch to {num_records} or less, add records, or allow repeats"
            )
        self.num_records = num_records
        self.batch_size = batch_size
        self.seed = seed
        self.shuffles = shuffles

    def batch(self, step: int) -> list[int]:
        """Return the `batch_size` record numbers of a step, in the order of the stream.

        Raises:
            ValueError: a negative step.
        """
        offset = self._offset(step)
        numbers: list[int] = []
        while len(numbers) < self.batch_size:
            epoch, start = divmod(offset + len(numbers), self.num_records)
            end = start + self.batch_size - len(numbers)
            if self.shuffles:
                numbers += _permutation(self.num_records, self.seed, epoch)[start:end].tolist()
            else:
                numbers += range(start, min(end, self.num_records))
        return numbers

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, of the step's first record.

        Raises:
            ValueError: a negative step.
        """
        return self._offset(step) // self.num_records

    def _offset(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step is {step}; steps are numbered from 0")
        return step * self.batch_size


@lru_cache(maxsize=4)  # the two epochs that a batch spans, for training and for evaluation data
def _permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_records)
    order.setflags(write=False)
    return order
