"""Fine-tuning: clips to a dataset, the objective, the loop that minimises it, and what it leaves on disk."""

from pathlib import Path

# Twenty clips with captions, to try a training with (scripts/example_clips.py).
EXAMPLE_CLIPS = Path(__file__).parent.parent / "assets" / "example_clips"
