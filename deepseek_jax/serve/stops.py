"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string; what may yet become one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""
        self._longest, self._first = max(map(len, stops), default=1) - 1, {stop[0] for stop in stops}

    def push(self, text: str) -> tuple[str, bool]:
        """(What is certain to stand before any stop string, whether one has been found)."""
        if not self._stops:
            return text, False
        text = self._held + text
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self._held = ""
            return text[: min(found)], True
        held = next(filter(self._begins(text), range(min(self._longest, len(text)), 0, -1)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def _begins(self, text: str):
        def of(length: int) -> bool:
            return text[-length] in self._first and any(stop.startswith(text[-length:]) for stop in self._stops)

        return of

    def finish(self) -> str:
        """What was held back and has become none."""
        held, self._held = self._held, ""
        return held
