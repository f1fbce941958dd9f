"""What a run tells: metrics, JSONL files and trackers, console, transcripts, the HTML report. Read `metrics` first."""
