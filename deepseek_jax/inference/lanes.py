"""Schedules beside each other: one for each device of the batch, with slots and pages of its own."""

import numpy as np

from deepseek_jax.inference.schedule import Schedule


class Lanes(list[Schedule]):
    """Of all devices, in their order."""

    def best(self, ids_T: np.ndarray) -> Schedule:
        """For a prompt: with most of it, of those that have no more than one request above the fewest."""
        busy = [len(lane.waiting) + len(lane.running) for lane in self]
        has = [len(lane.pages.find(ids_T).pages) if len(busy) > 1 else 0 for lane in self]
        among = [i for i in range(len(busy)) if busy[i] <= min(busy) + 1]
        return self[min(among, key=lambda i: (-has[i], busy[i]))]

    def forget(self) -> None:
        """See ``Schedule.forget``."""
        for lane in self:
            lane.forget()

    def start_over(self) -> None:
        """See ``Schedule.start_over``."""
        for lane in self:
            lane.start_over()

    def metrics(self, coming: int) -> dict[str, float]:
        """Of all together; see ``Continuous.metrics``. coming: requests that have no lane yet."""
        return {
            "waiting": float(sum(len(lane.waiting) for lane in self) + coming),
            "running": float(sum(len(lane.running) for lane in self)),
            "pages": float(sum(lane.pages.count for lane in self)),
            "pages_held": float(sum(lane.pages.count - lane.pages.available for lane in self)),
            "prompt_tokens": float(sum(lane.prompt_tokens for lane in self)),
            "found_tokens": float(sum(lane.found_tokens for lane in self)),
            "preemptions": float(sum(lane.preemptions for lane in self)),
        }

    def check(self) -> None:
        """AssertionError where a page or a slot is lost."""
        for lane in self:
            lane.check()
