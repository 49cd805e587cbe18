"""What the learner has done, kept in ``workspace/.progress.json``."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chapters.machine.manifest import CourseError
from chapters.machine.package import write_file

FILE = ".progress.json"


@dataclass
class Progress:
    """chapter: where the workspace stands.

    green: tasks that passed, with the day; given: tasks filled in from the reference.
    hints: how many hints of a task were read. finished: chapter -> digest of the code that passed.
    frames: file -> digest of what the course gave of it, see ``refresh``.
    """

    chapter: int
    green: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Progress | None":
        """The progress in ``folder``; None if there is none yet."""
        file = folder / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            progress = cls(**content)
            _check(progress)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise CourseError(
                f"{folder.name}/{FILE} is damaged; delete it and say `python -m chapters start N` "
                "with the chapter you were at: your code stays as it is"
            ) from None
        return progress

    def save(self, folder: Path) -> None:
        write_file(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def forget(self, chapter: int) -> None:
        """Forget what was done in ``chapter``."""
        prefix = f"{chapter}."
        self.green = {task: day for task, day in self.green.items() if not task.startswith(prefix)}
        self.given = [task for task in self.given if not task.startswith(prefix)]
        self.finished.pop(str(chapter), None)


def _check(progress: Progress) -> None:
    good = (
        isinstance(progress.chapter, int)
        and all(
            isinstance(part, dict) for part in (progress.green, progress.hints, progress.frames)
        )
        and isinstance(progress.given, list)
        and isinstance(progress.finished, dict)
        and all(isinstance(count, int) for count in progress.hints.values())
    )
    if not good:
        raise ValueError("wrong types")
