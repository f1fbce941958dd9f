"""What watches a run: alarms of self-play, numbers that are not finite, signals, preemption, no progress."""
