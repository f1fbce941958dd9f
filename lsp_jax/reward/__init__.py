"""Reward components. Read `base` (the interface), `build` (from configuration to components), `scoring`."""
