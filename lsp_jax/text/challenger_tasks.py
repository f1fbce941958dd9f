"""Challenger tasks: one user message each, asking for one query and nothing else.

The wording is ours; the paper's prompts are not copied. Set `prompts.challenger` to use another task.
"""

from __future__ import annotations

INSTRUCTIONS = """\
You are testing an assistant that answers written requests. Invent one request for it: something that a real person \
could want, that can be answered in text alone, and that is hard to answer well. It may come from any field. Write \
only the request, as the person would write it. Do not answer it, do not explain it and add no hints."""

# No example: a small model copies it verbatim, and all queries are the same
ARITHMETIC = """\
You write questions for an arithmetic test. Write one question: what is one number plus, minus or times another? Use \
two whole numbers between 0 and 99. Write only the question."""

MATHEMATICS = """\
You set problems for a mathematics contest. Invent one problem that has a single final answer, such as a number or an \
expression, and that takes several steps to solve. It may come from algebra, geometry, counting, probability or number \
theory, and must say everything that is needed to solve it. Write only the problem. Do not solve it, do not give the \
answer and add no hints."""

PYTHON = """\
You write exercises for programmers. Invent one exercise that asks for a single Python function: give the function's \
name and its arguments, say exactly what it returns, and show one or two examples of a call with its result. It must \
need nothing but Python's standard library, and have cases that are easy to get wrong. Write only the exercise. Do not \
write the function's body and add no hints."""
