"""The harm alarm: watches flips as they arrive and may stop a lesson early, never pass one (any process).

A betting e-process against "a flip is at least as often a gain as a loss": wealth 1, and on each flip a stake on
"loss" that follows the share of losses so far (Krichevsky-Trofimov), never on "gain". If the lesson does no harm,
the wealth is a supermartingale: it ever reaches 1 / alpha with probability at most alpha, whenever one looks
(Ville 1939; Ramdas et al. 2023, "Game-theoretic statistics"). The certificate itself is one look at a fixed n.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HarmAlarm:
    """Feed it one probe after the other; `rings` once the evidence of harm is 1 / alpha to 1."""

    alpha: float = 0.01
    wealth: float = 1.0
    gains: int = 0
    losses: int = 0
    rings: bool = False

    def look(self, before: bool, after: bool) -> bool:
        """Take in one probe (passed before?, after?) and say whether the alarm rings; it never stops ringing."""
        if before != after:
            guess = max(
                0.5, (self.losses + 0.5) / (self.losses + self.gains + 1)
            )  # predicted share of losses
            self.wealth *= 2 * (guess if before else 1 - guess)
            self.losses += before
            self.gains += after
            self.rings = self.rings or self.wealth >= 1 / self.alpha
        return self.rings
