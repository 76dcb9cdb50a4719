"""Short Python functions, 320 of them: each with assertions that run in the sandbox, and a solution (data).

Thirty-two kinds with ten values each. The name and the arguments are in the question, so that a test can call them.
"""

from __future__ import annotations

from secondnature.evidence.packs.made import Made

__all__ = ["code"]

_NUMBERS = ["2", "3", "4", "5", "6", "7", "8", "9", "10", "12"]
_LETTERS = list("abcdeilnot")
_MARKS = ["-", "+", "*", "/", "_", ":", ";", "=", "#", "!"]
_TEXTS = ["on", "in", "up", "no", "go", "yes", "hey", "sun", "map", "end"]

_KINDS: list[tuple[str, list[str], str, str, str]] = [
    (
        "add",
        _NUMBERS,
        "add(x)` that returns x plus {v}",
        "def add(x):\n    return x + {v}",
        "add(0) == {v}; add(30) == 30 + {v}",
    ),
    (
        "subtract",
        _NUMBERS,
        "minus(x)` that returns x minus {v}",
        "def minus(x):\n    return x - {v}",
        "minus({v}) == 0; minus(50) == 50 - {v}",
    ),
    (
        "times",
        _NUMBERS,
        "times(x)` that returns x times {v}",
        "def times(x):\n    return x * {v}",
        "times(1) == {v}; times(5) == 5 * {v}",
    ),
    (
        "power",
        _NUMBERS,
        "power(x)` that returns x to the power of {v}",
        "def power(x):\n    return x ** {v}",
        "power(1) == 1; power(2) == 2 ** {v}",
    ),
    (
        "rest",
        _NUMBERS,
        "rest(x)` that returns the remainder of x divided by {v}",
        "def rest(x):\n    return x % {v}",
        "rest({v}) == 0; rest(3 * {v} + 1) == 1",
    ),
    (
        "multiple",
        _NUMBERS,
        "multiple(x)` that returns True if x is a multiple of {v}, else False",
        "def multiple(x):\n    return x % {v} == 0",
        "multiple(3 * {v}) is True; multiple(3 * {v} + 1) is False",
    ),
    (
        "larger",
        _NUMBERS,
        "larger(x)` that returns True if x is greater than {v}, else False",
        "def larger(x):\n    return x > {v}",
        "larger({v}) is False; larger({v} + 1) is True",
    ),
    (
        "at_most",
        _NUMBERS,
        "at_most(x)` that returns x, but {v} where x is greater than {v}",
        "def at_most(x):\n    return min(x, {v})",
        "at_most({v} + 9) == {v}; at_most(1) == 1",
    ),
    (
        "at_least",
        _NUMBERS,
        "at_least(x)` that returns x, but {v} where x is less than {v}",
        "def at_least(x):\n    return max(x, {v})",
        "at_least(1) == {v}; at_least({v} + 9) == {v} + 9",
    ),
    (
        "distance",
        _NUMBERS,
        "distance(x)` that returns the absolute difference between x and {v}",
        "def distance(x):\n    return abs(x - {v})",
        "distance(0) == {v}; distance({v} + 4) == 4",
    ),
    (
        "repeat",
        _NUMBERS,
        "repeat(s)` that returns the string s repeated {v} times",
        "def repeat(s):\n    return s * {v}",
        "repeat('ab') == 'ab' * {v}; repeat('') == ''",
    ),
    (
        "first",
        _NUMBERS,
        "first(items)` that returns the first {v} elements of the list items",
        "def first(items):\n    return items[:{v}]",
        "first(list(range(20))) == list(range({v})); first([1]) == [1]",
    ),
    (
        "last",
        _NUMBERS,
        "last(items)` that returns the last {v} elements of the list items",
        "def last(items):\n    return items[-{v}:]",
        "last(list(range(20))) == list(range(20 - {v}, 20)); last([1]) == [1]",
    ),
    (
        "above",
        _NUMBERS,
        "above(items)` that returns a list of those numbers in items that are greater than {v}",
        "def above(items):\n    return [x for x in items if x > {v}]",
        "above([1, {v}, 99]) == [99]; above([]) == []",
    ),
    (
        "add_all",
        _NUMBERS,
        "add_all(items)` that returns a list of the numbers in items, each plus {v}",
        "def add_all(items):\n    return [x + {v} for x in items]",
        "add_all([0, 1]) == [{v}, {v} + 1]; add_all([]) == []",
    ),
    (
        "scale",
        _NUMBERS,
        "scale(items)` that returns a list of the numbers in items, each times {v}",
        "def scale(items):\n    return [x * {v} for x in items]",
        "scale([1, 2]) == [{v}, 2 * {v}]; scale([]) == []",
    ),
    (
        "up_to",
        _NUMBERS,
        "up_to()` that returns the list of the whole numbers from 1 to {v}, both included",
        "def up_to():\n    return list(range(1, {v} + 1))",
        "up_to() == list(range(1, {v} + 1)); len(up_to()) == {v}",
    ),
    (
        "long",
        _NUMBERS,
        "long(s)` that returns True if the string s has more than {v} characters, else False",
        "def long(s):\n    return len(s) > {v}",
        "long('x' * {v}) is False; long('x' * ({v} + 1)) is True",
    ),
    (
        "count",
        _LETTERS,
        "count(s)` that returns how often the letter “{v}” occurs in the string s",
        "def count(s):\n    return s.count('{v}')",
        "count('{v}x{v}') == 2; count('xyz') == 0",
    ),
    (
        "remove",
        _LETTERS,
        "remove(s)` that returns the string s without the letter “{v}”",
        "def remove(s):\n    return s.replace('{v}', '')",
        "remove('x{v}y{v}') == 'xy'; remove('xyz') == 'xyz'",
    ),
    (
        "begins",
        _LETTERS,
        "begins(s)` that returns True if the string s begins with “{v}”, else False",
        "def begins(s):\n    return s.startswith('{v}')",
        "begins('{v}x') is True; begins('x{v}') is False",
    ),
    (
        "ends",
        _LETTERS,
        "ends(s)` that returns True if the string s ends with “{v}”, else False",
        "def ends(s):\n    return s.endswith('{v}')",
        "ends('x{v}') is True; ends('{v}x') is False",
    ),
    (
        "raise_letter",
        _LETTERS,
        "capital(s)` that returns the string s with every “{v}” as a capital letter",
        "def capital(s):\n    return s.replace('{v}', '{v}'.upper())",
        "capital('x{v}x') == 'x' + '{v}'.upper() + 'x'; capital('xyz') == 'xyz'",
    ),
    (
        "has",
        _LETTERS,
        "has(s)` that returns True if the letter “{v}” occurs in the string s, else False",
        "def has(s):\n    return '{v}' in s",
        "has('x{v}x') is True; has('xyz') is False",
    ),
    (
        "join",
        _MARKS,
        "join(words)` that joins the list of strings words with “{v}” between them",
        "def join(words):\n    return '{v}'.join(words)",
        "join(['a', 'b', 'c']) == 'a{v}b{v}c'; join(['a']) == 'a'",
    ),
    (
        "split",
        _MARKS,
        "split(s)` that splits the string s at every “{v}” and returns the list of parts",
        "def split(s):\n    return s.split('{v}')",
        "split('a{v}b{v}c') == ['a', 'b', 'c']; split('a') == ['a']",
    ),
    (
        "wrap",
        _MARKS,
        "wrap(s)` that returns the string s with “{v}” before and after it",
        "def wrap(s):\n    return '{v}' + s + '{v}'",
        "wrap('a') == '{v}a{v}'; wrap('') == '{v}{v}'",
    ),
    (
        "spaces",
        _MARKS,
        "spaces(s)` that returns the string s with every space replaced by “{v}”",
        "def spaces(s):\n    return s.replace(' ', '{v}')",
        "spaces('a b c') == 'a{v}b{v}c'; spaces('ab') == 'ab'",
    ),
    (
        "prefix",
        _TEXTS,
        "prefix(s)` that returns “{v}” followed by the string s",
        "def prefix(s):\n    return '{v}' + s",
        "prefix('ab') == '{v}ab'; prefix('') == '{v}'",
    ),
    (
        "append",
        _TEXTS,
        "append(words)` that returns a new list: words with “{v}” added at its end",
        "def append(words):\n    return [*words, '{v}']",
        "append(['a']) == ['a', '{v}']; append([]) == ['{v}']",
    ),
    (
        "default",
        _TEXTS,
        "default(s)` that returns the string s, or “{v}” where s is empty",
        "def default(s):\n    return s or '{v}'",
        "default('') == '{v}'; default('ab') == 'ab'",
    ),
    (
        "lookup",
        _TEXTS,
        "lookup(table)` that returns the value of the key “{v}” of the dict table, or None where there is none",
        "def lookup(table):\n    return table.get('{v}')",
        "lookup({{'{v}': 7}}) == 7; lookup({{}}) is None",
    ),
]


def code() -> list[Made]:
    """Every kind with each of its values."""
    found: list[Made] = []
    for tag, values, asked, solution, claims in _KINDS:
        for value in values:
            source = solution.format(v=value)
            body = "".join(f"assert {c.strip()}\n" for c in claims.format(v=value).split("; "))
            found.append(
                Made(
                    prompt=f"Write a Python function `{asked.format(v=value)}. Answer with the code only.",
                    tag=tag.replace("_", "-"),
                    check={"python": body},
                    right=f"```python\n{source}\n```",
                    wrong=f"```python\n{source.rpartition('return ')[0]}pass\n```",
                    max_tokens=128,
                )
            )
    return found
