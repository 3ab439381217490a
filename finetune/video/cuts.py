"""Scene cuts, found in passing: a frame that differs from the one before far more than frames lately did."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDE, HIGH = 48, 27
LEAST = 10.0  # of 255, mean difference of brightness and colour over all cells
FACTOR = 3.0  # over what is usual lately
USUAL_OVER = 8  # frames
LEAST_SCENE_S = 0.25  # a flash of light begins one scene, not two


def thumbnail(picture: Any) -> NDArray[np.uint8]:
    """A frame as few cells of brightness and colour, [3, HIGH, WIDE]."""
    found: NDArray[np.uint8] = picture.reformat(WIDE, HIGH, format="yuv444p", interpolation="AREA").to_ndarray()
    return found


@dataclass
class CutFinder:
    """scene: number of the scene, from 0. began: its first frame's time, in seconds."""

    scene: int = 0
    began: float = 0.0
    recent: list[float] = field(default_factory=list)
    before: NDArray[np.uint8] | None = None

    def look(self, seconds: float, cells: NDArray[np.uint8]) -> int:
        """The number of the scene that this frame belongs to. cells: its `thumbnail`."""
        if self.before is not None:
            change = float(np.abs(cells.astype(np.int16) - self.before).mean())
            usual = sum(self.recent) / len(self.recent) if self.recent else 0.0
            if change > max(LEAST, FACTOR * usual) and seconds - self.began >= LEAST_SCENE_S:
                self.scene, self.began, self.recent = self.scene + 1, seconds, []
            else:
                self.recent = [*self.recent[1 - USUAL_OVER :], change]
        self.before = cells
        return self.scene

    def state(self) -> dict[str, Any]:
        """Plain values that `from_state` goes on from."""
        before = None if self.before is None else self.before.tolist()
        return {"scene": self.scene, "began": self.began, "recent": list(self.recent), "before": before}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CutFinder":
        before = None if state["before"] is None else np.array(state["before"], dtype=np.uint8)
        return cls(state["scene"], state["began"], list(state["recent"]), before)
