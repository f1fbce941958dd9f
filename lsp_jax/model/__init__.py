"""Llama as pure functions of a parameter tree.

Read `config`, `modules`, `llama`; `sharding` and `weights` stand by themselves.
"""
