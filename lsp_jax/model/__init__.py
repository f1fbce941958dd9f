"""Llama as pure functions of a parameter tree. Read `config`, `modules`, `llama`; then `sharding` and `weights`."""
