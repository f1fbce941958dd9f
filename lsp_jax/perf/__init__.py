"""What a run needs and could reach on a machine, before it is there. Read `plan`, `aot`, `cost`."""
