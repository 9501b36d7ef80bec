"""Reports of a run: metrics, progress, charts, HTML pages, cost estimates."""
