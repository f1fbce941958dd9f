"""Memory and speed of a run, predicted without the target hardware. Read `plan`, `planned_run`, `aot`, `cost`."""
