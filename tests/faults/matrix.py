"""The fault matrix: which tests show which row, in what words. `make faults` runs them and prints the table.

A row's number is that of the team's list of faults. What the tests assert is in the tests; each asserts that its
fault struck. LONG ones run in `make faults` only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

RESTARTS = "tests/faults/test_restarts.py::"
PROCESSES = "tests/faults/test_processes.py::"
RECOVERY = "tests/dist/test_recovery.py::"
DISK = "tests/faults/test_disk.py::"
DAMAGE = "tests/unit/test_checkpoint_damage.py::"
WATCHDOG = "tests/faults/test_watchdog.py::"


@dataclass(frozen=True)
class Row:
    """One fault, what is to come of it, and the beginnings of the names of its tests."""

    number: int
    fault: str
    expected: str
    tests: tuple[str, ...]


ROWS = (
    Row(
        1,
        "SIGKILL rank 1",
        "restart, state = unharmed",
        (PROCESSES + "test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_happened[1]",),
    ),
    Row(
        2,
        "SIGKILL rank 0",
        "restart, state = unharmed",
        (PROCESSES + "test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_happened[0]",),
    ),
    Row(
        3,
        "death in save, load, commit",
        "last committed, state = unharmed",
        (RESTARTS + "test_a_death_", "tests/unit/test_checkpoint_power.py::"),
    ),
    Row(
        4,
        "SIGKILL torchrun",
        "ranks gone, next start goes on",
        (PROCESSES + "test_nothing_outlives_a_killed_torchrun",),
    ),
    Row(
        5,
        "SIGSTOP a rank",
        "ended by watchdog, restart",
        (RESTARTS + "test_a_stopped_rank_is_ended", WATCHDOG + "test_a_stopped"),
    ),
    Row(6, "SIGSTOP 1 s", "nobody is harmed", (RESTARTS + "test_a_short_stop_harms_nobody",)),
    Row(
        7,
        "interpreter lock held 1 s / 30 s",
        "unharmed / ended by watchdog",
        (RESTARTS + "test_a_rank_that_holds", RESTARTS + "test_a_lock_held", WATCHDOG),
    ),
    Row(
        8,
        "segfault, abort, out of memory",
        "restart, state = unharmed",
        (RESTARTS + "test_a_crash_of_native_code", RESTARTS + "test_a_rank_that_the_kernel_kills"),
    ),
    Row(9, "exception on one rank", "job ends, told once", (PROCESSES + "test_what_a_loader_raises_on_one_rank",)),
    Row(
        10, "SIGTERM to torchrun", "checkpoint, resume = unharmed", (PROCESSES + "test_torchrun_that_is_asked_to_stop",)
    ),
    Row(
        11,
        "SIGTERM to one, SIGINT, twice",
        "as 10",
        (
            PROCESSES + "test_a_signal_for_one_rank",
            PROCESSES + "test_ctrl_c",
            PROCESSES + "test_one_process_that_is_asked",
        ),
    ),
    Row(12, "double start", "code 75, nothing touched", (PROCESSES + "test_a_second_start_in_the_same",)),
    Row(
        13,
        "zombie after takeover",
        "writes nothing more",
        (
            "tests/unit/test_rundir.py::test_an_older_start_sees",
            "tests/unit/test_wal.py::test_one_who_has_lost_the_run",
            "tests/unit/test_checkpoint_course.py::test_one_who_lost_the_run",
        ),
    ),
    Row(
        14,
        "kill -9 of everything",
        "goes on, state = unharmed",
        (RESTARTS + "test_a_kill_of_all_ranks", PROCESSES + "test_nothing_outlives_a_killed_torchrun"),
    ),
    Row(
        15,
        "crash loop at one step",
        "stops after 3 starts, code 69",
        (RESTARTS + "test_three_starts_without_progress",),
    ),
    Row(
        16,
        "NaN in rank 1's batch",
        "skipped alike; 3: back",
        ("tests/dist/test_verdicts.py::test_a_bad_batch_of_one_rank", RECOVERY + "test_three_steps_in_a_row"),
    ),
    Row(
        17,
        "overflow; mode, LR, scaler astray",
        "skipped alike; named, undone",
        (
            RECOVERY + "test_a_scaler_out_of_step",
            RECOVERY + "test_a_gradient_that_overflows",
            RECOVERY + "test_a_replica_that_drifts_is_named_and_undone[learning rate]",
            RECOVERY + "test_a_replica_that_drifts_is_named_and_undone[mode]",
        ),
    ),
    Row(18, "loss spike > 15x", "back, samples out, = scripted", (RECOVERY + "test_a_spike_goes_back",)),
    Row(19, "collapse on all ranks", "good checkpoint, later void", (RECOVERY + "test_a_collapse_goes_back",)),
    Row(
        20,
        "bit flip in weight, moment, seed",
        "tensor named, state = unharmed",
        (
            RECOVERY + "test_a_replica_that_drifts_is_named_and_undone[weight]",
            RECOVERY + "test_a_replica_that_drifts_is_named_and_undone[moment]",
            RECOVERY + "test_a_replica_that_drifts_is_named_and_undone[seed]",
            RECOVERY + "test_a_buffer_that_drifts",
        ),
    ),
    Row(
        21,
        "RNG or sampler out of step",
        "named, state = unharmed",
        tuple(
            RECOVERY + f"test_a_replica_that_drifts_is_named_and_undone[{what}]"
            for what in ("random numbers", "sampler")
        ),
    ),
    Row(
        22,
        "change between digest and write",
        "refused, old one kept",
        (
            "tests/unit/test_checkpoint_faults.py::test_staged_bytes_that_change",
            "tests/unit/test_checkpoint_ranks.py::test_ranks_that_differ",
        ),
    ),
    Row(
        36,
        "command damaged for one rank",
        "sent again; else none applies it",
        (
            "tests/dist/test_dist.py::test_a_frame_that_arrives_damaged",
            "tests/dist/test_dist.py::test_a_line_that_damages",
            "tests/unit/test_coordinator_apply.py::test_when_one_rank_cannot_follow",
        ),
    ),
    Row(
        37,
        "apply fails on one rank",
        "all as before",
        (
            "tests/unit/test_coordinator_apply.py::test_when_one_rank_cannot_follow",
            "tests/unit/test_coordinator_apply.py::test_a_structure_that_does_not_run",
        ),
    ),
    Row(
        38, "death around a decision", "applied exactly once", (RESTARTS + "test_a_decision_takes_effect_exactly_once",)
    ),
    Row(
        39,
        "disk full",
        "save dropped; reserve, clean end",
        (DISK + "test_a_disk_that_fills_up", DISK + "test_on_a_full_disk", DISK + "test_a_log_without_a_reserve"),
    ),
    Row(40, "EIO at every operation", "never reported committed", (DISK + "test_whichever_operation_fails",)),
    Row(
        41,
        "read-only, immutable",
        "refused, or as 39",
        (
            DISK + "test_a_read_only",
            DISK + "test_a_disk_that_turns_read_only",
            DISK + "test_an_immutable",
            DISK + "test_a_folder_of_the_log",
        ),
    ),
    Row(
        42,
        "power cut at every operation",
        "last acknowledged is there",
        (DISK + "test_real_power_cuts", "tests/unit/test_wal_power.py::"),
    ),
    Row(
        43,
        "bit flip, truncation, zeroes",
        "found before use, older one",
        (
            DISK + "test_a_thousand_random_damages",
            DAMAGE + "test_no_flipped_bit",
            DAMAGE + "test_a_damaged_file",
            "tests/unit/test_checkpoint_ranks.py::test_damage_that_one_rank_sees",
        ),
    ),
    Row(44, "damage to the log", "torn end cut, rest refused", ("tests/unit/test_wal.py::",)),
    Row(
        45,
        "all checkpoints bad",
        "refused without allow_fresh",
        (DAMAGE + "test_when_all_are_bad", "tests/unit/test_checkpoint_course.py::test_all_damaged_is_a_fresh_start"),
    ),
    Row(
        46,
        "malicious run directory",
        "refused, nothing runs",
        (
            DAMAGE + "test_a_hostile_shard",
            DAMAGE + "test_nothing_is_unpickled",
            DAMAGE + "test_giant_json",
            DAMAGE + "test_a_linked_folder",
        ),
    ),
    Row(
        47,
        "shard missing or of another save",
        "refused by all ranks",
        (
            "tests/unit/test_checkpoint_ranks.py::test_a_shard_that_is_missing",
            DAMAGE + "test_a_file_of_another_checkpoint",
        ),
    ),
    Row(
        48,
        "death during restore",
        "restore repeated, state = unharmed",
        (RESTARTS + "test_a_death_while_a_state_is_taken_up", RESTARTS + "test_a_death_in_the_middle_of_a_return"),
    ),
    Row(49, "slow disk", "steps go on, saves skipped", (RECOVERY + "test_a_slow_disk_under_the_checkpoints",)),
    Row(
        50,
        "network cut, collective left out",
        "ends, commits nothing, goes on",
        (
            "tests/faults/test_partition.py::",
            RESTARTS + "test_a_rank_that_leaves_out_a_collective",
            "tests/unit/test_checkpoint_ranks.py::test_a_rank_that_leaves_during_a_save",
        ),
    ),
    Row(
        51,
        "straggler; loader stopped, killed",
        "named; replaced, no batch lost",
        (
            RECOVERY + "test_a_rank_with_slow_data",
            "tests/unit/test_pace.py::",
            "tests/unit/test_workers.py::",
        ),
    ),
    Row(
        52,
        "alarms, rank 0 in a collective",
        "seen; higher one, at one step",
        (
            RECOVERY + "test_an_alarm_reaches",
            RECOVERY + "test_of_two_alarms",
            RECOVERY + "test_an_emergency",
            RECOVERY + "test_a_halt",
            WATCHDOG + "test_an_alarm_is_acknowledged",
        ),
    ),
    Row(
        53,
        "page gone, no room, stale page",
        "fence alone; cleaned",
        (
            RECOVERY + "test_without_room_for_the_page",
            RECOVERY + "test_a_page_that_is_deleted",
            "tests/unit/test_page.py::",
            "tests/unit/test_snapshots.py::test_sweeping",
        ),
    ),
    Row(
        54,
        "telemetry slow, dead, disk full",
        "bounded, counted, no step waits",
        (RECOVERY + "test_a_slow_disk_under_the_telemetry", "tests/unit/test_telemetry_events.py::"),
    ),
    Row(55, "resume: other ranks, code, config", "refused unless accepted", ("tests/unit/test_restore.py::",)),
    Row(
        56,
        "rank 0 dies in an operator's act",
        "the act holds, state = unharmed",
        (
            "tests/faults/test_acts.py::test_a_command_holds",
            "tests/integration/test_operator_course.py::test_a_death_at_any_point",
            "tests/integration/test_operator_course.py::test_a_stop_that_a_crash_cut_off",
        ),
    ),
)

LONG = (
    "tests/faults/test_partition.py::",
    *(
        RESTARTS + test
        for test in (
            "test_a_kill_of_all", "test_a_death_", "test_a_short_stop", "test_a_crash_of", "test_three_starts",
            "test_a_rank_that_", "test_a_lock_held",
        )
    ),
)  # fmt: skip
"""Left out of the whole suite; `make faults` and their names run them."""

COUNTED = "counted"
"""Name of the property under which a test tells how much it tried."""

SMOKE = (1, 2, 4, 5, 10, 12, 16, 18, 20, 37, 38, 42, 43)


def rows_of(name: str) -> list[Row]:
    """The rows that a test shows."""
    return [row for row in ROWS if any(name.startswith(test) for test in row.tests)]


@dataclass
class Seen:
    """What the tests of one row came to. ``counted``: what they say of how much they tried, for people."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    counted: list[str] = field(default_factory=list)


def table(seen: Mapping[int, Seen]) -> Iterable[str]:
    """The table, at most 96 columns wide."""
    yield f"{'row':>3}  {'fault':<34} {'expected':<34} {'seen':<12}{'time':>8}"
    for row in ROWS:
        found = seen.get(row.number, Seen())
        total = found.passed + found.failed
        word = "NOT RUN" if not total else f"FAILED {found.failed}" if found.failed else f"so in {total}"
        yield f"{row.number:>3}  {row.fault:<34} {row.expected:<34} {word:<12}{found.seconds:>6.1f} s"
        yield from (f"     {text}" for text in found.counted)
    shown = sum(1 for row in ROWS if (s := seen.get(row.number)) and s.passed and not s.failed)
    yield f"{shown} of {len(ROWS)} rows shown"
