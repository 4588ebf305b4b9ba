"""Scaling laws: ingest, FLOPs, the three approaches of Hoffmann et al. (arXiv 2203.15556), resampling and planning."""
