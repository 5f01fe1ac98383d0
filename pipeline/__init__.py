"""From raw video to a dataset directory of latents: curate, annotate, encode."""
