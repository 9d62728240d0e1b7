"""Keep results in MLflow, and make the paper's tables and figures from them.

This room imports the rooms up to `bae.callbacks`. Start with tracking.py (the run in MLflow); finished_runs.py finds
runs again, tables.py sets them beside the published numbers, and paper_figures.py draws them.
"""
