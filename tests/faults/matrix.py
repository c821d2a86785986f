"""The fault matrix: what happens to which rank and when, and what every other must say.

    id      of notes/reliability.md: F faults, C checkpoints
    setup   of training.SETUPS
    fault   of training.Fault
    told    a pattern for the first line of what all ranks that live are told
    more    one for the lines behind it

Every training is then taken up again, by new processes, from the last checkpoint, and must be to
the bit one to which nothing happened.  ``ELSEWHERE`` lists cases that other tests have.
"""

from dataclasses import dataclass

from faults.training import SETUPS, Fault

_GONE = r"no word within 1 s from rank 1: gone, stuck, or waiting for one"
_SILENT = r"no word within 0.5 s from rank 1: gone, stuck, or waiting for one"
_UP = r"rank 0 failed: "
_PARAMETERS = r"(scale|low|high|head)[\w.]*(, [\w.]+)*( and \d+ more)?"


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        patience: how many seconds ranks wait for each other.
        quick: whether it is part of ``make test``; ``make faults`` runs all.
    """

    id: str
    setup: str
    fault: Fault
    told: str
    more: str = _GONE
    patience: float = 60.0
    quick: bool = True

    @property
    def name(self) -> str:
        """For reports of tests."""
        fault = self.fault
        return f"{self.id} {self.setup}: {fault.kind} of rank {fault.rank} at {fault.at}"

    @property
    def ranks(self) -> int:
        return SETUPS[self.setup].ranks


def _hang(id, setup, told, at="forward", kind="hang", patience=2.0, **options):
    """A rank that is stuck, and is named when the time is up."""
    return Case(id, setup, Fault(kind, at=at), told, _SILENT, patience, **options)


def _moved(what, dimension="dp"):
    """A collective of a graph, as errors say it."""
    return _UP + what + rf" \(node \w+, [\d,]+ bytes over {dimension} with rank 1\)$"


_AGREEMENT = _UP + r"agreement of all ranks \(\d+ bytes over all ranks with rank 1\)$"
_SCATTER = rf"reduce-scatter of the gradients? of {_PARAMETERS} in the backward"
_IN_BACKWARD = _moved(rf"({_SCATTER}|gather of the parameters? {_PARAMETERS} in the backward)")
_GATHER = _moved(rf"gather of the parameters? {_PARAMETERS} in the forward")
_AVERAGE = _moved(rf"all-reduce of the gradients? of {_PARAMETERS} in the backward")
_BARRIER = r"^\[FXZ602\] saving step 4: a collective of rank \d failed: barrier of all ranks "
_FROM_1 = (
    _UP + r"receive of the gradient of \w+ from stage 1 to stage 0 for micro-batch \d "
    r"\([\d,]+ bytes over pp with rank 1\)$"
)
_NORM = _UP + r"exchange of 8 gradients for their norm \([\d,]+ bytes over dp with rank 1\)$"
_BARRIER_OF_SIGNALS = (
    r"^\[FXZ602\] asking who leaves: a collective of rank 0 failed: barrier of all "
)
_SUM_OF_STAGES = _UP + r"sum over the stages "
_IN_BACKWARD_OR_AVERAGE = f"({_IN_BACKWARD}|{_AVERAGE})"
_ANY = r"^\[FXZ602\] step 4: a collective of rank \d failed: .* over (dp\w*|pp|all ranks) with"
_GONE_OF_4 = r"no word within 1 s from rank ([\d, ]*, )?3: gone, stuck, or waiting for one"
_RAISED = (
    r"^\[FXZ602\] step 4: rank 1 failed in step 4, in the forward of stage 1 for micro-batch 0: "
)
_FAILED_0 = r"  a collective of rank 0 failed: receive of the gradient of "
_GONE_0 = _GONE.replace("rank 1", "rank 0")

_LATER = {"quick": False}

CASES = (
    Case("F1", "zero 0", Fault("kill", at="backward"), _AVERAGE),
    Case("F1", "zero 0", Fault("kill", at="step"), _AGREEMENT, **_LATER),
    Case("F1", "zero 1", Fault("kill", at="backward"), _IN_BACKWARD),
    Case("F1", "zero 2", Fault("kill", at="forward"), _IN_BACKWARD, **_LATER),
    Case("F1", "zero 3", Fault("kill", at="forward"), _GATHER, **_LATER),
    Case("F1", "zero 3", Fault("kill", at="backward"), _IN_BACKWARD),
    Case("F1", "zero 3", Fault("kill", at="optimizer"), _BARRIER_OF_SIGNALS),
    Case("F1", "clipped", Fault("kill", at="clip"), _NORM),
    Case("F1", "accumulated", Fault("kill", at="backward"), _AGREEMENT),
    Case("F1", "micro-batches", Fault("kill", at="backward"), _IN_BACKWARD, **_LATER),
    Case("F1", "updated in the backward", Fault("kill", at="backward"), _IN_BACKWARD),
    Case("F1", "generated", Fault("kill", at="backward"), _IN_BACKWARD, **_LATER),
    Case("F1", "1f1b", Fault("kill", at="backward"), _FROM_1),
    Case("F1", "1f1b", Fault("kill", at="clip"), _SUM_OF_STAGES, **_LATER),
    Case("F1", "zb1p", Fault("kill", at="backward"), _FROM_1),
    Case("F1", "pp x dp", Fault("kill", 3, at="loss"), _ANY, _GONE_OF_4, **_LATER),
    Case("F1", "hybrid", Fault("kill", 3, at="backward"), _ANY, _GONE_OF_4, **_LATER),
    _hang("F2", "zero 3", _GATHER, patience=5.0),
    _hang("F2", "zero 3", _AGREEMENT, at="step", **_LATER),
    _hang("F2", "zero 0", _AVERAGE, at="backward"),
    _hang("F2", "zero 3", _IN_BACKWARD, kind="stop", at="backward"),
    _hang("F2", "clipped", _NORM, at="clip", **_LATER),
    _hang("F2", "1f1b", _FROM_1, at="backward", patience=4.0),
    Case("F2", "zero 3", Fault("slow"), ""),
    Case("F2", "1f1b", Fault("slow", at="loss"), "", **_LATER),
    Case("F4", "zero 0", Fault("raise", at="loss"), _IN_BACKWARD_OR_AVERAGE, _GONE),
    Case("F4", "zero 3", Fault("raise", at="loss"), _IN_BACKWARD, _GONE, **_LATER),
    Case("F4", "1f1b", Fault("raise", at="loss"), _RAISED, _FAILED_0),
    Case("C2", "wide", Fault("kill in the shard", at="save"), _BARRIER, _GONE),
    Case("C2", "wide", Fault("kill in the state", 0, at="save"), _BARRIER, _GONE_0),
    Case("F8", "zero 3", Fault("terminate", at="backward", step=3), ""),
    Case("F8", "zero 0", Fault("terminate", 0, at="step", step=3), "", **_LATER),
    Case("F8", "1f1b", Fault("terminate", at="loss", step=3), ""),
    Case("F8", "zero 3", Fault("terminate", at="save", step=4), "", **_LATER),
)

# What worlds whose processes all live on are told: task, setup, name of the case -> every rank's
# first line, and a line behind it.
_STEPS = r"DivergenceError: \[FXZ601\] ranks were given different steps; no collective was started$"
_GRAPHS = (
    r"DivergenceError: \[FXZ601\] ranks do not have the same graph; no collective was started$"
)
_FULL = r"OSError: \[Errno 27\] File too large"

LIVING = {
    "disagreements": (
        "zero 3",
        {
            "F3 rows": (_STEPS, r"  rank 1: inputs float32\[4, 6\], int64\[4\], training"),
            "F3 dtype": (_STEPS, r"  rank 1: inputs float64\[8, 6\]"),
            "F3 labels": (_STEPS, r"  rank 1: inputs float32\[8, 6\], int32\[8\]"),
            "F3 mode": (_STEPS, r"  rank 1: .*, evaluation, "),
            "F3 frozen": (_STEPS, r"  rank 1: .*, 1 frozen parameters"),
            "F3 layer": (_GRAPHS, r"  rank 1: "),
            "F3 stage": (
                r"DivergenceError: \[FXZ601\] ranks were given different options; no collective",
                r"  rank 1: Sharding\(zero=1, ",
            ),
        },
    ),
    "damages": (
        "zero 3",
        {
            "C4 flip": (r"CheckpointError: .*\.safetensors is damaged: SHA-256 ", ""),
            "C4 swap": (
                r"CheckpointError: .*\.safetensors (is damaged: SHA-256|has \d+ bytes)",
                "",
            ),
            "C4 cut": (
                r"CheckpointError: .*\.safetensors has 99 bytes, its manifest says \d+$",
                "",
            ),
            "C4 delete": (r"CheckpointError: .*\.safetensors is missing: No such file", ""),
            "C4 manifest": (r"CheckpointError: .*manifest\.json", ""),
            "C4 state": (r"CheckpointError: .*state\.json has 2 bytes, its manifest says \d+", ""),
        },
    ),
    "refusals": (
        "wide",
        {
            "C8 first rank": (rf"CheckpointError: \[FXZ701\] rank 0 failed: {_FULL}", ""),
            "C8 second rank": (rf"CheckpointError: \[FXZ701\] rank 1 failed: {_FULL}", ""),
            "C8 both ranks": (rf"CheckpointError: \[FXZ701\] rank 0 failed: {_FULL}", ""),
            "C8 state": (rf"CheckpointError: \[FXZ701\] (rank 0 failed: )?{_FULL}", ""),
            "C8 read-only": (
                r"CheckpointError: \[FXZ701\] (rank 0 failed: )?PermissionError: \[Errno 13\]",
                "",
            ),
        },
    ),
}

# Cases that other files have: file -> id and name of the test.
ELSEWHERE = {
    "test_distributed.py": (
        ("F1", "test_a_dead_rank_is_named_by_all_others"),
        ("F3", "test_ranks_that_differ_raise_the_same_error"),
        ("F3", "test_ranks_may_accumulate_differently"),
        ("C3", "test_a_checkpoint_loads_at_any_number_of_ranks"),
        ("C7", "test_checkpoints_of_two_ranks_meet_the_world"),
    ),
    "test_pipeline.py": (
        ("F1", "test_a_dead_rank_is_named"),
        ("F3", "test_ranks_may_change_shapes_together"),
        ("F4", "test_an_error_of_one_rank_is_told_to_all"),
        ("C3", "test_a_checkpoint_loads_with_other_stages_and_without_any"),
    ),
    "test_torchrun.py": (("F5", "test_after_a_killed_rank_training_resumes_bit_for_bit"),),
    "test_monitor_ranks.py": (("F7", "test_a_loss_that_is_no_number_on_one_rank_stops_all"),),
    "test_checkpoint.py": (
        ("C1", "test_a_hundred_kills_in_five_places_leave_only_whole_checkpoints"),
        ("C5", "test_training_goes_on_bit_for_bit"),
        ("C7", "test_transformers_reads_what_is_exported"),
        ("C9", "test_another_model_is_refused_with_the_names"),
        ("C10", "test_saving_makes_no_optimizer_state"),
    ),
    "test_no_code.py": (("C6", "test_nothing_that_is_read_is_run"),),
}
