"""Memory and speed of a run on a machine that is not at hand. Read `plan`, `planned_run`, `aot`, `cost`."""
