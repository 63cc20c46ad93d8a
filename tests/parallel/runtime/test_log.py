"""Lines for the user: whole, once, on the stderr of the moment."""

import logging
import subprocess
import sys
from types import SimpleNamespace

from glm_rlhf.parallel.runtime.log import ROOT, log, log_rank


def test_a_message_is_written_as_it_is(capsys):
    log("first\n  second: 50 %")
    assert capsys.readouterr().err == "first\n  second: 50 %\n"


def test_with_a_topology_only_the_main_rank_writes(capsys):
    for is_main_rank in (True, False):
        log(f"main: {is_main_rank}", SimpleNamespace(is_main_rank=is_main_rank))
    assert capsys.readouterr().err == "main: True\n"


def test_a_rank_writes_its_number(capsys):
    log_rank("out of memory", 3)
    assert capsys.readouterr().err == "[rank 3] out of memory\n"


def test_a_level_above_does_not_hide_a_message(capsys):
    logger = logging.getLogger(ROOT)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        log("shown")
        logging.getLogger(f"{ROOT}.engine.data").warning("hidden")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err == "shown\n"


def test_an_application_keeps_its_own_handler_and_torch_stays_out():
    code = (
        "import logging, sys\n"
        "logging.getLogger('glm_rlhf').addHandler(logging.StreamHandler(sys.stdout))\n"
        "from glm_rlhf.parallel.runtime.log import log\n"
        "log('once')\n"
        "assert 'torch' not in sys.modules\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("once\n", "")


def test_a_handler_of_the_root_logger_writes_no_message_again():
    code = (
        "import logging\nlogging.basicConfig()\nfrom glm_rlhf.parallel.runtime.log import log\nlog('once')\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr == "once\n"
