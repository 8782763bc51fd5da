"""The file of answers that were paid for: appended and flushed one by one, so that no kill loses one.

`answers.jsonl` holds one schemas.judging.Answer a line. A line that a killed process left half-written is cut off when
the file is opened again. Its user holds a lock: one process at a time.
"""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from schemas.errors import DamagedError
from schemas.files import explained, fsync_dir, make_dirs
from schemas.judging import Answer


class AnswerFile:
    """The answers in a file by the digest of their request. A context manager; `add` may be called from any thread.

    Raises DamagedError where a line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with explained(path):
            make_dirs(path.parent)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._answers = self._load()
            fsync_dir(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def get(self, request: str) -> Answer | None:
        """The answer to a request, by its digest."""
        return self._answers.get(request)

    def add(self, answer: Answer) -> None:
        """Keep an answer: on disk when this returns. Raises PleError on a disk that cannot be written."""
        line = (answer.model_dump_json() + "\n").encode()
        with self._lock, explained(self._path):
            size = os.fstat(self._fd).st_size
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            self._answers[answer.request] = answer

    def _load(self) -> dict[str, Answer]:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._fd, len(whole))
        answers = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                answer = Answer.model_validate_json(line)
            except ValidationError as error:
                fault = error.errors()[0]
                where = ".".join(map(str, fault["loc"])) or "text"
                raise DamagedError(
                    f"{self._path} line {number}: not an answer of version 1 ({where}: {fault['msg']}): remove the "
                    "line, and its request is asked again"
                ) from error
            answers[answer.request] = answer
        return answers
