"""How a failed command is reported: one sentence from one rank, on stderr and in torchrun's summary.

Imports no torch before a command has.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from glm_rlhf.parallel.runtime.launch import Launch
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.reporter import reporting_rank

TRACEBACK_VARIABLE = "GLM_RLHF_TRACEBACK"
USER_ERROR = 2
"""Exit code of an error that the user has to fix."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_num_reports = 0


def report_user_error(title: str, message: str, launch: Launch, error: Exception | None = None) -> int:
    """Report an error that the user has to fix in one line, and return exit code 2; each rank calls this.

    One rank writes it: the first of a host where there is no exception, as for an error in the arguments,
    which all ranks have; the rank that the exception names; else each that has another sentence than those
    before it, with its number.

    Args:
        title: program and command, at the start of the line.
        message: the error; line breaks become spaces.
        launch: the place of this process.
        error: the exception, if there is one; its traceback is written if `TRACEBACK_VARIABLE` asks for it.
    """
    sentence = f"{title}: {' '.join(message.split())}"
    if os.environ.get(TRACEBACK_VARIABLE) == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if error is None:
        if launch.local_rank == 0:
            log(sentence)
        _record(sentence)
        return USER_ERROR
    others = reporting_rank(error)
    if others in (None, launch.rank) and _is_first_to_say(sentence):
        log(_numbered(sentence, launch))
    _record(sentence)
    return USER_ERROR


def report_bug(title: str, error: Exception, launch: Launch) -> None:
    """Report a bug in one line, before its traceback, which torchrun's summary gets too."""
    from glm_rlhf.parallel.runtime.spans import phase_of  # torch is loaded: a command ran

    if _ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    phase = phase_of(error)
    message = f"failed{f' in phase {phase}' if phase else ''}: {type(error).__name__}: {error}"
    log(_numbered(f"{title}: {' '.join(message.split())}", launch))


def _numbered(sentence: str, launch: Launch) -> str:
    return f"[rank {launch.rank}] {sentence}" if launch.world_size > 1 else sentence


def _record(sentence: str) -> None:
    """Write the sentence to the file that torchrun shows in its summary, in the place of a traceback."""
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        return
    details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))


def _is_first_to_say(sentence: str) -> bool:
    """Return whether no other rank of this host has claimed the sentence; always true without torchrun.

    torchrun makes a folder per attempt, with one for each rank's error file.
    """
    global _num_reports
    _num_reports += 1  # a process may run several commands
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        return True
    digest = hashlib.sha256(f"{_num_reports} {sentence}".encode(errors="replace")).hexdigest()[:16]
    try:
        with (Path(file).parents[1] / f"{digest}.said").open("x"):
            return True
    except FileExistsError:
        return False
    except (OSError, IndexError):
        return True
