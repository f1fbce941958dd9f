"""Monitors of a run: self-play alarms, non-finite metrics, signals, preemption notices, missing progress."""
