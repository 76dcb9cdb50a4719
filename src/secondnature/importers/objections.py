"""Whether a user's turn begins like an objection to the answer before it (client).

A coarse sieve on purpose: what it lets through is a candidate that a person looks at, never a correction.
"""

from __future__ import annotations

import re

__all__ = ["objects"]

_BEGINS = re.compile(
    r"""^\W*(
      no (?! \s+ (problem|worries|need|rush|hurry|idea|doubt|thanks) ) \b
    | nope\b | nah\b | wrong\b | incorrect\b | stop\b | undo\b | revert\b | wait\b | actually,
    | (that|this|it) ( 's | ’s | \s+ is | \s+ was ) \s+ ( not\b | n[o']t\b | wrong\b | incorrect\b )
    | (that|this|it) \s+ ( isn | wasn | doesn | didn ) ['’]t\b
    | not \s+ ( what | like | quite | that | correct | right ) \b
    | i \s+ ( said | told | asked | meant | wanted | did \s+ not | didn['’]t | don['’]t \s+ want | never ) \b
    | (as \s+)? i \s+ (already|just) \s+ (said|told|asked) \b
    | you \s+ ( forgot | ignored | missed | misunderstood | still | again | did \s+ not | didn['’]t | are \s+ wrong
              | were \s+ (supposed|asked) | should \s+ (not|have) | shouldn['’]t | keep ) \b
    | why \s+ (did|are|do|would|have) \s+ (you|n['’]t) \b | please \s+ (don['’]t|do \s+ not|stop|only) \b
    | (don['’]t|do \s+ not|never) \b | instead\b | again[,:]
    | nein\b | falsch\b | non\b, | ich \s+ (habe|hatte|wollte|meinte) \b | das \s+ (ist|war) \s+ (nicht|falsch) \b
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def objects(text: str) -> bool:
    """Whether it begins with `no`, `I said`, `that's not what`, and the like."""
    return _BEGINS.match(text[:200]) is not None
