"""The reliability table: each promise with its tests, and a run of all these tests."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A promise."""

    number: int
    """Its number in the report."""
    promise: str
    """What must not break."""
    wanted: str
    """The figure that shows it."""
    tests: tuple[str, ...]
    """Files or tests that show it, in addition to the cases of the fault table."""
    least: int = 1
    """Least number of tests and cases for the figure."""
    missing: str = ""
    """The part of the promise that no test shows."""


def _row(number: int, promise: str, wanted: str, *tests: str, least: int = 1, missing: str = "") -> Row:
    return Row(number=number, promise=promise, wanted=wanted, tests=tests, least=least, missing=missing)


PARALLEL, ENGINE = "tests/parallel", "tests/engine"
WRITER = f"{PARALLEL}/checkpoint/test_save.py"
READER = f"{PARALLEL}/checkpoint/test_restore.py"
TENSORS = f"{PARALLEL}/storage/test_checkpoint_tensors.py"
RUNS = f"{ENGINE}/runs/test_checkpoints.py"
ROLES = f"{ENGINE}/rl/test_roles.py"
FOLDER = f"{ENGINE}/runs/test_run_folder.py"
KILLED = f"{ENGINE}/runs/test_killed_runs.py"

ROWS = (
    _row(
        1,
        "a kill during a save never loses the last good checkpoint",
        "20 of 20 seeded kills load, in one test",
        f"{WRITER}::test_a_kill_at_any_moment_of_a_save_loses_nothing",
    ),
    _row(
        2,
        "resume is bitwise",
        "0 differing bits",
        RUNS,
        f"{READER}::test_the_same_layout_resumes_bit_for_bit",
        f"{ENGINE}/rl/test_partial_update.py",
        f"{ENGINE}/rl/test_checkpoint.py",
        missing="an iteration of PPO interrupted between two epochs resumes in the same layout only",
    ),
    _row(
        3,
        "all state is in the checkpoint",
        "what is dropped is caught",
        RUNS,
        f"{ENGINE}/rl/test_dropped_state.py",
    ),
    _row(
        4,
        "a checkpoint loads under another tp, pp, dp",
        "at least 12 pairs of layouts, weights bit-equal, next loss within 1e-6",
        f"{READER}::test_another_layout_has_the_same_bits_and_resumes",
        f"{READER}::test_one_rank_and_four_load_each_others",
        f"{READER}::test_either_optimizer_resumes_from_the_others_checkpoint",
        least=12,
    ),
    _row(
        5,
        "corruption is found, and the previous checkpoint is used",
        "at least 30 mutations, all refused",
        f"{TENSORS}::test_damage_is_refused_with_a_reason_and_the_previous_step_used",
        f"{TENSORS}::test_a_stale_tracker_is_reported_and_ignored",
        f"{TENSORS}::test_random_manifests_and_headers_give_typed_errors_or_load",
        least=30,
    ),
    _row(
        6,
        "loading never runs code",
        "0 executions of at least 10 malicious pickles",
        f"{TENSORS}::test_a_pickle_in_any_place_is_never_run",
        f"{PARALLEL}/storage/test_weight_files.py::test_a_malicious_pickle_is_refused_and_not_run",
    ),
    _row(
        7,
        "disk full, read-only, no permission: the old checkpoint stays, the error is clear",
        "all",
        f"{WRITER}::test_a_full_and_a_read_only_disk_leave_the_old_checkpoint",
        f"{WRITER}::test_a_folder_that_cannot_be_created_is_reported",
        f"{PARALLEL}/storage/test_folder_writer.py",
        f"{PARALLEL}/storage/test_write_errors.py",
        f"{ENGINE}/commands/test_full_disk.py",
        f"{ENGINE}/observe/test_best_effort.py",
        "tests/test_writes.py",
    ),
    _row(
        8,
        "an asynchronous save equals a synchronous one, its failure is reported by the next step",
        "equal bytes",
        f"{WRITER}::test_an_asynchronous_save_has_the_bytes_of_a_synchronous_one",
        f"{WRITER}::test_a_failing_writer_is_reported_at_the_next_step_on_all_ranks",
    ),
    _row(
        9,
        "a rank that dies ends the run quickly",
        "each rank in each phase: all dead within 30 s, the rank named",
        least=10,
    ),
    _row(
        10,
        "a hung rank is found",
        "within the timeout and 10 s, stacks dumped",
        f"{ENGINE}/health/test_watchdog.py",
    ),
    _row(
        11,
        "torchrun --max-restarts resumes",
        "final weights equal the unfaulted run's",
        f"{PARALLEL}/runtime/test_rendezvous.py::test_ranks_that_are_started_again_meet_under_a_name_of_their_own",
    ),
    _row(
        12,
        "SIGTERM and SIGUSR1 save and exit",
        "SIGTERM to each rank in each phase: 10 of 10, exit 0",
        f"{PARALLEL}/runtime/test_preemption.py",
        least=10,
    ),
    _row(
        13,
        "NaN or Inf on one rank, in any role and command: no step on any, ranks agree, rank and batch named",
        "weights the same to the bit",
        f"{ENGINE}/training/test_nonfinite.py",
        f"{ENGINE}/commands/test_nonfinite_weights.py",
    ),
    _row(
        14,
        "out of memory in a micro-batch splits it on all ranks",
        "gradient equal within 1e-6",
        f"{PARALLEL}/pipeline/test_oom_retry.py",
        f"{ENGINE}/rollout/test_generation_memory.py",
        f"{ENGINE}/training/test_step.py",
        f"{ROLES}::test_little_memory_gives_the_metrics_of_enough",
        missing="with tp or cp it holds if memory runs out on all tensor- and context-parallel ranks at the "
        "same collective; on one alone, with optimizer.in_backward or train.overlap_communication, or in "
        "generation with pp, the run ends and its message says what to lower",
    ),
    _row(
        15,
        "reward faults: bounded retries, then a clear failure or a masked row, never a silent 0",
        "8 of 8 kinds",
        f"{ENGINE}/rewards/test_http.py",
        f"{ENGINE}/rewards/test_function.py",
        f"{ENGINE}/rewards/test_combined.py",
        least=8,
    ),
    _row(
        16,
        "bad data: a typed error with file and line, no bare traceback",
        "each kind",
        f"{ENGINE}/data/records/test_jsonl.py",
        f"{ENGINE}/data/records/test_schema.py",
        f"{ENGINE}/data/records/test_turns.py",
        f"{PARALLEL}/storage/test_text_files.py",
        f"{ENGINE}/config/test_load.py",
        f"{ENGINE}/rl/test_loop.py::test_what_cannot_work_ends_with_one_sentence",
        f"{PARALLEL}/storage/test_safetensors_format.py",
    ),
    _row(
        17,
        "determinism",
        "the same bits in the same layout, within 1e-6 in fp32 across layouts",
        f"{ROLES}::test_five_iterations_have_their_stored_metrics_in_every_layout",
        f"{READER}::test_the_same_layout_resumes_bit_for_bit",
        f"{ENGINE}/commands/test_sft.py::test_the_loss_curve_is_that_of_one_rank",
        missing="across layouts metrics of PPO agree within 1e-5, after five iterations of two epochs",
    ),
    _row(
        18,
        "rollout and training logprobs agree",
        "fp32 within 1e-5, first-step ppo_kl below 1e-8",
        f"{ROLES}::test_first_step_identities",
        f"{ENGINE}/rollout/test_generation_phase.py::test_bf16_answers_have_the_training_forwards_logprobs",
    ),
    _row(
        19,
        "SIGTERM to torchrun and to its ranks at once saves",
        "each phase: saved, every rank exits with 0, 10 of 10; a repeat within 20 s changes nothing",
        f"{PARALLEL}/runtime/test_preemption.py",
        least=10,
    ),
    _row(
        20,
        "one writer per run folder, export, converted folder and output file; orphans end within 60 s",
        "the second is refused and names the first, in each command; no file of zeros",
        f"{KILLED}::test_of_two_commands_into_one_place_the_second_is_refused_and_names_the_first",
        f"{PARALLEL}/storage/test_writer_lock.py",
        f"{PARALLEL}/storage/test_folder_writer.py::"
        "test_the_second_writer_of_a_folder_is_refused_and_the_first_one_finishes",
        f"{WRITER}::test_a_folder_of_checkpoints_has_one_writer",
        f"{FOLDER}::test_output_files_have_one_writer_and_are_replaced_on_demand_only",
        f"{PARALLEL}/runtime/test_orphans.py",
        least=13,
        missing="on file systems without locks the second is not refused",
    ),
    _row(
        21,
        "what was exported or best stays best",
        "kills at changes of names, between two renames too, and damage: 20 of 20 end alike, in one test",
        f"{KILLED}::test_the_same_command_ends_as_if_it_had_never_been_killed",
        f"{PARALLEL}/storage/test_replaced_folders.py",
        f"{ENGINE}/runs/test_exports.py",
        f"{ENGINE}/rl/test_evaluation.py",
        f"{FOLDER}::test_the_same_command_continues_past_its_own_exports",
        f"{FOLDER}::test_a_damaged_last_checkpoint_whose_export_is_there_is_made_again",
        least=20,
    ),
    _row(
        22,
        "ranks agree on what they run",
        "a rank with another key, model, file, version or code is refused by all and named, 24 of 24",
        f"{ENGINE}/runs/test_same_start.py",
        f"{PARALLEL}/runtime/test_agreement.py",
        f"{ENGINE}/build/test_world.py::test_a_rank_with_another_learning_rate_is_refused_by_all",
        least=10,
    ),
    _row(
        23,
        "the data of a resumed run are the data of the run",
        "swapped answers and other texts of equal length: refused by content, 4 of 4",
        f"{FOLDER}::test_data_of_equal_lengths_and_other_content_are_refused",
        least=4,
    ),
    _row(
        24,
        "a reward call has an end: each part of a server's response that drips, stops, is huge or junk; "
        "redirects, error bodies, a gzip bomb; a function that never returns",
        "each attempt ends within reward.timeout_s and 1 s, the process of a hung function is ended",
        f"{ENGINE}/rewards/test_bounded_post.py",
        f"{ENGINE}/rewards/test_configured.py",
        f"{ENGINE}/rewards/test_in_process.py",
        f"{ENGINE}/workers/test_pool.py",
        least=60,
    ),
    _row(
        25,
        "SIGTERM while a reward is awaited saves and exits at once",
        "a server that takes 25 s, each rank: all ended within 5 s",
        f"{ENGINE}/health/test_rank_faults.py::"
        "test_a_signal_while_rewards_are_awaited_saves_at_once_and_the_run_resumes_to_the_same_bits",
        f"{ENGINE}/rewards/test_distributed.py",
        least=4,
    ),
    _row(
        26,
        "a suspended job continues",
        "all ranks stopped for longer than the watchdog allows, 5 of 5",
        f"{ENGINE}/health/test_watchdog.py::test_a_suspension_does_not_count_and_a_later_hang_does",
        least=5,
    ),
    _row(
        27,
        "input costs linear time",
        "at most 2 s of CPU time per megabyte, else refused",
        f"{ENGINE}/data/records/test_jsonl.py::test_fifty_thousand_keys_in_a_line_cost_linear_time",
        f"{PARALLEL}/storage/test_text_files.py::test_fifty_thousand_keys_cost_linear_time",
        f"{PARALLEL}/storage/test_safetensors_format.py::test_a_shape_of_many_numbers_costs_linear_time",
        f"{ENGINE}/config/test_load.py::test_aliases_do_not_multiply",
        f"{ENGINE}/config/test_load.py::test_thousands_of_unknown_keys_are_refused_in_a_short_message",
        f"{ENGINE}/config/test_load.py::test_a_config_of_a_megabyte_is_refused_unread",
        f"{ENGINE}/data/tokenizer/test_glm4.py::test_a_pattern_of_more_than_linear_time_is_refused",
        f"{ENGINE}/data/tokenizer/test_chat_format.py::test_a_template_costs_linear_time",
        f"{ENGINE}/data/tokenizer/test_tiktoken_vocab.py::test_a_bad_line_is_named",
        least=12,
    ),
    _row(
        28,
        "a run folder tells the truth",
        "config.yaml is the run's, no step twice in metrics or TensorBoard, a report for every ended run",
        f"{FOLDER}::test_a_refused_command_leaves_the_runs_config",
        f"{FOLDER}::test_a_run_that_ends_with_an_error_leaves_a_report",
        f"{ENGINE}/observe/test_metrics.py",
        f"{ENGINE}/observe/test_report.py",
        least=10,
    ),
)

DESELECTED = tuple(
    f"{ROLES}::test_five_iterations_have_their_stored_metrics_in_every_layout[{layout}]"
    for layout in ("tp4 sp", "pp2 vpp2", "cp2")
)
"""Layouts that the others cover here: each takes as long as three of them."""


@contextlib.contextmanager
def running_tests(folder: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """Run the tests of all promises in parallel with the block, also slow ones, except `DESELECTED`.

    Yields:
        A function that waits for them and returns the outcome of each, by node id.
    """
    report, log = folder / "report.xml", folder / "log.txt"
    options = ["-q", "-m", "slow or not soak", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    options += [f"--deselect={test}" for test in DESELECTED]
    targets = sorted({test for row in ROWS for test in row.tests})
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *targets],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )

    def outcomes() -> dict[str, str]:
        code = process.wait()
        assert code in (0, 1), log.read_text()[-6000:]
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "passed"
            outcome = "skipped" if "skipped" in kinds else outcome
            found[f"{case.get('file')}::{case.get('name')}"] = outcome
        return found

    try:
        yield outcomes
    finally:
        process.send_signal(signal.SIGINT)  # stops its ranks; no effect if it has finished
        process.wait()
