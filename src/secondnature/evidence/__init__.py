"""Probes, checks, statistics and the gate: what a lesson must show to be kept (no torch).

The door of the room: judge answers (`judge_probes`), judge a lesson (`judge_lesson`), check a certificate
(`verify`), watch for harm (`HarmAlarm`), measure the floor (`aa_floor`). The tests themselves are in `statistics`.
"""

from secondnature.evidence.alarm import HarmAlarm
from secondnature.evidence.certificate import certify, recompute, verify
from secondnature.evidence.checks import Asked, extract_python, judge, judge_all, judge_probes
from secondnature.evidence.decision import compare
from secondnature.evidence.gate import Floor, aa_floor, hash_probes, held_out, judge_lesson, read_in_training
from secondnature.evidence.power import gain_n_needed, noninferiority_n_needed
from secondnature.evidence.reach import reach, reaches
from secondnature.evidence.sandbox import Limits, Ruling, walls
from secondnature.evidence.statistics import clopper_pearson, d_prime, difference_interval, wilson

__all__ = [
    "Asked",
    "Floor",
    "HarmAlarm",
    "Limits",
    "Ruling",
    "aa_floor",
    "certify",
    "clopper_pearson",
    "compare",
    "d_prime",
    "difference_interval",
    "extract_python",
    "gain_n_needed",
    "hash_probes",
    "held_out",
    "judge",
    "judge_all",
    "judge_lesson",
    "judge_probes",
    "noninferiority_n_needed",
    "reach",
    "reaches",
    "read_in_training",
    "recompute",
    "verify",
    "walls",
    "wilson",
]
