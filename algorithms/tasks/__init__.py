"""Tasks: models, their data split over ranks, and their metrics. One file per concept."""
