"""Monitors of a run: alarms of self-play, non-finite numbers, signals, preemption, no progress."""
