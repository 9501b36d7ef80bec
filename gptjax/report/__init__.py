"""What a run tells: metrics, progress, cost estimates."""
