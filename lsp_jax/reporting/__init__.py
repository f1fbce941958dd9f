"""A run's metrics, JSONL files and trackers, console, transcripts, HTML report. Read `metrics` first."""
