"""The sandbox: answers that are code and patterns of callers, run where they do no harm (process A and its own).

`run` is the near side and all that is imported; `confine` and `zygote` are programs that it starts by their path.
"""

from secondnature.evidence.sandbox.run import CodeCheck, Limits, RegexCheck, Ruling, run_checks, walls

__all__ = ["CodeCheck", "Limits", "RegexCheck", "Ruling", "run_checks", "walls"]
