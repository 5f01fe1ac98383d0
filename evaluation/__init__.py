"""Measuring and showing videos: the sprite world, its scorer, contact sheets and run summaries."""
