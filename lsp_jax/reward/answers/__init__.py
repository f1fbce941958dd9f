"""Maths answers as text: where the result stands, what it means, and whether two are equal.

Reading order: `text` (one spelling), `find` (the result in a model's answer), `tokens`, `expressions` and `syntax` (the
grammar), `units`, `numeric` (exact arithmetic, then sympy), `compare`, and `reading`, which joins them. It runs in the
sandbox, which sees this folder of the package, and has nothing but the standard library until sympy is needed.
"""
